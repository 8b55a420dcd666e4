"""MIMIC-III's tables as far as tasks read them: admissions, lives, and the notes of a stay up to a moment.

Headers may be upper or lower case. Notes that the hospital marked as errors (ISERROR = 1) and notes without HADM_ID
are never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from cluster import storage
from cluster.errors import DataError
from sharding.readers import csv_file

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class Admission(NamedTuple):
    """A row of ADMISSIONS."""

    subject: str
    hadm: str
    admitted: datetime
    discharged: datetime
    died: bool
    kind: str
    diagnosis: str


class Life(NamedTuple):
    """Birth and death of a patient; MIMIC puts the birth of people over 89 some 300 years back."""

    born: datetime
    died: datetime | None


def table_url(folder: str, table: str) -> str:
    """URL of a table: `NOTEEVENTS.csv`, `noteevents.csv.gz`, … Raises DataError where it is not there."""
    found = [
        name for name in storage.names(folder) if name.lower() in (f"{table.lower()}.csv", f"{table.lower()}.csv.gz")
    ]
    if len(found) != 1:
        what = f"{' and '.join(found)} are both there; keep one" if found else "it is not there; check task.tables"
        raise DataError(f"{folder}: {table}.csv or {table}.csv.gz is needed: {what}")
    return storage.join(folder, found[0])


def read_admissions(url: str) -> list[Admission]:
    """The rows of ADMISSIONS. A stay without a discharge time has not ended and is not returned."""
    columns = ["SUBJECT_ID", "HADM_ID", "ADMITTIME", "DISCHTIME", "DEATHTIME", "ADMISSION_TYPE",
               "HOSPITAL_EXPIRE_FLAG", "DIAGNOSIS"]  # fmt: skip
    found = []
    for subject, hadm, admitted, discharged, death, kind, expired, diagnosis in csv_file.rows(url, columns):
        if discharged:
            start = parse_time(admitted, url, "ADMITTIME", hadm)
            end = parse_time(discharged, url, "DISCHTIME", hadm)
            died = expired == "1" or death != ""
            found.append(Admission(subject, hadm, start, end, died, kind.upper(), diagnosis.upper()))
    if not found:
        raise DataError(f"{url}: no admissions; the table is empty")
    return found


def read_lives(url: str) -> dict[str, Life]:
    """Birth and death by SUBJECT_ID, from PATIENTS."""
    return {
        subject: Life(parse_time(born, url, "DOB", subject), parse_time(died, url, "DOD", subject) if died else None)
        for subject, born, died in csv_file.rows(url, ["SUBJECT_ID", "DOB", "DOD"])
    }


def parse_time(text: str, url: str, column: str, row: str) -> datetime:
    """A time of MIMIC's. Raises DataError that names table, column and row."""
    try:
        return datetime.strptime(text, TIME_FORMAT)
    except ValueError:
        raise DataError(f"{url}: {column} of {row} is not a time like 2150-01-31 08:00:00") from None


def discharge_summaries(url: str, discharged: Mapping[str, datetime]) -> dict[str, str]:
    """The summaries by HADM_ID of stays that end then: the last Report by (CHARTDATE, ROW_ID), then its addenda.

    Addenda dated later than a day after discharge are left out: they may know of the readmission. One pass; only the
    texts of these stays are held.
    """
    last_day = {hadm: (end + timedelta(days=1)).date().isoformat() for hadm, end in discharged.items()}
    reports: dict[str, tuple[tuple[str, int], str]] = {}
    addenda: dict[str, list[tuple[tuple[str, int], str]]] = {}
    columns = ["HADM_ID", "CATEGORY", "ISERROR", "DESCRIPTION", "CHARTDATE", "ROW_ID", "TEXT"]
    for hadm, category, error, description, day, row, text in csv_file.rows(url, columns):
        if hadm not in last_day or category.strip().lower() != "discharge summary" or error == "1":
            continue
        note = ((day[:10], _number(row, url, hadm)), text)
        if description.strip().lower() == "addendum":
            if day[:10] <= last_day[hadm]:
                addenda.setdefault(hadm, []).append(note)
        elif hadm not in reports or note[0] > reports[hadm][0]:
            reports[hadm] = note
    texts = {}
    for hadm, (_, report) in reports.items():
        parts = [report, *(text for _, text in sorted(addenda.get(hadm, [])))]
        texts[hadm] = "\n\n".join(dict.fromkeys(parts))  # an addendum filed twice is read once
    return texts


class Note(NamedTuple):
    """A note of a stay. `known` is the moment from which it is certain to have been there."""

    known: datetime
    row: int
    text: str


def notes_until(url: str, until: Mapping[str, datetime]) -> dict[str, list[Note]]:
    """By HADM_ID, in the order of time, the notes that were there at a moment; never a discharge summary.

    A note without CHARTTIME counts from the end of its CHARTDATE on: at what hour of the day it was written is not
    known. A text that was filed twice is read once.
    """
    found: dict[str, list[Note]] = {}
    for hadm, note in _notes(url, until):
        if note.known <= until[hadm]:
            found.setdefault(hadm, []).append(note)
    for hadm, notes in found.items():
        first: dict[str, Note] = {}
        for note in sorted(notes):
            first.setdefault(note.text, note)
        found[hadm] = list(first.values())
    return found


def _notes(url: str, wanted: Mapping[str, datetime]) -> Iterator[tuple[str, Note]]:
    columns = ["HADM_ID", "CATEGORY", "ISERROR", "CHARTDATE", "CHARTTIME", "ROW_ID", "TEXT"]
    for hadm, category, error, day, moment, row, text in csv_file.rows(url, columns):
        if hadm not in wanted or category.strip().lower() == "discharge summary" or error == "1":
            continue
        if moment:
            known = parse_time(moment, url, "CHARTTIME", row)
        else:
            known = parse_time(f"{day[:10]} 00:00:00", url, "CHARTDATE", row) + timedelta(days=1)
        yield hadm, Note(known, _number(row, url, hadm), text)


def _number(row: str, url: str, hadm: str) -> int:
    if not row.isdigit():
        raise DataError(f"{url}: ROW_ID of a note of HADM_ID {hadm} is not a number; check the table's columns")
    return int(row)
