"""What a note is on its way through sharding, and what a shard holds.

A reader yields `Document`s; a shard is an Arrow IPC file of one record batch whose rows are notes. The values
buffer of its `tokens` column is the training stream. Times are kept as the text of the source
(`2101-10-20 12:33:00`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

# Part of every plan: raise it when the same recipe would give other bytes; no run then resumes half of each.
FORMAT_VERSION = 1

SPLITS = ("train", "valid", "test")

# 16 bits name this many tokens.
UINT16_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class Document:
    """One note as a reader gives it; `text` is the text of the source, uncleaned.

    `patient_id` None says that the source knows no patients: equal texts are then taken to be one patient's.
    """

    doc_id: str
    patient_id: str | None
    encounter_id: str | None
    category: str | None
    time: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of an input file that holds whole records: what one task reads.

    Where blocks begin depends on the (decompressed) file and the block size only, not on who reads them.
    """

    url: str
    index: int
    offset: int  # byte of the decompressed file at which `data` begins
    first_record: int  # number of the first record; 1 is the first of the file
    records: int
    columns: tuple[str, ...]  # names of the fields of a record, in order
    data: bytes
    stored_end: int  # how far the stored (perhaps compressed) file has been read: for progress only


@dataclass(frozen=True, slots=True)
class Parsed:
    """The documents of a block, and how many of its records were left out, by reason."""

    documents: list[Document]
    drops: dict[str, int]


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
