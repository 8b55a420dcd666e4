"""Work parts: what tasks make of one block each, on the way to its shards.

    block ──read_block──► part-00000.arrow (cleaned notes) ──count_words──► words of its training notes
                                                           └─write_shards──► train-00000.arrow, valid-…

A step's JSON is written after its files and makes them count; a step whose JSON is there with files of the
right size is not done again. Steps are pure functions of their arguments, so a task that died may simply run
again. Parts hold note text: they lie in OUTPUT/work, which is removed when the manifest is written.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import storage
from cluster.errors import StorageError
from sharding.clean import CleanConfig, clean
from sharding.dedup import text_digest
from sharding.readers import ReaderConfig
from sharding.schema import SPLITS, Block
from sharding.shards import TOKENIZER, write_shard
from sharding.splits import SplitConfig, split_of
from sharding.tokenizer import Tokenizer

# Notes encoded at a time: bounds the memory for their words.
ENCODED_NOTES = 1024

# How the names of work files begin.
NAMES = ("part-", "shards-", "read.json")

PART_SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("encounter_id", pa.string()),
        pa.field("category", pa.string()),
        pa.field("time", pa.string()),
        pa.field("n_bytes", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("digest", pa.binary(16), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)


def part_url(work: str, index: int) -> str:
    """Where the cleaned notes of a block lie."""
    return storage.join(work, f"part-{index:05d}.arrow")


def read_block(
    block: Block, reader: ReaderConfig, cleaning: CleanConfig, splits: SplitConfig, work: str
) -> dict[str, Any]:
    """Parses and cleans a block, gives each note its split, and writes the part. Returns its counts."""
    parsed = reader.parse(block)
    drops = Counter(parsed.drops)
    columns: list[list[Any]] = [[] for _ in PART_SCHEMA]
    for document in parsed.documents:
        text = clean(document.text, cleaning)
        if not text.strip():
            drops["empty"] += 1
            continue
        digest = text_digest(text)
        patient = digest.hex() if document.patient_id is None else document.patient_id
        row = (
            document.doc_id,
            patient,
            document.encounter_id,
            document.category,
            document.time,
            len(text.encode()),
            split_of(patient, splits),
            digest,
            text,
        )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, PART_SCHEMA, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PART_SCHEMA) as file:
        file.write_batch(pa.RecordBatch.from_arrays(arrays, schema=PART_SCHEMA))
    content = sink.getvalue()
    storage.write_bytes(part_url(work, block.index), content)
    counts = {
        "index": block.index,
        "rows": block.records,
        "notes": len(columns[0]),
        "drops": dict(sorted(drops.items())),
        "bytes_read": len(block.data),
        "stored_end": block.stored_end,
        "files": {part_url("", block.index).strip("/"): content.size},
    }
    storage.write_json(storage.join(work, f"part-{block.index:05d}.json"), counts)
    return counts


def done(work: str, step: str, index: int, folder: str) -> dict[str, Any] | None:
    """What the JSON of a step says, if its files lie in `folder` with the right sizes."""
    url = storage.join(work, f"{step}-{index:05d}.json")
    if not storage.exists(url):
        return None
    counts: dict[str, Any] = storage.read_json(url)
    for name, size in counts["files"].items():
        file = storage.join(folder, name)
        if not storage.exists(file) or storage.size_bytes(file) != size:
            return None
    return counts


def read_columns(work: str, index: int, names: Sequence[str]) -> pa.Table:
    """Columns of a part; nothing else of it is read."""
    fields = sorted(PART_SCHEMA.get_field_index(name) for name in names)
    with storage.reader(part_url(work, index), compression=None) as stream:
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        return pa.ipc.open_file(pa.PythonFile(stream, mode="r"), options=options).read_all()


def count_words(work: str, index: int, keep: np.ndarray) -> Counter[str]:
    """How often each word stands in the kept training notes of a part."""
    notes = read_columns(work, index, ["split", "text"])
    texts, splits = notes.column("text").to_pylist(), notes.column("split").to_pylist()
    words: Counter[str] = Counter()
    for text, split, kept in zip(texts, splits, keep, strict=True):
        if kept and split == "train":
            words.update(text.split())
    return words


def write_shards(output: str, work: str, index: int, keep: np.ndarray, model: ModelKey) -> dict[str, Any]:
    """Encodes the kept notes of a part and writes one shard for every split that has some."""
    tokenizer = _tokenizer(output, *model)
    notes = read_columns(work, index, PART_SCHEMA.names)
    splits = np.array(notes.column("split").to_pylist(), dtype=object)
    shards = {}
    for split in SPLITS:
        chosen = notes.filter(pa.array(keep & (splits == split), type=pa.bool_()))
        if not chosen.num_rows:
            continue
        texts = chosen.column("text").to_pylist()
        tokens = [
            ids
            for start in range(0, len(texts), ENCODED_NOTES)
            for ids in tokenizer.encode(texts[start : start + ENCODED_NOTES])
        ]
        name = f"{split}-{index:05d}.arrow"
        shards[split] = write_shard(storage.join(output, name), chosen, tokens, tokenizer)
    counts = {
        "index": index,
        "tokenizer": tokenizer.sha256,
        "shards": shards,
        "files": {shard["name"]: shard["size"] for shard in shards.values()},
    }
    storage.write_json(storage.join(work, f"shards-{index:05d}.json"), counts)
    return counts


# sha256 of the tokenizer's file, and whether notes get BOS and EOS.
ModelKey = tuple[str, bool, bool]


@functools.lru_cache(maxsize=1)
def _tokenizer(output: str, sha256: str, bos: bool, eos: bool) -> Tokenizer:
    """One tokenizer for a worker process: its word cache is warm from the second part on."""
    tokenizer = Tokenizer(storage.read_bytes(storage.join(output, TOKENIZER)), bos=bos, eos=eos)
    if tokenizer.sha256 != sha256:
        raise StorageError(f"{output}: {TOKENIZER} is another one on this machine; is {output} shared by all nodes?")
    return tokenizer
