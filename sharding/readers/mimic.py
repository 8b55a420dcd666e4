"""NOTEEVENTS.csv of MIMIC-III (v1.4 and its demo): one CSV file of notes of patients.

Facts the code relies on: headers are in upper case (demo: lower case); CATEGORY has trailing blanks
('Nutrition '); ISERROR is '1' where a physician marked the note as wrong, else empty; HADM_ID is empty for
outpatients (about 11%); CHARTTIME is always empty for discharge summaries, ECG and echo reports, CHARTDATE
never.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.config import Section
from sharding.readers import csv_file
from sharding.readers.csv_notes import Columns, blank_is_null, require
from sharding.schema import Block, Parsed, Run, in_order, notes_table

COLUMNS = ("ROW_ID", "SUBJECT_ID", "HADM_ID", "CHARTDATE", "CHARTTIME", "CATEGORY", "ISERROR", "TEXT")

# Notes per category of MIMIC-III v1.4, those marked as wrong included; they add up to the published 2,083,180 rows
# (MIT-LCP/mimic-code, checks of the database builds).
PUBLISHED_NOTES = {
    "Nursing/other": 822_497,
    "Radiology": 522_279,
    "Nursing": 223_556,
    "ECG": 209_051,
    "Physician": 141_624,
    "Discharge summary": 59_652,
    "Echo": 45_794,
    "Respiratory": 31_739,
    "Nutrition": 9_418,
    "General": 8_301,
    "Rehab Services": 5_431,
    "Social Work": 2_670,
    "Case Management": 967,
    "Pharmacy": 103,
    "Consult": 98,
}


class MimicReader(Section):
    """`categories` keeps only these note types ("Discharge summary", …); empty keeps all."""

    name: Literal["mimic"] = "mimic"
    categories: tuple[str, ...] = ()

    def blocks(self, url: str, block_bytes: int, run: Run = in_order) -> Iterator[Block]:
        """Record-aligned blocks of NOTEEVENTS. Raises DataError where a column is missing."""
        return csv_file.blocks(url, COLUMNS, block_bytes, run)

    def parse(self, block: Block) -> Parsed:
        """The notes of a block; dropped are notes marked as wrong and categories that are not wanted."""
        doc, patient, stay, date, time, category, error, text = csv_file.parse(block, COLUMNS)
        named = Columns(doc_id="ROW_ID", patient_id="SUBJECT_ID", text="TEXT")
        require(block, named, {"doc_id": doc, "patient_id": patient})
        time, category = blank_is_null(time), blank_is_null(category)
        notes = notes_table(
            record=np.arange(len(text)),
            doc_id=doc,
            patient_id=patient,
            encounter_id=blank_is_null(stay),
            category=category,
            time=pc.if_else(pc.is_null(time), blank_is_null(date), time),
            text=text,
        )
        wrong = pc.equal(pc.utf8_trim_whitespace(error), "1")
        drops = {"iserror": pc.sum(wrong).as_py() or 0}
        keep = pc.invert(wrong)
        if self.categories:
            wanted = pc.is_in(category, pa.array(self.categories, pa.string()))
            drops["category"] = pc.sum(pc.and_(keep, pc.invert(wanted))).as_py() or 0
            keep = pc.and_(keep, wanted)
        return Parsed(notes.filter(keep), len(text), drops)
