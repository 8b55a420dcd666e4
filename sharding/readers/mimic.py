"""NOTEEVENTS.csv of MIMIC-III (v1.4 and its demo): one CSV file of notes of patients.

Facts the code relies on: headers are in upper case (demo: lower case); CATEGORY has trailing blanks
('Nutrition '); ISERROR is '1' where a physician marked the note as wrong, else empty; HADM_ID is empty for
outpatients (about 11%); CHARTTIME is always empty for discharge summaries, ECG and echo reports, CHARTDATE
never.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from cluster.config import Section
from cluster.errors import DataError
from sharding.readers import csv_file
from sharding.schema import Block, Document, Parsed

COLUMNS = ("ROW_ID", "SUBJECT_ID", "HADM_ID", "CHARTDATE", "CHARTTIME", "CATEGORY", "ISERROR", "TEXT")


class MimicReader(Section):
    """`categories` keeps only these note types ("Discharge summary", …); empty keeps all."""

    name: Literal["mimic"] = "mimic"
    categories: tuple[str, ...] = ()

    def blocks(self, url: str, block_bytes: int) -> Iterator[Block]:
        """Record-aligned blocks of NOTEEVENTS. Raises DataError where a column is missing."""
        return csv_file.blocks(url, COLUMNS, block_bytes)

    def parse(self, block: Block) -> Parsed:
        """The notes of a block; dropped are notes marked as wrong and categories that are not wanted."""
        documents: list[Document] = []
        drops: Counter[str] = Counter()
        rows = zip(*csv_file.parse(block, COLUMNS), strict=True)
        for record, (doc, patient, stay, date, time, category, error, text) in enumerate(rows, block.first_record):
            category = category.strip()
            if not doc or not patient:
                raise DataError(f"{block.url}: record {record}: empty {'ROW_ID' if not doc else 'SUBJECT_ID'}")
            if error.strip() == "1":
                drops["iserror"] += 1
            elif self.categories and category not in self.categories:
                drops["category"] += 1
            else:
                documents.append(Document(doc, patient, stay or None, category or None, time or date or None, text))
        return Parsed(documents, dict(drops))
