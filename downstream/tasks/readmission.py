"""Unplanned readmission within 30 days, told from the discharge summary, or from the first notes (MIMIC-III tables).

    ADMISSIONS ─ label_admissions ─► index stays with labels ─┐
    PATIENTS (birth, death) ───────► minors, competing deaths ┤► examples, and a count at every filter
    NOTEEVENTS ─ by the setting ───► one text per stay ───────┘

Settings: `discharge`, the last summary; `early:48h`, all that was written in the first 48 hours of stays that last so
long (Huang et al.'s early notes go by calendar day, up to a day longer).

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

from cluster import logs
from cluster.config import Place, Section
from cluster.errors import DataError
from downstream.tasks import mimic
from downstream.tasks.examples import Cohort, Example, Filter, filtered, show_filters
from downstream.tasks.mimic import Admission, Life
from sharding.clean import CleanConfig, clean

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


class Stay(NamedTuple):
    """An index admission with its label. `discharged` is the end of the whole episode."""

    subject: str
    hadm: str
    admitted: datetime
    discharged: datetime
    label: int


class ReadmissionTask(Section):
    """`[task] name = "readmission"`: a folder with NOTEEVENTS, ADMISSIONS and PATIENTS."""

    name: Literal["readmission"] = "readmission"
    tables: Place = Field(description="folder or URL of the MIMIC-III tables")
    preset: Literal["clinicalbert", "default", "pyhealth15"] = "clinicalbert"
    setting: str = Field("discharge", pattern=r"^(discharge|early:[1-9]\d*h)$", description="or early:48h, early:72h")

    def cohort(self, config: CleanConfig) -> Cohort:
        """Labelled texts, by patient and time. Raises DataError for tables that give none."""
        admissions = mimic.read_admissions(mimic.table_url(self.tables, "ADMISSIONS"))
        lives = mimic.read_lives(mimic.table_url(self.tables, "PATIENTS"))
        rules = PRESETS[self.preset]
        stays, filters = label_admissions(admissions, lives, rules)
        notes = mimic.table_url(self.tables, "NOTEEVENTS")
        if self.setting == "discharge":
            missing = "discharge summary"
            texts = mimic.discharge_summaries(notes, {stay.hadm: stay.discharged for stay in stays})
        else:
            hours = timedelta(hours=int(self.setting[len("early:") : -1]))
            there = [stay for stay in stays if stay.discharged - stay.admitted >= hours]
            filters.append(filtered(f"shorter than {self.setting[6:-1]} hours", stays, [s.subject for s in there]))
            stays, missing = there, "note by then"
            read = mimic.notes_until(notes, {stay.hadm: stay.admitted + hours for stay in stays})
            texts = {hadm: "\n\n".join(note.text for note in kept) for hadm, kept in read.items()}
        examples = []
        for stay in stays:
            if (text := clean(texts.get(stay.hadm, ""), config)).strip():
                examples.append(Example(stay.hadm, stay.subject, text, stay.label))
        filters.append(filtered(f"no {missing}", stays, [e.patient_id for e in examples]))
        positives = sum(example.label == 1 for example in examples)
        what = f"readmission within {rules.window_days:g} days ({self.preset}, {self.setting})"
        show_filters(what, "admissions", filters)
        dead, negative = competing_deaths(stays, lives, rules.window_days)
        logs.say(
            f"{positives:,} of {len(examples):,} are readmitted; death follows {dead:,} of {len(stays):,} stays"
            f" within the window, {negative:,} without a readmission: these count as not readmitted"
        )
        if not examples:
            raise DataError(f"{self.tables}: no index admission has a {missing} in NOTEEVENTS; check HADM_ID")
        return Cohort(examples, CLASSES)


def label_admissions(
    admissions: Iterable[Admission], lives: Mapping[str, Life], rules: Rules
) -> tuple[list[Stay], list[Filter]]:
    """Index stays with labels, sorted by patient and time, and how many each filter took.

    A stay whose next admission begins before it ends (gap ≤ 0, a transfer) is the same episode: it is merged
    into the later one, which inherits the later end. ClinicalBERT's code calls such a pair a readmission.
    """
    rows = sorted(admissions, key=lambda a: (a.subject, a.admitted, a.discharged, a.hadm))
    filters = [filtered("all admissions", rows, [a.subject for a in rows])]

    def keep(name: str, wanted: Callable[[Admission], bool], among: list[Admission]) -> list[Admission]:
        left = [a for a in among if wanted(a)]
        filters.append(filtered(name, among, [a.subject for a in left]))
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
        Stay(a.subject, a.hadm, a.admitted, end_of[a.hadm],
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
