"""Notes in any CSV file with a header: the recipe names the columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from cluster.config import Section
from cluster.errors import DataError
from sharding.readers import csv_file
from sharding.schema import Block, Parsed, Run, in_order, notes_table


class Columns(Section):
    """Which column is what. Without `doc_id` a note is named by its row number (1 is the first of the input).

    Without `patient_id` equal texts count as one patient's, so that no text is in two splits.
    """

    text: str = Field(min_length=1)
    doc_id: str | None = None
    patient_id: str | None = None
    encounter_id: str | None = None
    category: str | None = None
    time: str | None = None

    def columns(self) -> dict[str, str]:
        """Field of a note → column that holds it."""
        fields = ("doc_id", "patient_id", "encounter_id", "category", "time", "text")
        return {field: column for field in fields if (column := getattr(self, field)) is not None}


class CsvReader(Columns):
    """Notes in CSV files with a header, plain or compressed; each key names a column."""

    name: Literal["csv"] = "csv"

    def blocks(self, url: str, block_bytes: int, run: Run = in_order) -> Iterator[Block]:
        """Record-aligned blocks of the file. Raises DataError where a column is missing."""
        return csv_file.blocks(url, self._names(), block_bytes, run)

    def parse(self, block: Block) -> Parsed:
        """The notes of a block; nothing is left out."""
        names = self._names()
        read = dict(zip(names, csv_file.parse(block, names), strict=True))
        fields = {field: read[column] for field, column in self.columns().items()}
        require(block, self, fields)
        text = fields.pop("text")
        rest = {field: blank_is_null(strings) for field, strings in fields.items()}
        return Parsed(notes_table(record=np.arange(len(text)), text=text, **rest), len(text), {})

    def _names(self) -> list[str]:
        return list(dict.fromkeys(self.columns().values()))


def require(block: Block, named: Columns, fields: dict[str, pa.Array]) -> None:
    """Raises DataError where a note has a column for its name or patient and nothing in it."""
    for field in ("doc_id", "patient_id"):
        if field in fields and (missing := pc.index(fields[field], "").as_py()) >= 0:
            where = csv_file.place(block, missing + 1)
            raise DataError(f"{block.url}: {where}: empty {named.columns()[field]}; every note needs one")


def blank_is_null(strings: pa.Array) -> pa.Array:
    """Without blanks around, and null where nothing is left."""
    trimmed = pc.utf8_trim_whitespace(strings)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
