"""Death in hospital: who is asked about, on made-up stays and on the real MIMIC-III demo; which notes are read."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cluster.errors import DataError
from downstream.tasks.mimic import Admission, Life, read_admissions, read_lives
from downstream.tasks.mortality import MortalityTask, asked_about
from sharding.clean import CleanConfig

DEMO = Path(os.environ.get("CHARTLM_DATA", "absent")) / "mimic3demo"
START = datetime(2150, 1, 1)
LIVES = {"1": Life(datetime(2100, 1, 1), None)}

needs_demo = pytest.mark.skipif(not DEMO.exists(), reason="CHARTLM_DATA with mimic3demo is not there")


def stay(hadm: str, hours: float, kind: str = "EMERGENCY", died: bool = False, diagnosis: str = "SEPSIS") -> Admission:
    return Admission("1", hadm, START, START + timedelta(hours=hours), died, kind, diagnosis)


def asked(*stays: Admission, hours: float = 48, gap: float = 0, age: float = 18) -> list[tuple[str, bool]]:
    return [(one.hadm, one.died) for one in asked_about(stays, LIVES, hours, gap, age)[0]]


@needs_demo
def test_counts_of_the_mimic_demo() -> None:
    """40 of 129 end in death; one patient is 17; 14 stays last less than 48 hours."""
    admissions, lives = read_admissions(f"{DEMO}/ADMISSIONS.csv"), read_lives(f"{DEMO}/PATIENTS.csv")
    whole, _ = asked_about(admissions, lives, 0, 0, 0)
    assert (len(whole), sum(one.died for one in whole)) == (129, 40)
    late, filters = asked_about(admissions, lives, 48, 0, 18)
    assert len(late) == 129 - 1 - 14
    assert {one.name: one.dropped for one in filters if one.dropped} == {
        "under 18 years": 1,
        "dead or out of hospital by then": 14,
    }


@needs_demo
def test_demo_without_notes_is_one_line() -> None:
    with pytest.raises(DataError, match="no admission has a note by then"):
        MortalityTask(tables=str(DEMO)).cohort(CleanConfig())


def test_who_is_asked_about() -> None:
    assert asked(stay("a", 47, died=True), stay("b", 49, died=True), stay("c", 48), stay("d", 60)) == [
        ("b", True),
        ("d", False),
    ]
    assert asked(stay("b", 53, died=True), stay("d", 55), gap=6) == [("d", False)]
    assert asked(stay("a", 99, "NEWBORN"), stay("b", 99, diagnosis="ORGAN DONOR ACCOUNT")) == []
    assert asked(stay("a", 99), age=51) == []
    with pytest.raises(DataError, match="PATIENTS has no row for subject 1"):
        asked_about([stay("a", 99)], {}, 48, 0, 18)


def test_text_is_what_was_there_at_the_hour(tmp_path: Path) -> None:
    (tmp_path / "ADMISSIONS.csv").write_text(
        "ROW_ID,SUBJECT_ID,HADM_ID,ADMITTIME,DISCHTIME,DEATHTIME,ADMISSION_TYPE,DIAGNOSIS,HOSPITAL_EXPIRE_FLAG\n"
        "1,7,100,2150-01-01 12:00:00,2150-01-05 00:00:00,2150-01-05 00:00:00,EMERGENCY,X,1\n"
    )
    (tmp_path / "PATIENTS.csv").write_text("SUBJECT_ID,DOB,DOD\n7,2100-01-01 00:00:00,\n")
    (tmp_path / "NOTEEVENTS.csv").write_text(
        "ROW_ID,SUBJECT_ID,HADM_ID,CHARTDATE,CHARTTIME,CATEGORY,DESCRIPTION,ISERROR,TEXT\n"
        "1,7,100,2150-01-01,2150-01-01 13:00:00,Nursing,Report,,in time\n"
        "2,7,100,2150-01-02,2150-01-02 12:01:00,Nursing,Report,,expired at noon\n"
    )
    cohort = MortalityTask(tables=str(tmp_path), hours=24).cohort(CleanConfig())
    assert [(e.example_id, e.text, e.label) for e in cohort.examples] == [("100", "in time", 1)]
    assert cohort.classes == ("survived", "died")
