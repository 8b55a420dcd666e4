"""Readers: each turns one kind of input file into documents, in blocks that tasks read independently.

To add one, write a file with a Section that has `name`, `blocks` and `parse` (contract: `Reader`) and put it
into `ReaderConfig` and `READERS`. Contracts every reader keeps: where blocks begin depends on the file and
the block size only; a file gives the same documents in the same order for every block size; `doc_id` is
unique; every record of a block is a document or counted under a reason; no error shows text of a note.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from sharding.readers.csv_file import BLOCK_BYTES
from sharding.readers.csv_notes import CsvReader
from sharding.readers.mimic import MimicReader
from sharding.schema import Block, Document, Parsed


class Reader(Protocol):
    """What sharding asks of a reader."""

    def blocks(self, url: str, block_bytes: int) -> Iterator[Block]:
        """Cuts the file; runs in the driver, holds one block at a time."""
        ...

    def parse(self, block: Block) -> Parsed:
        """Reads a block; runs in a task."""
        ...


ReaderConfig = MimicReader | CsvReader

READERS: dict[str, type[MimicReader] | type[CsvReader]] = {
    "mimic": MimicReader,
    "csv": CsvReader,
}


def documents(url: str, config: ReaderConfig) -> Iterator[Document]:
    """The documents of a file in order, read in this process; what the reader drops is left out."""
    for block in config.blocks(url, BLOCK_BYTES):
        yield from config.parse(block).documents
