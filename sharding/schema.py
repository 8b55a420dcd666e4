"""What a note is on its way through sharding, and what a shard holds.

    file ──Reader.blocks──► Block ──Reader.parse──► Parsed (a table of notes) ──► … ──► shard

A block is what one task reads. A shard is an Arrow IPC file of one record batch whose rows are notes; the values
buffer of its `tokens` column is the training stream. Times are kept as the text of the source
(`2101-10-20 12:33:00`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

# Part of every plan: raise it when the same recipe would give other bytes; no run then resumes half of each.
FORMAT_VERSION = 3

SPLITS = ("train", "valid", "test")

# 16 bits name this many tokens.
UINT16_TOKENS = 1 << 16

# What a reader makes of its records. `record` counts the records of the block from 0, those left out included.
# `doc_id` null: the note is named by the number of its record in the whole input. `patient_id` null: the source
# knows no patients; equal texts are then taken to be one patient's. `text` is the text of the source, uncleaned.
NOTES_SCHEMA = pa.schema(
    [
        pa.field("record", pa.int64(), nullable=False),
        pa.field("doc_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("encounter_id", pa.string()),
        pa.field("category", pa.string()),
        pa.field("time", pa.string()),
        pa.field("text", pa.string(), nullable=False),
    ]
)

# Runs a task for every item and gives the results in the order of the items: in this process or over a cluster.
Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], list[Any]]


def in_order(task: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The `Run` of one process."""
    return [task(*item) for item in items]


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of an input file that holds whole records: what one task reads.

    Where blocks begin depends on the (decompressed) file and the block size only, not on who reads them.
    """

    url: str
    start: int  # byte of the decompressed file, or row group, at which it begins
    end: int  # … and before which it ends
    header: tuple[str, ...]  # what a task must know of the beginning of the file, such as the names of the columns
    data: np.ndarray | None  # its bytes (uint8) where only one process can read the file; None: the task reads them
    stored_end: int  # how far the stored (perhaps compressed) file has been read: for progress only


@dataclass(frozen=True, slots=True)
class Parsed:
    """The notes of a block (NOTES_SCHEMA), how many records it had, and how many were left out, by reason."""

    notes: pa.Table
    records: int
    drops: dict[str, int]


def notes_table(**columns: Any) -> pa.Table:
    """A table of NOTES_SCHEMA; each column is a list or an Arrow array, columns not given are null."""
    rows = len(columns["text"])
    given = {
        name: column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        for name, column in columns.items()
    }
    arrays = [
        pa.nulls(rows, field.type)
        if given.get(field.name) is None
        else given[field.name].cast(field.type)
        if isinstance(given[field.name], pa.Array)
        else pa.array(given[field.name], field.type)
        for field in NOTES_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=NOTES_SCHEMA)


def token_dtype(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """uint16 where it can name every token, else uint32."""
    return np.dtype(np.uint16) if vocab_size <= UINT16_TOKENS else np.dtype(np.uint32)


def shard_schema(dtype: np.dtype[np.generic]) -> pa.Schema:
    """Columns of a shard whose tokens are `dtype`. `n_bytes` counts the UTF-8 bytes of the cleaned text."""
    tokens = pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False))
    return pa.schema(
        [
            pa.field("doc_id", pa.string(), nullable=False),
            pa.field("patient_id", pa.string(), nullable=False),
            pa.field("encounter_id", pa.string()),
            pa.field("category", pa.string()),
            pa.field("time", pa.string()),
            pa.field("n_bytes", pa.int64(), nullable=False),
            pa.field("tokens", tokens, nullable=False),
        ]
    )
