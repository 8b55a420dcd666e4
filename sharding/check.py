"""`./launch.sh check NOTEEVENTS.csv.gz`: is this the file that PhysioNet publishes?

    blocks ──► records, categories, ROW_IDs of each (tasks) ──► a table beside the published counts

A download that broke off, a copy that went through a spreadsheet or a cleaner that skips lines leaves a file that looks
well. MIMIC-III v1.4 has 2,083,180 notes in 15 categories, and every one of these numbers is known.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from pydantic import Field

from cluster import config, logs, ray_runtime, storage
from cluster.errors import DataError
from sharding.readers import csv_file
from sharding.readers.csv_notes import blank_is_null
from sharding.readers.mimic import COLUMNS, PUBLISHED_NOTES, MimicReader
from sharding.schema import Block

BLOCK_BYTES = 32 << 20


class CheckConfig(config.Section):
    """`./launch.sh check NOTEEVENTS.csv.gz`."""

    input: str
    workers: int = Field(default=0, ge=0)  # tasks at a time; 0: one for every CPU of the cluster


def main(args: list[str]) -> None:
    """The verb `check`: a table, and DataError where a count is not the published one."""
    asked = config.load(CheckConfig, args, positional="input")
    source = storage.absolute(asked.input)
    size = storage.size_bytes(source)
    if not source.startswith("memory://"):
        ray_runtime.start(asked.workers)
    found: Counter[str] = Counter()
    names: list[np.ndarray] = []
    wrong = seen = 0

    in_flight = asked.workers or ray_runtime.cpus()
    run = functools.partial(ray_runtime.results, in_flight=in_flight)

    def blocks() -> Iterator[tuple[Block]]:
        nonlocal seen
        for block in MimicReader().blocks(source, BLOCK_BYTES, run):
            seen = block.stored_end
            yield (block,)

    with logs.progress("check", size) as advance:
        for _, counts in ray_runtime.map_tasks(count, blocks(), in_flight=in_flight):
            found.update(counts["categories"])
            names.append(counts["row_ids"])
            wrong += counts["iserror"]
            advance(seen, f"{found.total():,} notes")
    repeated = found.total() - len(np.unique(np.concatenate(names))) if names else 0
    # A name that is none of the 15 is counted and not shown: in a broken file it may be a piece of a note.
    rows = [(name, number, found[name]) for name, number in PUBLISHED_NOTES.items()]
    rows.append(("other", 0, found.total() - sum(number for _, _, number in rows)))
    rows.append(("all", sum(PUBLISHED_NOTES.values()), found.total()))
    logs.table(
        f"{asked.input} beside MIMIC-III v1.4",
        ("category", "published", "found", "difference"),
        [(name, f"{a:,}", f"{b:,}", f"{b - a:+,}" if b != a else "") for name, a, b in rows],
    )
    logs.say(f"{wrong:,} notes are marked as wrong (ISERROR); ./launch.sh shard leaves them out")
    if repeated:
        raise DataError(f"{asked.input}: {repeated:,} notes have the ROW_ID of another; compare its checksum")
    differing = sum(a != b for _, a, b in rows[:-1])
    if differing:
        raise DataError(
            f"{asked.input}: is not NOTEEVENTS of MIMIC-III v1.4: {found.total():,} notes instead of {rows[-1][1]:,}, "
            f"{differing} categories differ; compare its checksum with PhysioNet's SHA256SUMS.txt"
        )
    logs.say(f"{asked.input}: every count is the published one")


def count(block: Block) -> dict[str, Any]:
    """Of the records of a block: how many by category, how many marked as wrong, and their ROW_IDs."""
    read = dict(zip(COLUMNS, csv_file.parse(block, COLUMNS), strict=True))
    categories = blank_is_null(read["CATEGORY"]).fill_null("").value_counts()
    wrong = pc.equal(pc.utf8_trim_whitespace(read["ISERROR"]), "1")
    try:
        row_ids = read["ROW_ID"].cast("int64").to_numpy()
    except ValueError:
        raise DataError(f"{block.url}: a ROW_ID between bytes {block.start} and {block.end} is no number") from None
    return {
        "categories": {pair["values"]: pair["counts"] for pair in categories.to_pylist()},
        "iserror": pc.sum(wrong).as_py() or 0,
        "row_ids": row_ids,
    }
