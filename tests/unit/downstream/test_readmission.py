"""Labels of readmission: the rules on made-up stays, and the golden counts of the real MIMIC-III demo."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cluster import config
from cluster.errors import ConfigError, DataError
from downstream.tasks.mimic import Admission, Life, discharge_summaries, read_admissions, read_lives
from downstream.tasks.readmission import (
    PRESETS,
    ReadmissionTask,
    Rules,
    competing_deaths,
    label_admissions,
)
from sharding.clean import CleanConfig

DEMO = Path(os.environ.get("CHARTLM_DATA", "absent")) / "mimic3demo"
POSITIVES = {
    "142582", "169938", "168074", "157466", "182664", "173269", "149469", "180391", "172454", "125157",
    "131048",
}  # fmt: skip
START = datetime(2150, 1, 1)
LIVES = {"1": Life(datetime(2100, 1, 1), None)}

needs_demo = pytest.mark.skipif(not DEMO.exists(), reason="CHARTLM_DATA with mimic3demo is not there")


def stay(hadm: str, first_day: float, last_day: float, kind: str = "EMERGENCY", died: bool = False) -> Admission:
    days = (START + timedelta(days=first_day), START + timedelta(days=last_day))
    return Admission("1", hadm, *days, died, kind, "SEPSIS")


def labels(*stays: Admission, rules: Rules = PRESETS["clinicalbert"]) -> dict[str, int]:
    index, _ = label_admissions(stays, LIVES, rules)
    return {one.hadm: one.label for one in index}


@needs_demo
@pytest.mark.parametrize(
    ("preset", "days", "index", "patients", "positives"),
    [("clinicalbert", 30, 89, 67, 11), ("pyhealth15", 15, 29, 14, 8), ("pyhealth15", 30, 29, 14, 11)],
)
def test_counts_of_the_mimic_demo(preset: str, days: float, index: int, patients: int, positives: int) -> None:
    admissions = read_admissions(f"{DEMO}/ADMISSIONS.csv")
    lives = read_lives(f"{DEMO}/PATIENTS.csv")
    assert len(admissions) == 129
    assert sum(one.died for one in admissions) == 40
    stays, filters = label_admissions(admissions, lives, PRESETS[preset]._replace(window_days=days))
    assert (len(stays), len({one.subject for one in stays})) == (index, patients)
    positive = [one.hadm for one in stays if one.label]
    assert len(positive) == positives
    if days == 30:
        assert set(positive) == POSITIVES
    if preset == "clinicalbert":
        assert competing_deaths(stays, lives, 30) == (11, 8)
    assert sum(one.dropped for one in filters) == 129 - index


@needs_demo
def test_demo_without_notes_is_one_line() -> None:
    with pytest.raises(DataError, match="no index admission has a discharge summary"):
        ReadmissionTask(tables=str(DEMO)).cohort(CleanConfig())


def test_gap_below_30_days_is_positive_and_exactly_30_is_not() -> None:
    assert labels(stay("a", 0, 5), stay("b", 34.99, 40))["a"] == 1
    assert labels(stay("a", 0, 5), stay("b", 35, 40))["a"] == 0


def test_elective_admission_is_skipped_and_the_next_one_counts() -> None:
    planned = stay("b", 10, 12, "ELECTIVE")
    assert labels(stay("a", 0, 5), planned) == {"a": 0, "b": 0}
    assert labels(stay("a", 0, 5), planned, stay("c", 20, 22, "URGENT")) == {"a": 1, "b": 1, "c": 0}


def test_deaths_and_newborns_are_not_asked_about() -> None:
    assert labels(stay("a", 0, 5, "NEWBORN"), stay("b", 10, 12), stay("c", 20, 25, died=True)) == {"b": 1}


@pytest.mark.parametrize("begins", [5.0, 4.0], ids=["gap zero", "overlap"])
def test_stay_that_goes_on_in_the_next_is_one_episode(begins: float) -> None:
    # The episode ends with the later of the two ends; what follows is measured from there.
    assert labels(stay("a", 0, 5), stay("b", begins, 10), stay("c", 39.9, 41)) == {"b": 1, "c": 0}
    assert labels(stay("a", 0, 5), stay("b", begins, 10), stay("c", 40, 41)) == {"b": 0, "c": 0}


def test_stay_within_a_stay_ends_with_the_outer_one() -> None:
    assert labels(stay("a", 0, 5), stay("b", 4, 4.5), stay("c", 34.9, 40)) == {"b": 1, "c": 0}


def test_discharge_before_admission_is_counted_not_used() -> None:
    index, filters = label_admissions([stay("a", 5, 0), stay("b", 6, 8)], LIVES, Rules())
    assert [one.hadm for one in index] == ["b"]
    assert {one.name: one.dropped for one in filters}["discharged before admitted"] == 1


def test_default_preset_leaves_out_minors_and_organ_donors() -> None:
    donor = stay("b", 5.1, 5.2)._replace(diagnosis="ORGAN DONOR ACCOUNT")
    assert labels(stay("a", 0, 5), donor, rules=PRESETS["default"]) == {"a": 0}
    young = {"1": Life(datetime(2140, 1, 1), None)}
    assert label_admissions([stay("a", 0, 5)], young, PRESETS["default"])[0] == []


def write_tables(folder: Path, notes: list[str], dates: str = "chartdate") -> str:
    """A patient with two stays in lower-case tables; `notes` are rows of NOTEEVENTS."""
    (folder / "admissions.csv").write_text(
        "row_id,subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,diagnosis,"
        "hospital_expire_flag\n"
        "1,7,100,2150-01-01 00:00:00,2150-01-05 00:00:00,,EMERGENCY,X,0\n"
        "2,7,101,2150-01-20 00:00:00,2150-01-25 00:00:00,,EMERGENCY,X,0\n"
    )
    (folder / "PATIENTS.csv").write_text("subject_id,dob,dod\n7,2100-01-01 00:00:00,\n")
    columns = f"row_id,subject_id,hadm_id,{dates},category,description,iserror,text"
    (folder / "NOTEEVENTS.csv").write_text("\n".join([columns, *notes]) + "\n")
    return str(folder)


def test_text_is_the_last_report_with_addenda_of_its_time(tmp_path: Path) -> None:
    tables = write_tables(
        tmp_path,
        [
            "9,7,100,2150-01-05,Discharge summary,Report,,early",
            "12,7,100,2150-01-05,Discharge summary,Report,,last",
            "11,7,100,2150-01-05,Discharge summary,Report,,middle",
            "13,7,100,2150-01-05,Discharge summary,Report,1,wrong patient",
            "14,7,100,2150-01-06,Discharge summary,Addendum,,addendum",
            "15,7,100,2150-01-06,Discharge summary,Addendum,,addendum",
            "16,7,100,2150-01-07,Discharge summary,Addendum,,knows too much",
            "17,7,100,2150-01-03,Nursing,Report,,nursing",
            "18,7,101,2150-01-25,Discharge summary,Report,,second  stay",
        ],
    )
    cohort = ReadmissionTask(tables=tables).cohort(CleanConfig())
    assert [(e.example_id, e.patient_id, e.text, e.label) for e in cohort.examples] == [
        ("100", "7", "last\n\naddendum", 1),
        ("101", "7", "second stay", 0),
    ]


def test_stay_without_a_summary_is_dropped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = write_tables(tmp_path, ["18,7,101,2150-01-25,Discharge summary,Report,,text of a note"])
    cohort = ReadmissionTask(tables=tables).cohort(CleanConfig())
    assert [e.example_id for e in cohort.examples] == ["101"]
    printed = capsys.readouterr().out
    assert "no discharge summary" in printed
    assert "text of a note" not in printed


def test_missing_table_and_bad_time_are_one_line(tmp_path: Path) -> None:
    tables = write_tables(tmp_path, [])
    (tmp_path / "PATIENTS.csv").unlink()
    with pytest.raises(DataError, match=r"PATIENTS.csv or PATIENTS.csv.gz is needed: it is not there"):
        ReadmissionTask(tables=tables).cohort(CleanConfig())
    path = tmp_path / "admissions.csv"
    path.write_text(path.read_text().replace("2150-01-05 00:00:00", "5 Jan 2150"))
    with pytest.raises(DataError, match="DISCHTIME of 100 is not a time"):
        read_admissions(str(path))


def test_summary_of_other_stays_is_not_held(tmp_path: Path) -> None:
    tables = write_tables(tmp_path, ["18,7,999,2150-01-25,Discharge summary,Report,,other"])
    assert discharge_summaries(f"{tables}/NOTEEVENTS.csv", {}) == {}


EARLY = [
    "3,7,100,2150-01-02,2150-01-02 23:59:00,Nursing,Report,,second",
    "1,7,100,2150-01-01,2150-01-01 08:00:00,Physician,Report,,first",
    "4,7,100,2150-01-03,2150-01-03 00:01:00,Nursing,Report,,too late",
    "5,7,100,2150-01-02,,ECG,Report,,its day is over",
    "6,7,100,2150-01-03,,ECG,Report,,its day is not over",
    "7,7,100,2150-01-02,2150-01-02 10:00:00,Nursing,Report,1,an error",
    "8,7,100,2150-01-02,2150-01-02 10:00:00,Discharge summary,Report,,knows all",
    "9,7,100,2150-01-02,2150-01-02 11:00:00,Physician,Report,,first",
    "10,7,,2150-01-01,2150-01-01 10:00:00,Physician,Report,,of no stay",
]


def test_early_notes_are_those_that_were_there(tmp_path: Path) -> None:
    """A planted late note is not read, nor one of which only the day is known and that day is not over."""
    tables = write_tables(tmp_path, EARLY, "chartdate,charttime")
    cohort = ReadmissionTask(tables=tables, setting="early:48h").cohort(CleanConfig())
    assert [(e.example_id, e.text, e.label) for e in cohort.examples] == [
        ("100", "first\n\nsecond\n\nits day is over", 1)
    ]
    later = ReadmissionTask(tables=tables, setting="early:72h").cohort(CleanConfig())
    assert [e.text for e in later.examples] == ["first\n\nsecond\n\nits day is over\n\ntoo late\n\nits day is not over"]
    with pytest.raises(DataError, match="no index admission has a note by then"):  # four and five days long
        ReadmissionTask(tables=tables, setting="early:121h").cohort(CleanConfig())


def test_a_setting_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"setting: String should match pattern"):
        config.validate(ReadmissionTask, {"tables": "x", "setting": "early"}, "recipe")
