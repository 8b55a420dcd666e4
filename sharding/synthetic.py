"""A synthetic hospital in the file format of MIMIC-III v1.4, for demos, tests and benchmarks.

    (seed, index) ──► Patient: latent dials, stays, outcomes ──► notes: filled templates ──► four tables

A patient is a pure function of (seed, index): a hospital of 20 patients is the beginning of the one of 40
with the same seed. Patients are made and written one after the other: memory does not grow with their number.

Outcomes are drawn from latent dials (frailty, isolation, neglect, burden, instability, visits, acuity). The
notes show the same dials through noisy sentences, so that unplanned readmission can be read from a discharge
summary, and death in hospital from the early notes, better than by chance and never surely.

The file is long because a believable archive has many kinds of flaws; the words are in synthetic_notes.py.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import BinaryIO, NamedTuple, TypeVar, cast

from pydantic import Field

from cluster import config, logs, storage
from cluster.config import Place, Section
from cluster.errors import DataError
from sharding import synthetic_notes as words

# On these notes level 6 is 8% smaller and 1.7 times slower (measured: 79 and 47 MB/s).
GZIP_LEVEL = 4
# How far a sentence may stray from its dial (1 = as much as patients differ). Set so that a bag of words of
# 240 patients reaches an AUROC of about 0.8 where the latent risk itself reaches about 0.88.
SENTENCE_NOISE = 0.55
READMISSION_DAYS = 30
# Log odds of an outcome: intercept, and weight of each dial. Set to give 7% deaths and 21% readmissions.
MORTALITY = (-4.0, {"acuity": 1.6, "frailty": 0.6, "burden": 0.4})
READMISSION = (
    -2.4,
    {"frailty": 0.55, "isolation": 0.55, "neglect": 0.55, "burden": 0.35, "instability": 0.85, "visits": 0.3},
)
MAX_STAYS = 10

TABLES: dict[str, str] = {
    "NOTEEVENTS": "ROW_ID SUBJECT_ID HADM_ID CHARTDATE CHARTTIME STORETIME CATEGORY DESCRIPTION CGID ISERROR TEXT",
    "ADMISSIONS": "ROW_ID SUBJECT_ID HADM_ID ADMITTIME DISCHTIME DEATHTIME ADMISSION_TYPE ADMISSION_LOCATION"
    " DISCHARGE_LOCATION INSURANCE LANGUAGE RELIGION MARITAL_STATUS ETHNICITY EDREGTIME EDOUTTIME DIAGNOSIS"
    " HOSPITAL_EXPIRE_FLAG HAS_CHARTEVENTS_DATA",
    "PATIENTS": "ROW_ID SUBJECT_ID GENDER DOB DOD DOD_HOSP DOD_SSN EXPIRE_FLAG",
    "DIAGNOSES_ICD": "ROW_ID SUBJECT_ID HADM_ID SEQ_NUM ICD9_CODE",
}
Cell = str | int | date | None  # datetime is a date
T = TypeVar("T")


class HospitalRecipe(Section):
    """The synthetic hospital to write: where, how many patients, which seed."""

    out: Place = Field(min_length=1)
    patients: int = Field(default=400, ge=1)
    seed: int = 1


@dataclass(frozen=True)
class Stay:
    """One admission. The risks are the probabilities its outcomes were drawn with; no table shows them."""

    admit: datetime
    discharge: datetime
    kind: str  # ADMISSION_TYPE
    problem: str  # key of PROBLEMS; "NEWBORN" for a newborn
    dials: dict[str, float]
    died: bool
    mortality_risk: float
    readmission_risk: float

    @property
    def is_index(self) -> bool:
        """Whether readmission is asked of it: neither a newborn nor a death."""
        return self.kind != "NEWBORN" and not self.died


@dataclass(frozen=True)
class Patient:
    """What is true of a patient, before any of it is written down."""

    sex: str
    birth: datetime
    conditions: tuple[str, ...]
    stays: tuple[Stay, ...]
    death: datetime | None

    def is_readmitted(self, stay: Stay) -> bool:
        """Whether the first later unplanned admission comes within 30 days of the discharge."""
        later = (s.admit for s in self.stays if s.admit > stay.discharge and s.kind in ("EMERGENCY", "URGENT"))
        following = next(later, None)
        return following is not None and following - stay.discharge < timedelta(days=READMISSION_DAYS)


class Note(NamedTuple):
    """A row of NOTEEVENTS without its keys; `stay` is None for an outpatient note."""

    stay: int | None
    day: date
    time: datetime | None
    category: str
    description: str
    text: str
    is_error: bool = False


def derived(seed: int, name: str, index: int) -> random.Random:
    """The random numbers of (seed, name, index), the same in every process and Python."""
    digest = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest))


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    # Not Random.choice: only random() itself is promised to stay the same in later Pythons.
    return options[int(rng.random() * len(options))]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


# Patients and stays


def patient(seed: int, index: int) -> Patient:
    """Patient number `index` of the hospital `seed`: one in seventeen is a newborn, the others are adults."""
    rng = derived(seed, "patient", index)
    sex = "M" if rng.random() < 0.53 else "F"
    start = _minute(datetime(2101, 1, 1), rng.random() * 80 * 365 * 24)
    if rng.random() < 0.06:
        leaves = _minute(start, 36 + rng.expovariate(1 / 80))
        birth = datetime(start.year, start.month, start.day)
        return Patient(sex, birth, (), (Stay(start, leaves, "NEWBORN", "NEWBORN", {}, False, 0, 0),), None)

    # The misfortunes of life come together: half of each dial is shared, which lets a short text tell a lot.
    shared = rng.gauss(0, 1)
    frailty, isolation, neglect = (0.6 * shared + 0.8 * rng.gauss(0, 1) for _ in range(3))
    age = min(max(63 + 8 * frailty + 14 * rng.gauss(0, 1), 19), 97)
    conditions = tuple(
        name
        for name, c in words.CONDITIONS.items()
        if rng.random() < _sigmoid(_logit(c.prevalence) + c.age_slope * (age - 65) / 10 + 0.5 * shared)
    )
    burden = (sum(words.CONDITIONS[name].weight for name in conditions) - 2.0) / 1.35
    n_earlier = int(rng.expovariate(1 / math.exp(0.5 * shared - 0.6)))
    earlier = [start - timedelta(days=rng.random() * 365) for _ in range(n_earlier)]
    stays: list[Stay] = []
    admit, kind, death = start, "", None
    while len(stays) < MAX_STAYS:
        kind = kind or _pick(rng, ("EMERGENCY",) * 7 + ("URGENT", "ELECTIVE", "ELECTIVE"))
        acuity = rng.gauss(-0.5 if kind == "ELECTIVE" else 0.1, 1)
        visits = sum(timedelta(0) < admit - visit < timedelta(days=365) for visit in earlier)
        dials = {
            "frailty": frailty,
            "isolation": isolation,
            "neglect": neglect,
            "burden": burden,
            "instability": 0.3 * acuity + 0.3 * shared + 0.9 * rng.gauss(0, 1),
            "visits": min(visits, 4) - 0.9,
            "acuity": acuity,
        }
        mortality, readmission = (
            _sigmoid(base + sum(weight * dials[name] for name, weight in weights.items()))
            for base, weights in (MORTALITY, READMISSION)
        )
        died = rng.random() < mortality
        leaves = _minute(admit, 24 * min(2.6 + rng.expovariate(0.35) + max(0.0, 1.2 * acuity), 21))
        problem = _pick(rng, [name for name, p in words.PROBLEMS.items() if p.occurs(kind, conditions)])
        stays.append(Stay(admit, leaves, kind, problem, dials, died, mortality, readmission))
        earlier.append(leaves)
        if died:
            death = leaves
            break
        if rng.random() < readmission:
            gap_days, kind = 0.6 + 28.5 * rng.random() ** 1.4, _pick(rng, ("EMERGENCY",) * 6 + ("URGENT",))
        elif (fate := rng.random()) < 0.03:  # a planned return soon, which does not count as a readmission
            gap_days, kind = 5 + 24 * rng.random(), "ELECTIVE"
        elif fate < 0.07:
            death = leaves + timedelta(days=2 + 400 * rng.random())
            break
        elif fate < 0.48:
            gap_days, kind = 32 + min(rng.expovariate(1 / 240), 700), ""
        else:
            break
        admit = _minute(leaves, gap_days * 24)
    birth = datetime(start.year, start.month, start.day) - timedelta(days=int(age * 365.25))
    if age > 89:  # MIMIC hides great age: such patients are 300 at their first admission
        birth = birth.replace(year=start.year - 300, day=min(birth.day, 28))
    return Patient(sex, birth, conditions, tuple(stays), death)


# Notes


@functools.cache
def _choices(field: str) -> tuple[str, ...]:
    """What a field that is neither a fact nor graded may stand for."""
    if field in words.LEXICON:
        return words.LEXICON[field]
    if "|" in field:
        return tuple(field.split("|"))
    low, high = field.split("-")
    return tuple(str(number) for number in range(int(low), int(high) + 1))


class Scribe:
    """Fills templates in for one stay: `str.format_map` asks it for every field (see synthetic_notes)."""

    def __init__(self, rng: random.Random, facts: dict[str, str], dials: dict[str, float]) -> None:
        self.rng, self.facts, self.dials = rng, facts, dials
        self.last: dict[str, int] = {}  # so that no field says the same thing twice running

    def __getitem__(self, field: str) -> str:
        if (fact := self.facts.get(field)) is not None:
            return fact
        slot = words.GRADED.get(field)
        variants = _choices(field) if slot is None else slot.levels[self.level(slot)]
        number = int(self.rng.random() * len(variants))
        if number == self.last.get(field):
            number = (number + 1) % len(variants)
        self.last[field] = number
        template = variants[number]
        return template.format_map(self) if "{" in template else template

    def one(self, variants: Sequence[str]) -> str:
        """One of the variants, filled in."""
        template = _pick(self.rng, variants)
        return template.format_map(self) if "{" in template else template

    def level(self, slot: words.Graded) -> int:
        """The level of a slot: the dial as seen through noise, cut so that all levels are equally common."""
        seen = self.dials[slot.dial] + SENTENCE_NOISE * self.rng.gauss(0, 1)
        quantile = 0.5 + 0.5 * math.erf(seen / math.sqrt(2 * (1 + SENTENCE_NOISE**2)))
        return min(int(quantile * len(slot.levels)), len(slot.levels) - 1)

    def document(self, template: words.Template, capitals: bool) -> str:
        """Headed sections, separated by empty lines; the older of the two hospital systems wrote capitals."""
        sections = []
        for heading, body in template:
            text = body.format_map(self)
            gap = "  " if len(text) < 60 else "\n"
            sections.append(f"{heading.upper() if capitals else heading}:{gap}{text}")
        return "\n\n".join(sections)

    def daily(self, templates: Sequence[str], yesterday: Sequence[str] = ()) -> list[str]:
        """The lines of a note; of yesterday's, where there is one, five in six are copied forward."""
        if not yesterday:
            return [line.format_map(self) for line in templates]
        return [
            line.format_map(self) if number == 0 or self.rng.random() < 0.17 else old
            for number, (old, line) in enumerate(zip(yesterday, templates, strict=True))
        ]


def _destination(stay: Stay) -> tuple[str, str]:
    """DISCHARGE_LOCATION of a stay, and the same in a summary."""
    if stay.kind == "NEWBORN":
        return "HOME", "Home"
    dials = stay.dials
    if stay.died:
        return "DEAD/EXPIRED", "Expired"
    if dials["neglect"] > 2:
        return "LEFT AGAINST MEDICAL ADVI", "Home, left against medical advice"
    if dials["frailty"] > 1:
        return "SNF", "Extended Care\n\nFacility:\n[**Hospital3 537**] - [**Location (un) 86**]"
    if dials["frailty"] > 0.5 and dials["isolation"] > 0:
        return "REHAB/DISTINCT PART HOSP", "Extended Care\n\nFacility:\n[**Hospital1 **] Rehabilitation"
    if dials["instability"] > 0.6:
        return "HOME HEALTH CARE", "Home With Service\n\nFacility:\n[**Company 1519**]"
    return "HOME", "Home"


def _minute(start: datetime, hours: float) -> datetime:
    """`hours` after `start`, in whole minutes as MIMIC keeps time."""
    return start + timedelta(minutes=int(hours * 60))


def _redacted(day: date) -> str:
    return f"{day.year}-{day.month}-{day.day}"


def _facts(who: Patient, stay: Stay, rng: random.Random, known: dict[str, str]) -> dict[str, str]:
    """What every note of the stay agrees on; `known`, filled here, is what every stay of the patient does."""
    male = who.sex == "M"
    years = (stay.admit - who.birth).days // 365
    old = "[**Age over 90 **]" if years > 89 else str(years)
    facts = {
        "sex": who.sex, "he": "he" if male else "she", "He": "He" if male else "She",
        "him": "him" if male else "her", "his": "his" if male else "her", "His": "His" if male else "Her",
        "himself": "himself" if male else "herself", "spouse": "wife" if male else "husband",
        "man": _pick(rng, ("man", "male", "gentleman") if male else ("woman", "female", "lady")),
        "boy": "boy" if male else "girl",
        "age_phrase": old + _pick(rng, (" year old", " y/o", "yo", "-year-old")),
        "year": str(stay.admit.year),
        "past_year": str(stay.admit.year - 1 - int(rng.random() * 12)),
        "admit_day": _redacted(stay.admit), "discharge_day": _redacted(stay.discharge),
        "birth_day": _redacted(who.birth),
    }  # fmt: skip
    if stay.kind == "NEWBORN":
        return facts
    problem = words.PROBLEMS[stay.problem]
    scribe = Scribe(rng, facts, stay.dials)
    for slot in words.LASTING:
        known.setdefault(slot, scribe[slot])
    for name in who.conditions:
        known.setdefault(name, scribe.one(words.CONDITIONS[name].history))
    past = [*(known[name] for name in who.conditions), scribe["surgery"]]
    if rng.random() < 0.25:
        past.append(scribe["vaccination"])
    every = [m for name in who.conditions for m in words.CONDITIONS[name].medicines]
    medicines = [scribe.one((m,)) for m in every if rng.random() < 0.27] + [scribe["over_the_counter"]]
    creatinine = 1.7 + 0.5 * stay.dials["burden"] + 0.4 * stay.dials["acuity"] + 0.4 * rng.gauss(0, 1)
    title = re.split("[/;]", stay.problem)[0]
    return facts | known | {
        "service": problem.service,
        "complaint": _pick(rng, problem.complaint),
        "story": scribe.one(problem.story),
        "procedure": scribe.one(problem.procedure),
        "course": " ".join(scribe.one((line,)) for line in problem.course if rng.random() < 0.8),
        "Diagnosis": title.capitalize(),
        "history": ", ".join(who.conditions[:4]) or "no significant past medical history",
        "history_list": "\n".join(f"{n}. {line}" for n, line in enumerate(past, 1)),
        "medicine": medicines[0],
        "medicine_list": "\n".join(f"{n}. {line}." for n, line in enumerate(medicines, 1)),
        "diagnosis_list": "\n".join(name.capitalize() for name in (title, *who.conditions[:3])),
        "disposition": _destination(stay)[1],
        "creat": f"{max(0.5, creatinine):.1f}",
        "adherence": scribe["adherence"],
        "visits": scribe["visits"],
    }  # fmt: skip


def _stay_notes(number: int, stay: Stay, scribe: Scribe, older_system: bool) -> Iterator[Note]:
    """The notes of one adult stay, roughly ten to twenty; the caller puts them in order."""
    rng, facts = scribe.rng, scribe.facts

    def charted(hours: float, category: str, description: str, text: str) -> Note:
        moment = _minute(stay.admit, hours)
        return Note(number, moment.date(), moment, category, description, text)

    nursing, nursing_title = ("Nursing/other", "Report") if older_system else ("Nursing", "Nursing Progress Note")
    hours = (stay.discharge - stay.admit).total_seconds() / 3600
    yield charted(
        1.5 + 3 * rng.random(), "Physician ", "Physician Resident Admission Note",
        scribe.document(words.ADMISSION_NOTE, older_system),
    )  # fmt: skip
    yield charted(1 + 4 * rng.random(), nursing, nursing_title, "\n".join(scribe.daily(words.NURSING_ADMISSION)))
    by_nurse: list[str] = []
    by_physician: list[str] = []
    for day in range(1, int(hours / 24) + 1):
        facts["day"] = str(day + 1)
        keeps_up = 0.55 if day <= 4 else 0.3
        due = day * 24 - 8 + 4 * rng.random()  # hours after admission
        if rng.random() < keeps_up:
            by_nurse = scribe.daily(words.NURSING_DAILY, by_nurse)
            yield charted(due, nursing, nursing_title, "\n".join(by_nurse))
        if rng.random() < 0.5 * keeps_up:
            by_physician = scribe.daily(words.PHYSICIAN_DAILY, by_physician)
            title = _pick(rng, ("Physician Resident Progress Note", "Physician Attending Progress Note"))
            yield charted(due + 3, "Physician ", title, "\n".join(by_physician))
    if stay.died:
        yield charted(hours - 5, nursing, nursing_title, scribe.one(words.COMFORT))
    for category, description, share, text in words.OCCASIONAL:
        if rng.random() < share:
            yield charted(6 + rng.random() * (hours - 8), category, description, scribe.one((text,)))
    for soonest, share in ((0.5, 0.75), (20, 0.35), (44, 0.2)):
        if rng.random() < share:
            yield _study(number, _minute(stay.admit, soonest + 6 * rng.random()), scribe, "Radiology")
    if rng.random() < 0.65:
        yield _study(number, _minute(stay.admit, rng.random()), scribe, "ECG")
    if rng.random() < 0.35:
        yield _study(number, _minute(stay.admit, 10 + 30 * rng.random()), scribe, "Echo")

    if rng.random() < 0.98:
        template = words.DISCHARGE
        if stay.died:
            template = tuple(section for section in template if section[0] in words.DEATH_SECTIONS)
        text = scribe.document(template, older_system)
        if stay.died:
            text += "\n\n" + scribe.one(words.DEATH_COURSE)
        text += f"\n\n{scribe['full_name']}, M.D. {scribe['identifier']}\nDictated By: {scribe['info']}"
        yield Note(number, stay.discharge.date(), None, "Discharge summary", "Report", text)
        if not stay.died and rng.random() < 0.06:
            addendum = scribe.one(words.ADDENDA)
            yield Note(number, stay.discharge.date(), None, "Discharge summary", "Addendum", addendum)


def _study(number: int | None, moment: datetime, scribe: Scribe, category: str) -> Note:
    """A radiology, ECG or echo report; MIMIC gives the latter two a date but no time."""
    moment = moment.replace(second=0, microsecond=0)
    scribe.facts |= {"note_day": _redacted(moment), "clock": f"{moment.hour}:{moment.minute:02}"}
    if category != "Radiology":
        text = scribe.one(words.ECG if category == "ECG" else (words.ECHO,))
        return Note(number, moment.date(), None, category, "Report", text)
    description = _pick(scribe.rng, tuple(words.RADIOLOGY))
    scribe.facts |= {"description": description, "finding": scribe.one((words.RADIOLOGY[description],))}
    text = scribe.one((words.RADIOLOGY_FRAME,))
    return Note(number, moment.date(), moment, category, description, text)


def _newborn_notes(number: int, stay: Stay, scribe: Scribe) -> Iterator[Note]:
    for day in range((stay.discharge - stay.admit).days + 1):
        scribe.facts["day"] = str(day + 1)
        moment = _minute(stay.admit, day * 24 + 2 + 6 * scribe.rng.random())
        if moment < stay.discharge:
            text = "\n".join(scribe.daily(words.NEWBORN_DAILY))
            yield Note(number, moment.date(), moment, "Nursing/other", "Report", text)
    text = scribe.document(words.NEWBORN_SUMMARY, capitals=False)
    yield Note(number, stay.discharge.date(), None, "Discharge summary", "Report", text)


def notes(seed: int, index: int, who: Patient) -> list[Note]:
    """All notes of a patient in order of time, with the flaws of a real archive.

    A study done between two stays has no HADM_ID; a few notes are marked as errors and written again; a few
    are there twice.
    """
    rng = derived(seed, "notes", index)
    older_system = rng.random() < 0.4
    written: list[Note] = []
    known: dict[str, str] = {}
    since = who.stays[0].admit - timedelta(days=200)
    for number, stay in enumerate(who.stays):
        scribe = Scribe(rng, _facts(who, stay, rng, known), stay.dials)
        if stay.kind == "NEWBORN":
            written += _newborn_notes(number, stay, scribe)
            continue
        if rng.random() < 0.27:
            category = _pick(rng, ("Radiology", "Radiology", "ECG", "Echo"))
            written.append(_study(None, since + 0.9 * rng.random() * (stay.admit - since), scribe, category))
        for note in _stay_notes(number, stay, scribe, older_system):
            if rng.random() < 0.005:
                reason = scribe.one(words.LEXICON["error_reason"])
                written.append(note._replace(is_error=True, text=reason + note.text))
            written.append(note)
            if rng.random() < 0.005:
                written.append(note)
        since = stay.discharge
    return sorted(written, key=lambda note: (note.day, note.time or datetime.combine(note.day, time.max)))


# Tables


def write_hospital(recipe: HospitalRecipe, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Writes NOTEEVENTS, ADMISSIONS, PATIENTS, DIAGNOSES_ICD (`.csv.gz`) into `recipe.out`; returns counts.

    The same recipe gives the same bytes. No table appears before all are whole; NOTEEVENTS appears last.
    `progress` is called with (patients written, patients) after each patient.
    """
    urls = {name: storage.join(recipe.out, f"{name}.csv.gz") for name in TABLES}
    for url in urls.values():
        _refuse_foreign(url)
    counts: Counter[str] = Counter()
    rows = {name: itertools.count(1) for name in TABLES}
    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context(_table(url)) for name, url in urls.items()}
        for name, columns in TABLES.items():
            streams[name].write(_line(columns.split()).encode())
        for index in range(recipe.patients):
            who = patient(recipe.seed, index)
            written = notes(recipe.seed, index, who)
            hadm = 100_001 + counts["admissions"]
            tables = {
                "NOTEEVENTS": _note_rows(written, hadm, derived(recipe.seed, "authors", index)),
                "ADMISSIONS": _admission_rows(who, hadm, derived(recipe.seed, "admissions", index)),
                "PATIENTS": iter([_patient_row(who)]),
                "DIAGNOSES_ICD": _diagnosis_rows(who, hadm),
            }
            for name, cells in tables.items():
                text = "".join(_line([next(rows[name]), 10_001 + index, *row]) for row in cells)
                streams[name].write(text.encode())
            _count(counts, who, written)
            if progress is not None:
                progress(index + 1, recipe.patients)
    return dict(counts)


def _count(counts: Counter[str], who: Patient, written: list[Note]) -> None:
    index_stays = [stay for stay in who.stays if stay.is_index]
    counts.update(
        patients=1,
        admissions=len(who.stays),
        index_admissions=len(index_stays),
        readmissions_30d=sum(who.is_readmitted(stay) for stay in index_stays),
        deaths=sum(stay.died for stay in who.stays),
        newborns=sum(stay.kind == "NEWBORN" for stay in who.stays),
        notes=len(written),
        error_notes=sum(note.is_error for note in written),
        notes_without_hadm=sum(note.stay is None for note in written),
        text_bytes=sum(len(note.text) for note in written),  # the templates are ASCII
    )


def _refuse_foreign(url: str) -> None:
    """Keeps a real MIMIC-III safe: our gzip header has neither time nor name, theirs has both."""
    if storage.exists(url):
        with storage.reader(url, compression=None) as stream:
            if stream.read(8) != b"\x1f\x8b\x08" + bytes(5):
                raise DataError(f"{url}: exists and was not made by this command; choose another `out` folder")


@contextlib.contextmanager
def _table(url: str) -> Iterator[BinaryIO]:
    with (
        storage.atomic_writer(url) as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=raw, mtime=0) as stream,
    ):
        yield cast(BinaryIO, stream)


def _line(cells: Sequence[Cell]) -> str:
    """A CSV line as MIMIC writes it: strings in quotes, numbers and times bare, nothing for NULL."""
    return (
        ",".join(
            "" if cell is None else '"' + cell.replace('"', '""') + '"' if isinstance(cell, str) else str(cell)
            for cell in cells
        )
        + "\n"
    )


def _note_rows(written: list[Note], hadm: int, rng: random.Random) -> Iterator[list[Cell]]:
    for note in written:
        # Reports of machines and dictations carry no author and no time of storing.
        signed = note.time is not None and note.category != "Radiology"
        yield [
            None if note.stay is None else hadm + note.stay,
            note.day,
            note.time,
            note.time + timedelta(minutes=1 + int(90 * rng.random())) if signed and note.time else None,
            note.category,
            note.description,
            14_000 + int(rng.random() * 7000) if signed else None,
            "1" if note.is_error else None,
            note.text,
        ]


def _admission_rows(who: Patient, hadm: int, rng: random.Random) -> Iterator[list[Cell]]:
    insurance, language, religion, marital, ethnicity = (_pick(rng, options) for options in words.DEMOGRAPHICS)
    for number, stay in enumerate(who.stays):
        emergency = stay.kind == "EMERGENCY"
        arrived = _minute(stay.admit, -2 - 6 * rng.random()) if emergency else None
        yield [
            hadm + number,
            stay.admit,
            stay.discharge,
            stay.discharge if stay.died else None,
            stay.kind,
            _pick(rng, words.ADMISSION_LOCATIONS[stay.kind]),
            _destination(stay)[0],
            insurance,
            language,
            religion,
            marital,
            ethnicity,
            arrived,
            _minute(stay.admit, 1 + 3 * rng.random()) if emergency else None,
            stay.problem,
            int(stay.died),
            1,
        ]


def _patient_row(who: Patient) -> list[Cell]:
    death = None if who.death is None else datetime.combine(who.death, time.min)
    died_here = who.stays[-1].died
    return [
        who.sex,
        who.birth,
        death,
        death if died_here else None,
        None if died_here else death,
        int(death is not None),
    ]


def _diagnosis_rows(who: Patient, hadm: int) -> Iterator[list[Cell]]:
    for number, stay in enumerate(who.stays):
        first = words.PROBLEMS[stay.problem].icd9 if stay.problem in words.PROBLEMS else "V3000"
        codes = dict.fromkeys([first, *(words.CONDITIONS[name].icd9 for name in who.conditions)])
        for sequence, code in enumerate(codes, 1):
            yield [hadm + number, sequence, code]


def main(args: list[str]) -> None:
    """Verb `hospital`: writes the tables and says what is in them."""
    recipe = config.load(HospitalRecipe, args)
    with logs.progress("hospital", recipe.patients) as advance:
        counts = write_hospital(recipe, lambda done, _: advance(done, f"{done:,} patients"))
    rows = [(name.replace("_", " "), f"{count:,}") for name, count in counts.items()]
    logs.table(f"synthetic hospital in {recipe.out}", ("", "count"), rows)
