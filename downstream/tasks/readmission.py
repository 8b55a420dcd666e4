"""Unplanned readmission within 30 days, told from the discharge summary (MIMIC-III tables).

    ADMISSIONS ─ label_admissions ─► index stays with labels ─┐
    PATIENTS (birth, death) ───────► minors, competing deaths ┤► examples, and a count at every filter
    NOTEEVENTS ─ last summary ─────► one text per stay ───────┘

The estimand, as in Huang et al. 2019 (arXiv:1904.05342): an admission that ends alive is positive when the
patient's next emergency or urgent admission begins 0 < gap < 30 days after discharge; elective ones in
between are skipped. What the tables cannot say is stated: MIMIC holds intensive-care patients only, has no
end of follow-up (a last admission counts as not readmitted), and a death at home inside the window is a
negative whose number is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from pydantic import Field

from cluster import logs, storage
from cluster.config import Place, Section
from cluster.errors import DataError
from downstream.tasks.examples import Cohort, Example, Filter, show_filters
from sharding.clean import CleanConfig, clean
from sharding.readers import csv_file

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
CLASSES = ("not readmitted", "readmitted")


class Rules(NamedTuple):
    """Which stays are asked about, and which later admission answers."""

    window_days: float = 30
    drop_deaths: bool = True
    min_age_years: float = 0
    drop_organ_donors: bool = False  # MIMIC books the organ donation after a death as an admission of its own
    elective_counts: bool = False  # whether an elective admission, too, is a readmission
    needs_next: bool = False  # PyHealth asks only about stays that have a later one: it selects on the future


PRESETS = {
    "clinicalbert": Rules(),
    "default": Rules(min_age_years=18, drop_organ_donors=True),
    "pyhealth15": Rules(window_days=15, drop_deaths=False, min_age_years=18, elective_counts=True, needs_next=True),
}


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


class Stay(NamedTuple):
    """An index admission with its label. `discharged` is the end of the whole episode."""

    subject: str
    hadm: str
    discharged: datetime
    label: int


class ReadmissionTask(Section):
    """`[task] name = "readmission"`: a folder with NOTEEVENTS, ADMISSIONS and PATIENTS."""

    name: Literal["readmission"] = "readmission"
    tables: Place = Field(description="folder or URL of the MIMIC-III tables")
    preset: Literal["clinicalbert", "default", "pyhealth15"] = "clinicalbert"

    def cohort(self, config: CleanConfig) -> Cohort:
        """Labelled discharge summaries, by patient and time. Raises DataError for tables that give none."""
        admissions = read_admissions(table_url(self.tables, "ADMISSIONS"))
        lives = read_lives(table_url(self.tables, "PATIENTS"))
        rules = PRESETS[self.preset]
        stays, filters = label_admissions(admissions, lives, rules)
        texts = discharge_summaries(table_url(self.tables, "NOTEEVENTS"), stays)
        examples = []
        for stay in stays:
            if (text := clean(texts.get(stay.hadm, ""), config)).strip():
                examples.append(Example(stay.hadm, stay.subject, text, stay.label))
        filters.append(_filter("no discharge summary", stays, [e.patient_id for e in examples]))
        positives = sum(example.label for example in examples)
        show_filters(f"readmission within {rules.window_days:g} days ({self.preset})", "admissions", filters)
        dead, negative = competing_deaths(stays, lives, rules.window_days)
        logs.say(
            f"{positives:,} of {len(examples):,} are readmitted; death follows {dead:,} of {len(stays):,} stays"
            f" within the window, {negative:,} without a readmission: these count as not readmitted"
        )
        if not examples:
            raise DataError(f"{self.tables}: no index admission has a discharge summary in NOTEEVENTS; check HADM_ID")
        return Cohort(examples, CLASSES)


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
            start = _time(admitted, url, "ADMITTIME", hadm)
            end = _time(discharged, url, "DISCHTIME", hadm)
            died = expired == "1" or death != ""
            found.append(Admission(subject, hadm, start, end, died, kind.upper(), diagnosis.upper()))
    if not found:
        raise DataError(f"{url}: no admissions; the table is empty")
    return found


def read_lives(url: str) -> dict[str, Life]:
    """Birth and death by SUBJECT_ID, from PATIENTS."""
    return {
        subject: Life(_time(born, url, "DOB", subject), _time(died, url, "DOD", subject) if died else None)
        for subject, born, died in csv_file.rows(url, ["SUBJECT_ID", "DOB", "DOD"])
    }


def _time(text: str, url: str, column: str, row: str) -> datetime:
    try:
        return datetime.strptime(text, TIME_FORMAT)
    except ValueError:
        raise DataError(f"{url}: {column} of {row} is not a time like 2150-01-31 08:00:00") from None


def label_admissions(
    admissions: Iterable[Admission], lives: Mapping[str, Life], rules: Rules
) -> tuple[list[Stay], list[Filter]]:
    """Index stays with labels, sorted by patient and time, and how many each filter took.

    A stay whose next admission begins before it ends (gap ≤ 0, a transfer) is the same episode: it is merged
    into the later one, which inherits the later end. ClinicalBERT's code calls such a pair a readmission.
    """
    rows = sorted(admissions, key=lambda a: (a.subject, a.admitted, a.discharged, a.hadm))
    filters = [_filter("all admissions", rows, [a.subject for a in rows])]

    def keep(name: str, wanted: Callable[[Admission], bool], among: list[Admission]) -> list[Admission]:
        left = [a for a in among if wanted(a)]
        filters.append(_filter(name, among, [a.subject for a in left]))
        return left

    rows = keep("discharged before admitted", lambda a: a.discharged >= a.admitted, rows)
    if rules.drop_organ_donors:
        rows = keep("organ donor records", lambda a: "ORGAN DONOR" not in a.diagnosis, rows)
    next_of, end_of = _episodes(rows, rules)
    index = keep("newborns", lambda a: a.kind != "NEWBORN", rows)
    if rules.drop_deaths:
        index = keep("died in hospital", lambda a: not a.died, index)
    if rules.min_age_years:
        unborn = {a.subject for a in index} - lives.keys()
        if unborn:
            raise DataError(
                f"PATIENTS has no row for subject {min(unborn)} of ADMISSIONS; the tables differ in version"
            )
        oldest = timedelta(days=365.25 * rules.min_age_years)
        index = keep(
            f"under {rules.min_age_years:g} years",
            lambda a: a.admitted - lives[a.subject].born >= oldest,
            index,
        )
    index = keep("goes on in an overlapping stay", lambda a: a.hadm in end_of, index)
    if rules.needs_next:
        index = keep("no later admission", lambda a: a.hadm in next_of, index)
    window = timedelta(days=rules.window_days)
    return [
        Stay(a.subject, a.hadm, end_of[a.hadm],
             int(a.hadm in next_of and next_of[a.hadm] - end_of[a.hadm] < window))
        for a in index
    ], filters  # fmt: skip


def _episodes(rows: Sequence[Admission], rules: Rules) -> tuple[dict[str, datetime], dict[str, datetime]]:
    """(start of the next admission that counts, end of the episode) by HADM_ID, from sorted rows.

    An admission that is merged into a later one is in neither.
    """
    kinds = ("EMERGENCY", "URGENT", "ELECTIVE") if rules.elective_counts else ("EMERGENCY", "URGENT")
    next_of: dict[str, datetime] = {}
    end_of = {a.hadm: a.discharged for a in rows}
    for position, stay in enumerate(rows):
        for later in rows[position + 1 :]:
            if later.subject != stay.subject:
                break
            if later.kind not in kinds:
                continue
            if later.admitted <= end_of[stay.hadm]:
                end_of[later.hadm] = max(end_of[later.hadm], end_of.pop(stay.hadm))
            else:
                next_of[stay.hadm] = later.admitted
            break
    return next_of, end_of


def _filter(name: str, before: Sequence[object], patients: Sequence[str]) -> Filter:
    return Filter(name, len(before) - len(patients), len(patients), len(set(patients)))


def competing_deaths(stays: Sequence[Stay], lives: Mapping[str, Life], window_days: float) -> tuple[int, int]:
    """(stays followed by death within the window, those of them that were not readmitted before it).

    Dates of death have no hour, so whole days count.
    """
    dying = []
    for stay in stays:
        died = lives[stay.subject].died if stay.subject in lives else None
        if died and (died.date() - stay.discharged.date()).days < window_days:
            dying.append(stay)
    return len(dying), sum(not stay.label for stay in dying)


def discharge_summaries(url: str, stays: Sequence[Stay]) -> dict[str, str]:
    """The summaries by HADM_ID: the last Report of a stay by (CHARTDATE, ROW_ID), then its addenda.

    Addenda dated later than a day after discharge are left out: they may know of the readmission. Notes that
    the hospital marked as errors (ISERROR = 1) are skipped. One pass; only the texts of these stays are held.
    """
    last_day = {stay.hadm: (stay.discharged + timedelta(days=1)).date().isoformat() for stay in stays}
    reports: dict[str, tuple[tuple[str, int], str]] = {}
    addenda: dict[str, list[tuple[tuple[str, int], str]]] = {}
    columns = ["HADM_ID", "CATEGORY", "ISERROR", "DESCRIPTION", "CHARTDATE", "ROW_ID", "TEXT"]
    for hadm, category, error, description, day, row, text in csv_file.rows(url, columns):
        if hadm not in last_day or category.strip().lower() != "discharge summary" or error == "1":
            continue
        if not row.isdigit():
            raise DataError(f"{url}: ROW_ID of a note of HADM_ID {hadm} is not a number; check the table's columns")
        note = ((day[:10], int(row)), text)
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
