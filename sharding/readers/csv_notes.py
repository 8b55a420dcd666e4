"""Notes in any CSV file with a header: the recipe names the columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from cluster.config import Section
from cluster.errors import DataError
from sharding.readers import csv_file
from sharding.schema import Block, Document, Parsed


class CsvReader(Section):
    """Notes in a CSV file with a header; each key names a column.

    Without `doc_id` a note is named by its row number (1 is the first after the header). Without `patient_id`
    equal texts count as one patient's, so that no text is in two splits.
    """

    name: Literal["csv"] = "csv"
    text: str = Field(min_length=1)
    doc_id: str | None = None
    patient_id: str | None = None
    encounter_id: str | None = None
    category: str | None = None
    time: str | None = None

    def blocks(self, url: str, block_bytes: int) -> Iterator[Block]:
        """Record-aligned blocks of the file. Raises DataError where a column is missing."""
        return csv_file.blocks(url, self._columns(), block_bytes)

    def parse(self, block: Block) -> Parsed:
        """The notes of a block; nothing is left out."""
        columns = self._columns()
        fields = dict(zip(columns, csv_file.parse(block, columns), strict=True))
        absent: list[str] = [""] * block.records

        def values(column: str | None) -> list[str]:
            return absent if column is None else fields[column]

        documents = []
        rows = zip(
            values(self.doc_id),
            values(self.patient_id),
            values(self.encounter_id),
            values(self.category),
            values(self.time),
            fields[self.text],
            strict=True,
        )
        for record, (doc, patient, encounter, category, time, text) in enumerate(rows, block.first_record):
            if (self.doc_id and not doc) or (self.patient_id and not patient):
                raise DataError(f"{block.url}: record {record}: empty {self.doc_id if not doc else self.patient_id}")
            category = category.strip()
            documents.append(
                Document(
                    doc or str(record),
                    patient or None,
                    encounter or None,
                    category or None,
                    time or None,
                    text,
                )
            )
        return Parsed(documents, {})

    def _columns(self) -> list[str]:
        named = (self.doc_id, self.patient_id, self.encounter_id, self.category, self.time, self.text)
        return list(dict.fromkeys(column for column in named if column is not None))
