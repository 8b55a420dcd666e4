"""The synthetic hospital: the file format of MIMIC-III, its flaws, and a signal as strong as promised."""

from __future__ import annotations

import csv
import gzip
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cluster.errors import ConfigError, DataError
from sharding import synthetic, synthetic_notes
from sharding.synthetic import HospitalRecipe, write_hospital

Row = dict[str, str]
Hospital = dict[str, list[Row]]


def read(folder: Path, table: str) -> list[Row]:
    with gzip.open(folder / f"{table}.csv.gz", "rt", newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream, strict=True)
    assert header == synthetic.TABLES[table].split()
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hospital")
    write_hospital(HospitalRecipe(out=str(out), patients=150, seed=5))
    return out


@pytest.fixture(scope="module")
def hospital(folder: Path) -> Hospital:
    return {table: read(folder, table) for table in synthetic.TABLES}


def test_same_recipe_gives_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_hospital(HospitalRecipe(out=str(tmp_path / name), patients=8, seed=seed))
    for table in synthetic.TABLES:
        a, b, c = ((tmp_path / name / f"{table}.csv.gz").read_bytes() for name in "abc")
        assert a == b
        assert gzip.decompress(a) != gzip.decompress(c)


def test_smaller_hospital_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    for patients in (20, 40):
        write_hospital(HospitalRecipe(out=str(tmp_path / str(patients)), patients=patients))
    for table in synthetic.TABLES:
        short, long = (gzip.decompress((tmp_path / n / f"{table}.csv.gz").read_bytes()) for n in ("20", "40"))
        assert len(long) > 1.3 * len(short)
        assert long.startswith(short)


def test_counts_are_what_the_tables_say(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    counts = write_hospital(HospitalRecipe(out=str(tmp_path), patients=30), lambda *at: seen.append(at))
    notes, admissions = read(tmp_path, "NOTEEVENTS"), read(tmp_path, "ADMISSIONS")
    assert seen == [(n, 30) for n in range(1, 31)]
    assert counts["patients"] == len(read(tmp_path, "PATIENTS")) == 30
    assert counts["admissions"] == len(admissions)
    assert counts["notes"] == len(notes)
    assert counts["error_notes"] == sum(note["ISERROR"] == "1" for note in notes)
    assert counts["notes_without_hadm"] == sum(not note["HADM_ID"] for note in notes)
    assert counts["text_bytes"] == sum(len(note["TEXT"].encode()) for note in notes)
    assert counts["deaths"] == sum(stay["HOSPITAL_EXPIRE_FLAG"] == "1" for stay in admissions)
    assert counts["newborns"] == sum(stay["ADMISSION_TYPE"] == "NEWBORN" for stay in admissions)
    assert counts["readmissions_30d"] == sum(readmission_labels(admissions).values())


def test_bytes_are_written_as_mimic_writes_them(folder: Path) -> None:
    plain = gzip.decompress((folder / "NOTEEVENTS.csv.gz").read_bytes()).decode("ascii")
    assert plain.startswith('"ROW_ID","SUBJECT_ID","HADM_ID","CHARTDATE",')
    # A summary: numbers and dates bare, empty NULLs (CHARTTIME, STORETIME, CGID, ISERROR), strings quoted.
    assert re.search(r'^\d+,\d+,\d+,\d{4}-\d\d-\d\d,,,"Discharge summary","Report",,,"', plain, re.MULTILINE)
    # A DESCRIPTION that ends in a quotation mark, which has swallowed rows in other people's readers.
    assert '""STAT""",,,"' in plain
    header = (folder / "NOTEEVENTS.csv.gz").read_bytes()[:8]
    assert header == b"\x1f\x8b\x08\x00" + bytes(4)  # neither a file name nor a time


def test_row_ids_are_unique(hospital: Hospital) -> None:
    for rows in hospital.values():
        assert [int(row["ROW_ID"]) for row in rows] == list(range(1, len(rows) + 1))
    for table, key in (("ADMISSIONS", "HADM_ID"), ("PATIENTS", "SUBJECT_ID")):
        assert len({row[key] for row in hospital[table]}) == len(hospital[table])


def test_notes_have_the_flaws_of_a_real_archive(hospital: Hospital) -> None:
    notes = hospital["NOTEEVENTS"]
    categories = Counter(note["CATEGORY"] for note in notes)
    assert {name for name in categories if name.endswith(" ")} == {
        "Physician ",
        "Respiratory ",
        "Case Management ",
    }
    assert {name.strip() for name in categories} == {
        *("Case Management", "Consult", "Discharge summary", "ECG", "Echo", "General", "Nursing"),
        *("Nursing/other", "Nutrition", "Pharmacy", "Physician", "Radiology", "Rehab Services"),
        *("Respiratory", "Social Work"),
    }
    assert 0.001 < np.mean([note["ISERROR"] == "1" for note in notes]) < 0.02
    assert {note["ISERROR"] for note in notes} == {"", "1"}
    studies = [note for note in notes if note["CATEGORY"] in ("Radiology", "ECG", "Echo")]
    assert 0.05 < np.mean([not note["HADM_ID"] for note in studies]) < 0.2
    assert all(note["HADM_ID"] for note in notes if note["CATEGORY"] not in ("Radiology", "ECG", "Echo"))
    for note in notes:
        assert (not note["CHARTTIME"]) == (note["CATEGORY"] in ("Discharge summary", "ECG", "Echo"))
        assert note["CHARTDATE"] == (note["CHARTTIME"] or note["CHARTDATE"])[:10]
    assert any(note["DESCRIPTION"] == "Addendum" for note in notes)
    exact = Counter((note["SUBJECT_ID"], note["CHARTTIME"], note["TEXT"]) for note in notes)
    assert max(exact.values()) >= 2


# What stands between `[**` and `**]` (forms that public MIMIC-III cleaners list).
BARE_FORMS = (r"\d{4}-\d{1,2}-\d{1,2}", r"\d{1,2}-\d{1,2}", r"\d{1,2}/\d{1,2}", r"\d{4}", r"\d{3}", " ")
NAMED_FORMS = """
Last Name; First Name; Doctor Last Name; Known lastname; Name (NI); Initials; Hospital1; Hospital Ward Name;
University/College; Location; Country; State; Company; Street Address; PO Box; Holiday; Date range; Month/Day;
Month (only); Numeric Identifier; Clip Number (Radiology); Medical Record Number; Serial Number; Unit Number;
MD Number; Job Number; Provider Number; Social Security Number; Telephone/Fax; Pager number; Age over 90;
Dictator Info; Attending Info; Contact Info
"""


@pytest.mark.parametrize("form", [*BARE_FORMS, *(rf"{re.escape(f.strip())}[^]]*" for f in NAMED_FORMS.split(";"))])
def test_redactions_come_in_every_form(hospital: Hospital, form: str) -> None:
    assert any(re.search(rf"\[\*\*{form}\*\*\]", note["TEXT"]) for note in hospital["NOTEEVENTS"])


def test_some_redactions_are_broken_over_two_lines(hospital: Hospital) -> None:
    assert any(re.search(r"\[\*\*Last Name\n[^]]*\*\*\]", note["TEXT"]) for note in hospital["NOTEEVENTS"])


def test_daily_notes_are_copied_forward(hospital: Hospital) -> None:
    series: dict[tuple[str, str], list[set[str]]] = defaultdict(list)
    for note in hospital["NOTEEVENTS"]:
        if "HD " in note["TEXT"][:20] and not note["ISERROR"]:
            series[note["HADM_ID"], note["CATEGORY"]].append(set(note["TEXT"].split("\n")))
    shared = [
        len(yesterday & today) / len(today)
        for days in series.values()
        for yesterday, today in itertools.pairwise(days)
        if yesterday != today  # exact duplicates are another test
    ]
    assert len(shared) > 100
    assert 0.5 < np.mean(shared) < 0.9


def test_admissions_are_possible_lives(hospital: Hospital) -> None:
    died = {row["SUBJECT_ID"]: row["DOD"] for row in hospital["PATIENTS"] if row["DOD"]}
    before: dict[str, datetime] = {}
    for stay in hospital["ADMISSIONS"]:
        who, admit, leaves = stay["SUBJECT_ID"], moment(stay["ADMITTIME"]), moment(stay["DISCHTIME"])
        assert before.get(who, datetime(2100, 1, 1)) < admit < leaves < datetime(2201, 1, 1)
        assert (stay["DEATHTIME"] != "") == (stay["HOSPITAL_EXPIRE_FLAG"] == "1")
        assert (stay["DISCHARGE_LOCATION"] == "DEAD/EXPIRED") == (stay["DEATHTIME"] != "")
        # The next stay of a patient who died would begin after the day of death.
        before[who] = datetime(2999, 1, 1) if stay["DEATHTIME"] else leaves
        if who in died:
            assert moment(died[who]).date() >= leaves.date()
    kinds = Counter(stay["ADMISSION_TYPE"] for stay in hospital["ADMISSIONS"])
    assert set(kinds) == {"EMERGENCY", "ELECTIVE", "URGENT", "NEWBORN"}
    ages = [
        moment(stay["ADMITTIME"]).year - int(row["DOB"][:4])
        for row in hospital["PATIENTS"]
        for stay in hospital["ADMISSIONS"]
        if row["SUBJECT_ID"] == stay["SUBJECT_ID"]
    ]
    assert any(age >= 299 for age in ages)  # older than 89
    assert all(age < 100 or age >= 299 for age in ages)
    newborns = {stay["SUBJECT_ID"] for stay in hospital["ADMISSIONS"] if stay["ADMISSION_TYPE"] == "NEWBORN"}
    assert {row["DOB"][:10] for row in hospital["PATIENTS"] if row["SUBJECT_ID"] in newborns} == {
        stay["ADMITTIME"][:10] for stay in hospital["ADMISSIONS"] if stay["SUBJECT_ID"] in newborns
    }


def test_tables_refer_to_each_other(hospital: Hospital) -> None:
    stays = {stay["HADM_ID"]: stay for stay in hospital["ADMISSIONS"]}
    patients = {row["SUBJECT_ID"] for row in hospital["PATIENTS"]}
    assert {row["HADM_ID"] for row in hospital["DIAGNOSES_ICD"]} == set(stays)
    for note in hospital["NOTEEVENTS"]:
        assert note["SUBJECT_ID"] in patients
        if note["HADM_ID"]:
            stay = stays[note["HADM_ID"]]
            assert stay["SUBJECT_ID"] == note["SUBJECT_ID"]
            assert stay["ADMITTIME"][:10] <= note["CHARTDATE"] <= stay["DISCHTIME"][:10]
            if note["CHARTTIME"]:
                assert stay["ADMITTIME"] <= note["CHARTTIME"] <= stay["DISCHTIME"]
        else:  # between stays, not during one
            assert not any(
                stay["SUBJECT_ID"] == note["SUBJECT_ID"]
                and stay["ADMITTIME"][:10] < note["CHARTDATE"] < stay["DISCHTIME"][:10]
                for stay in stays.values()
            )


def test_words_of_the_clinic_are_there_and_words_of_the_label_are_not(hospital: Hospital) -> None:
    notes = [note for note in hospital["NOTEEVENTS"] if not note["ISERROR"]]
    text = "\n".join(note["TEXT"] for note in notes).lower()
    for phrase in (
        "blood loss",
        "shingles",
        "zoster vaccine",
        "denies",
        "family history",
        "mg po",
        "furosemide",
    ):
        assert text.count(phrase) > 3, phrase
    assert "readmi" not in text
    assert "{" not in text
    assert 1500 < len(set(re.findall(r"[a-z]{2,}", text))) < 3000
    summaries = [n["TEXT"] for n in notes if n["DESCRIPTION"] == "Report" and n["CATEGORY"] == "Discharge summary"]
    assert 300 < np.mean([len(summary.split()) for summary in summaries]) < 450
    early = [n for n in notes if n["CHARTTIME"] and n["CATEGORY"] != "Discharge summary"]
    assert not any(re.search(r"expired|passed away|pronounced dead", n["TEXT"].lower()) for n in early)


def test_every_template_can_be_filled_in() -> None:
    rng = synthetic.derived(0, "templates", 0)
    names = "he He him his His himself spouse year past_year complaint creat discharge_day"
    facts = dict.fromkeys(names.split(), "x")
    for level in (-9.0, 0.0, 9.0):
        dials = dict.fromkeys((slot.dial for slot in synthetic_notes.GRADED.values()), level)
        scribe = synthetic.Scribe(rng, facts, dials)
        variants: Iterable[str] = [
            *(v for slot in synthetic_notes.GRADED.values() for options in slot.levels for v in options),
            *(v for options in synthetic_notes.LEXICON.values() for v in options),
            *(v for p in synthetic_notes.PROBLEMS.values() for v in p.story + p.course + p.procedure + p.complaint),
            *(v for c in synthetic_notes.CONDITIONS.values() for v in c.history + c.medicines),
            *synthetic_notes.DEATH_COURSE,
        ]
        for variant in variants:
            assert "{" not in scribe.one((variant,))


def readmission_labels(admissions: list[Row]) -> dict[str, bool]:
    """HADM_ID → whether the next unplanned admission begins within 30 days, for index admissions only."""
    labels = {}
    for number, stay in enumerate(admissions):
        if stay["ADMISSION_TYPE"] == "NEWBORN" or stay["DEATHTIME"]:
            continue
        following = [
            moment(later["ADMITTIME"]) - moment(stay["DISCHTIME"])
            for later in admissions[number + 1 :]
            if later["SUBJECT_ID"] == stay["SUBJECT_ID"] and later["ADMISSION_TYPE"] in ("EMERGENCY", "URGENT")
        ]
        labels[stay["HADM_ID"]] = bool(following) and following[0] < timedelta(days=30)
    return labels


def held_out_auroc(texts: list[str], labels: list[bool], patients: list[int]) -> float:
    """AUROC of TF-IDF and logistic regression on patients 0 and 1 modulo 5, trained on the others."""
    test = np.array(patients) % 5 < 2
    vectors = TfidfVectorizer(min_df=3, sublinear_tf=True)
    train_X = vectors.fit_transform([text for text, held in zip(texts, test, strict=True) if not held])
    test_X = vectors.transform([text for text, held in zip(texts, test, strict=True) if held])
    y = np.array(labels)
    model = LogisticRegression(class_weight="balanced").fit(train_X, y[~test])
    return float(roc_auc_score(y[test], model.predict_proba(test_X)[:, 1]))


def test_outcomes_can_be_read_from_notes_but_not_surely() -> None:
    summaries, readmitted, risk, who = [], [], [], []
    early, died, died_who = [], [], []
    for index in range(600):
        patient = synthetic.patient(3, index)
        notes = [note for note in synthetic.notes(3, index, patient) if not note.is_error]
        for number, stay in enumerate(patient.stays):
            of_stay = [note for note in notes if note.stay == number]
            summary = [n.text for n in of_stay if n.category == "Discharge summary" and n.description == "Report"]
            if stay.is_index and summary:
                summaries.append(summary[-1])
                readmitted.append(patient.is_readmitted(stay))
                risk.append(stay.readmission_risk)
                who.append(index)
            if stay.kind != "NEWBORN":
                limit = stay.admit + timedelta(hours=48)
                early.append("\n".join(n.text for n in of_stay if n.time and n.time <= limit))
                died.append(stay.died)
                died_who.append(index)
    assert 1.5 < len(summaries) / 600 < 2.1
    assert 0.17 < np.mean(readmitted) < 0.27
    assert 0.04 < np.mean(died) < 0.12
    assert 0.80 < roc_auc_score(readmitted, risk) < 0.92
    assert 0.62 < held_out_auroc(summaries, readmitted, who) < 0.93
    assert 0.62 < held_out_auroc(early, died, died_who) < 0.95


def test_recipe_refuses_nonsense_and_foreign_tables_are_safe(tmp_path: Path) -> None:
    from cluster.config import load

    with pytest.raises(ConfigError, match="patients"):
        load(HospitalRecipe, ["out=x", "patients=0"], positional=None)
    real = tmp_path / "NOTEEVENTS.csv.gz"
    with gzip.open(real, "wb") as stream:  # as PhysioNet ships it: with a time in the header
        stream.write(b"precious")
    with pytest.raises(DataError, match="choose another"):
        write_hospital(HospitalRecipe(out=str(tmp_path), patients=1))
    assert gzip.decompress(real.read_bytes()) == b"precious"


def test_interrupted_run_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hospital(HospitalRecipe(out=str(tmp_path), patients=5), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_very_old_are_shifted_whatever_the_day_of_birth() -> None:
    # 300 years before a leap day there may be none.
    patients = [synthetic.patient(11, index) for index in range(2000)]
    ages = [who.stays[0].admit.year - who.birth.year for who in patients]
    assert {age > 200 for age in ages} == {True, False}
    assert not any(101 < age < 299 for age in ages)
