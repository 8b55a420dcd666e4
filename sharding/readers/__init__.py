"""Readers: each turns one kind of input file into notes, in blocks that tasks read independently.

To add one, write a file with a Section that has `name`, `blocks` and `parse` (contract: `Reader`) and put it
into `ReaderConfig` and `READERS`. Contracts every reader keeps: where blocks begin depends on the file and
the block size only; a file gives the same notes in the same order for every block size; `doc_id` is
unique or null; every record of a block is a note or counted under a reason; no error shows text of a note.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from sharding.readers.csv_notes import CsvReader
from sharding.readers.jsonl import JsonlReader
from sharding.readers.mimic import MimicReader
from sharding.readers.parquet import ParquetReader
from sharding.readers.ranges import BLOCK_BYTES
from sharding.readers.wikipedia import WikipediaReader
from sharding.schema import Block, Parsed, Run, in_order


class Reader(Protocol):
    """What sharding asks of a reader."""

    def blocks(self, url: str, block_bytes: int, run: Run = in_order) -> Iterator[Block]:
        """Cuts one file, in the driver. Where the file can be read from any place, blocks carry no bytes, and
        what has to be looked at to cut it goes through `run`; else they do, and come one at a time."""
        ...

    def parse(self, block: Block) -> Parsed:
        """Reads a block; runs in a task."""
        ...


ReaderConfig = MimicReader | CsvReader | JsonlReader | ParquetReader | WikipediaReader

READERS: dict[str, type[Any]] = {
    "mimic": MimicReader,
    "csv": CsvReader,
    "jsonl": JsonlReader,
    "parquet": ParquetReader,
    "wikipedia": WikipediaReader,
}


def documents(url: str, config: ReaderConfig) -> Iterator[dict[str, Any]]:
    """The notes of a file in order as dicts of NOTES_SCHEMA, read in this process; `record` counts over the file."""
    before = 0
    for block in config.blocks(url, BLOCK_BYTES):
        parsed = config.parse(block)
        for note in parsed.notes.to_pylist():
            yield note | {"record": before + note["record"]}
        before += parsed.records
