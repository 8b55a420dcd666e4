"""Folds test every patient once, keep patients together, and use as many labels as they are told."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from downstream.folds import by_corpus, from_file, k_folds
from downstream.tasks.examples import Cohort, Example
from downstream.tasks.table import cells, records
from sharding.splits import SplitConfig


def cohort(notes: int = 120) -> Cohort:
    """Two notes a patient; a third of the notes are positive."""
    examples = [Example(f"n{n}", f"p{n // 2}", f"text {n}", int(n // 2 % 3 == 0)) for n in range(notes)]
    return Cohort(examples, ("no", "yes"))


def test_every_patient_is_tested_once_and_never_learned_from_there() -> None:
    found = k_folds(cohort(), 5, 2, None, 1)
    assert [fold.name for fold in found[:6]] == ["1.1", "1.2", "1.3", "1.4", "1.5", "2.1"]
    for repeat in (found[:5], found[5:]):
        assert sorted(e.example_id for fold in repeat for e in fold.test) == sorted(f"n{n}" for n in range(120))
    for fold in found:
        parts = [{e.patient_id for e in part} for part in (fold.train, fold.valid, fold.test)]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
        assert fold.held_out == parts[2]
        assert np.mean([e.label for e in fold.test]) == pytest.approx(1 / 3, abs=0.1)  # stratified
    assert [e.example_id for e in found[0].test] != [e.example_id for e in found[5].test]
    again = k_folds(cohort(), 5, 2, None, 1)
    assert again == found != k_folds(cohort(), 5, 2, None, 2)


def test_few_labels_are_drawn_class_by_class_and_the_others_stay_without() -> None:
    for fold in k_folds(cohort(), 4, 1, 30, 1):
        labelled = [*fold.train, *fold.valid]
        assert len(labelled) == 30
        assert sum(e.label == 1 for e in labelled) == 10
        assert len(labelled) + len(fold.rest) + len(fold.test) == 120
        assert not {e.example_id for e in labelled} & {e.example_id for e in fold.rest}
    with pytest.raises(ConfigError, match="labels=500: fold 1 has only 96 notes"):
        k_folds(cohort(), 5, 1, 500, 1)
    with pytest.raises(DataError, match="class 'no' has 4 patients, too few for folds=5"):
        k_folds(cohort(12), 5, 1, None, 1)


def test_folds_of_somebody_else(tmp_path: Path) -> None:
    """Also who is not of the cohort is held out of what the language model reads."""
    path = tmp_path / "folds.csv"
    rows = "".join(f"p{n},{'ab'[n % 2]}\n" for n in range(60))
    path.write_text(f"patient,fold\n{rows}stranger,a\n")
    found = from_file(cohort(), str(path), None, 1)
    assert [fold.name for fold in found] == ["a", "b"]
    assert "stranger" in found[0].held_out
    assert {e.patient_id for e in found[0].test} == {f"p{n}" for n in range(0, 60, 2)}
    path.write_text("patient,fold\np0,a\np1,b\n")
    with pytest.raises(DataError, match="has no fold for patient p2"):
        from_file(cohort(), str(path), None, 1)


def test_the_cut_of_the_corpus() -> None:
    [fold] = by_corpus(cohort(), SplitConfig(valid=0.2, test=0.3))
    assert len(fold.train) + len(fold.valid) + len(fold.test) == 120
    assert fold.held_out == {e.patient_id for e in (*fold.valid, *fold.test)}


def test_several_labels_are_stratified_by_the_rarest() -> None:
    examples = [Example(f"n{n}", f"p{n}", "t", (0, 1) if n % 10 == 0 else (0,)) for n in range(100)]
    for fold in k_folds(Cohort(examples, ("a", "b"), True), 5, 1, None, 1):
        assert sum(1 in e.label for e in fold.test) == 2  # type: ignore[operator]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "confidential"', "line 1 is not JSON"),
        (b'{"a": 1}\n["confidential"]', "line 2 is not a JSON object"),
        (b'{"text": "confidential \\ud83d"}', "line 1 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b'{"confidential": 1}', "no line has the key text"),
    ],
)
def test_broken_json_lines_are_named_by_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as stopped:
        list(cells(str(path), ["text"]))
    assert "confidential" not in str(stopped.value)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n' * 10_000)[:-40])
    with pytest.raises(DataError, match=r"ends or breaks after line \d+; compare its checksum"):
        list(records(str(path)))


def test_a_key_may_be_left_out_where_there_is_nothing_to_say(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "one", "label": 3.0}\n\n{"text": "two"}\n')
    assert list(cells(str(path), ["text", "label"])) == [("one", "3"), ("two", "")]
