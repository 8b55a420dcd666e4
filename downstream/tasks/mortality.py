"""Death in hospital, told from what was written in the first hours of a stay (MIMIC-III tables).

The estimand: at `hours` after admission, of those who are alive and in hospital, who will leave it dead
(HOSPITAL_EXPIRE_FLAG)? Only notes that were there at that moment are read, never a discharge summary, over the same
window for both classes. `gap_hours` leaves out those whose stay ends so soon after that the answer was known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Literal

from pydantic import Field

from cluster import logs
from cluster.config import Place, Section
from cluster.errors import DataError
from downstream.tasks import mimic
from downstream.tasks.examples import Cohort, Example, Filter, filtered, show_filters
from downstream.tasks.mimic import Admission, Life
from sharding.clean import CleanConfig, clean

CLASSES = ("survived", "died")


class MortalityTask(Section):
    """`[task] name = "mortality"`: a folder with NOTEEVENTS, ADMISSIONS and PATIENTS."""

    name: Literal["mortality"] = "mortality"
    tables: Place = Field(description="folder or URL of the MIMIC-III tables")
    hours: float = Field(48, gt=0, description="after admission, when the question is asked")
    gap_hours: float = Field(0, ge=0, description="stays that end within so many hours after that are not asked about")
    min_age_years: float = Field(18, ge=0)

    def cohort(self, config: CleanConfig) -> Cohort:
        """Labelled texts, by patient and time. Raises DataError for tables that give none."""
        admissions = mimic.read_admissions(mimic.table_url(self.tables, "ADMISSIONS"))
        lives = mimic.read_lives(mimic.table_url(self.tables, "PATIENTS"))
        stays, filters = asked_about(admissions, lives, self.hours, self.gap_hours, self.min_age_years)
        asked = {stay.hadm: stay.admitted + timedelta(hours=self.hours) for stay in stays}
        notes = mimic.notes_until(mimic.table_url(self.tables, "NOTEEVENTS"), asked)
        examples = []
        for stay in stays:
            text = clean("\n\n".join(note.text for note in notes.get(stay.hadm, [])), config)
            if text.strip():
                examples.append(Example(stay.hadm, stay.subject, text, int(stay.died)))
        filters.append(filtered("no note by then", stays, [e.patient_id for e in examples]))
        show_filters(f"death in hospital, asked {self.hours:g} hours after admission", "admissions", filters)
        died = sum(example.label == 1 for example in examples)
        logs.say(
            f"{sum(one.died for one in admissions):,} of {len(admissions):,} admissions end in death; {died:,} of "
            f"{len(examples):,} of those asked about"
        )
        if not examples:
            raise DataError(f"{self.tables}: no admission has a note by then in NOTEEVENTS; check HADM_ID, task.hours")
        return Cohort(examples, CLASSES)


def asked_about(
    admissions: Iterable[Admission], lives: Mapping[str, Life], hours: float, gap_hours: float, min_age_years: float
) -> tuple[list[Admission], list[Filter]]:
    """The admissions whose patient is alive and in hospital at the hour, by patient and time, and how many each filter
    took.
    """
    rows = sorted(admissions, key=lambda a: (a.subject, a.admitted, a.discharged, a.hadm))
    filters = [filtered("all admissions", rows, [a.subject for a in rows])]

    def keep(name: str, wanted: Callable[[Admission], bool]) -> None:
        nonlocal rows
        left = [a for a in rows if wanted(a)]
        filters.append(filtered(name, rows, [a.subject for a in left]))
        rows = left

    keep("discharged before admitted", lambda a: a.discharged >= a.admitted)
    keep("organ donor records", lambda a: "ORGAN DONOR" not in a.diagnosis)
    keep("newborns", lambda a: a.kind != "NEWBORN")
    if min_age_years:
        if unborn := {a.subject for a in rows} - lives.keys():
            raise DataError(
                f"PATIENTS has no row for subject {min(unborn)} of ADMISSIONS; the tables differ in version"
            )
        oldest = timedelta(days=365.25 * min_age_years)
        keep(f"under {min_age_years:g} years", lambda a: a.admitted - lives[a.subject].born >= oldest)
    end = timedelta(hours=hours + gap_hours)
    keep("dead or out of hospital by then", lambda a: a.discharged - a.admitted > end)
    return rows, filters
