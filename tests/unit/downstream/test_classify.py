"""Labelled notes from tables of every kind: the same cohort, one label or several, by note or by patient."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError, DataError
from downstream.tasks import classify
from downstream.tasks.classify import ClassifyTask, cleaned
from downstream.tasks.examples import Cohort
from sharding.clean import CleanConfig, clean
from sharding.dedup import text_digest

SECRET = "confidential"
COLUMNS = ["id", "patient", "note", "kind"]
Rows = Sequence[tuple[Any, ...]]

# Text 2 comes three times, and once in other letters; text 4 has two labels, text 5 none, text 6 one that is dropped.
ROWS: Rows = [
    (1, 10, "knee pain", "ortho"),
    (2, 10, "chest pain", "cardio"),
    (3, 11, "chest pain", "cardio"),
    (4, 11, "Chest  PAIN", "cardio"),
    (5, 12, "cough and chest pain", "cardio"),
    (6, 12, "cough and chest pain", "lungs"),
    (7, 13, "tired", None),
    (8, 14, "dear colleague", "letter"),
    (9, 15, "cough", "lungs"),
    (10, 16, "rash", "skin"),
    (11, 17, None, "skin"),
]


def as_csv(path: Path, rows: Rows) -> bytes:
    written = io.StringIO(newline="")
    csv.writer(written).writerows([COLUMNS, *rows])
    return written.getvalue().encode()


def as_jsonl(path: Path, rows: Rows) -> bytes:
    return "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows).encode()


def as_parquet(path: Path, rows: Rows) -> bytes:
    written = io.BytesIO()
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    # As pandas has it: a column of whole numbers that once held nothing is one of floats.
    columns["patient"] = pa.array(columns["patient"], pa.float64())
    pq.write_table(pa.table(columns), written, row_group_size=2)
    return written.getvalue()


FORMATS: dict[str, tuple[Callable[[Path, Rows], bytes], Callable[[bytes], bytes]]] = {
    "notes.csv": (as_csv, bytes),
    "notes.csv.gz": (as_csv, gzip.compress),
    "notes.jsonl": (as_jsonl, bytes),
    "NOTES.ndjson.bz2": (as_jsonl, bz2.compress),
    "notes.parquet": (as_parquet, bytes),
}


def task(folder: Path, rows: Rows, name: str = "notes.jsonl", **settings: Any) -> ClassifyTask:
    write, pack = FORMATS[name]
    path = folder / name
    path.write_bytes(pack(write(path, rows)))
    named = {"text": "note", "label": "kind", "id": "id", "patient": "patient", **settings}
    return ClassifyTask(url=str(path), **named)


def short(cohort: Cohort) -> list[tuple[str, str, str, Any]]:
    """Ids, text and names of the labels."""
    found = []
    for example in cohort.examples:
        label = example.label
        names: Any = cohort.classes[label] if isinstance(label, int) else [cohort.classes[k] for k in label]
        found.append((example.example_id, example.patient_id, example.text, names))
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_cohort(tmp_path: Path, name: str) -> None:
    cohort = task(tmp_path, ROWS, name, drop_labels=("letter",)).cohort(CleanConfig())
    assert cohort.classes == ("cardio", "lungs", "ortho", "skin")
    assert not cohort.several
    assert short(cohort) == [
        ("1", "10", "knee pain", "ortho"),
        ("2", "10", "chest pain", "cardio"),
        ("9", "15", "cough", "lungs"),
        ("10", "16", "rash", "skin"),
    ]


def test_notes_of_other_classes_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort = task(tmp_path, ROWS, classes=("skin", "ortho")).cohort(CleanConfig())
    assert [(example.example_id, example.label) for example in cohort.examples] == [("1", 1), ("10", 0)]
    assert re.search(r"label not among the classes\W+3\W+2\W+2\b", capsys.readouterr().out)


@pytest.mark.parametrize("case", ["keep", "lower", "flag"])
def test_many_texts_are_cleaned_as_one(case: Any) -> None:
    texts = ["", " \n ", "Knee PAIN\r\n  [**Name (NI) 12**] x\n", "a\n\n b \t c\n", "Fièvre\xa0à 39°", "Knee PAIN"]
    config = CleanConfig(case=case)
    expected = [(text, text_digest(text).hex()) for text in (clean(one, config) for one in texts)]
    assert list(cleaned(texts, config)) == expected


def test_blocks_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = task(tmp_path, ROWS, id=None).cohort(CleanConfig())
    monkeypatch.setattr(classify, "BLOCK_ROWS", 2)
    assert task(tmp_path, ROWS, id=None).cohort(CleanConfig()) == whole


@pytest.mark.parametrize("name", FORMATS)
def test_missing_column_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}.*no.*ward") as raised:
        task(tmp_path, [(1, 1, SECRET, "a")], name, label="ward").cohort(CleanConfig())
    assert "\n" not in str(raised.value)
    assert SECRET not in str(raised.value)


def test_every_label_of_a_text_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = task(tmp_path, ROWS, several=True, drop_labels=("letter",), top=2)
    cohort = several.cohort(CleanConfig())
    assert cohort.several
    assert cohort.classes == ("cardio", "lungs")
    assert short(cohort) == [
        ("1", "10", "knee pain", []),  # labelled, with none of the classes: a negative for both
        ("2", "10", "chest pain", ["cardio"]),
        ("5", "12", "cough and chest pain", ["cardio", "lungs"]),
        ("8", "14", "dear colleague", []),  # its label does not count, but somebody has labelled it
        ("9", "15", "cough", ["lungs"]),
        ("10", "16", "rash", []),
    ]
    assert [example.label for example in cohort.examples] == [(), (0,), (0, 1), (), (1,), ()]
    assert "more than one label" not in capsys.readouterr().out
    with pytest.raises(DataError, match="no note has the label 'letter'; check"):
        several.model_copy(update={"classes": ("letter", "skin"), "top": None}).cohort(CleanConfig())
    with pytest.raises(DataError, match="1 class in column kind is left"):
        several.model_copy(update={"classes": ("skin",), "top": None}).cohort(CleanConfig())


@pytest.mark.parametrize("name", ["notes.jsonl", "notes.parquet"])
def test_lists_are_labels(tmp_path: Path, name: str) -> None:
    rows = [(1, 1, "a b", ["lungs", " heart ", None]), (2, 2, "a c", []), (3, 3, "a d", ["heart"]), (4, 4, "a e", None)]
    cohort = task(tmp_path, rows, name, several=True).cohort(CleanConfig())
    assert short(cohort) == [("1", "1", "a b", ["heart", "lungs"]), ("3", "3", "a d", ["heart"])]


def test_separator_parts_the_labels_of_a_cell(tmp_path: Path) -> None:
    rows = [(1, 1, "a b", "heart | lungs|"), (2, 2, "a c", "lungs"), (3, 3, "a d", "|")]
    cohort = task(tmp_path, rows, "notes.csv", several=True, separator="|").cohort(CleanConfig())
    assert short(cohort) == [("1", "1", "a b", ["lungs", "heart"]), ("2", "2", "a c", ["lungs"])]
    one = task(tmp_path, [*rows, (4, 4, "a f", "heart")], "notes.csv", separator="|").cohort(CleanConfig())
    assert [example.example_id for example in one.examples] == [
        "2",
        "4",
    ]  # with one label a note, the first has too many


def test_a_patients_notes_are_one_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        (1, "ann", "first", "ill"),
        (2, "bob", "hale", "well"),
        (3, "ann", "second", None),  # of the patient all the same
        (4, "ann", "first", "ill"),  # once is enough
        (5, "cleo", "here", "ill"),
        (6, "cleo", "there", "well"),
        (7, "dan", "what", None),
        (8, "bob", "hearty", "dead"),
    ]
    patients = task(tmp_path, rows, per="patient", drop_labels=("dead",))
    cohort = patients.cohort(CleanConfig())
    assert short(cohort) == [("ann", "ann", "first\n\nsecond", "ill"), ("bob", "bob", "hale\n\nhearty", "well")]
    printed = capsys.readouterr().out
    assert re.search(r"no label, or a dropped label\W+1\W+3\W+3\b", printed)  # dan
    assert re.search(r"more than one label\W+1\W+2\W+2\b", printed)  # cleo
    both = patients.model_copy(update={"several": True}).cohort(CleanConfig())
    assert short(both)[2] == ("cleo", "cleo", "here\n\nthere", ["ill", "well"])
    with pytest.raises(ConfigError, match=r"task\.patient must name the column"):
        patients.model_copy(update={"patient": None}).cohort(CleanConfig())


def test_without_patients_equal_texts_are_one(tmp_path: Path) -> None:
    cohort = task(tmp_path, ROWS, id=None, patient=None).cohort(CleanConfig())
    assert [example.example_id for example in cohort.examples] == ["1", "2", "8", "9", "10"]  # record numbers
    assert len({example.patient_id for example in cohort.examples}) == 5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((1, 2, [SECRET], "a"), "row 2: note is a list, not text"),
        ((1, [2], SECRET, "a"), "row 2: patient is a list, not text"),
        ((1, " ", SECRET, "a"), "row 2: empty patient; every note needs one"),
        ((None, 2, SECRET, "a"), "row 2: empty id; every note needs one"),
        ((1, 2, SECRET, {"a": 1}), "row 2: kind holds no text"),
    ],
)
def test_unfit_cells_are_one_line_without_text(tmp_path: Path, row: tuple[Any, ...], said: str) -> None:
    with pytest.raises(DataError, match=said) as raised:
        task(tmp_path, [(1, 1, "x", "a"), row]).cohort(CleanConfig())
    assert SECRET not in str(raised.value)
