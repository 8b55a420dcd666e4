"""Leaks that were planted are found, every one, and clean data raises no alarm."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.errors import DataError
from downstream import leakage
from downstream.tasks.classify import ClassifyTask
from downstream.tasks.examples import Example
from pretrain.run import Trained, hashed
from sharding.clean import CleanConfig

MTSAMPLES = Path(os.environ.get("CHARTLM_DATA", "absent")) / "mtsamples" / "mtsamples.csv"
SPLITS = {
    "train": [Example("1", "p", "", 0)],
    "valid": [Example("2", "q", "", 0)],
    "test": [Example("3", "r", "", 0), Example("4", "s", "", 1)],
}


def read(**patients: str) -> Trained:
    known = {split: frozenset(map(hashed, ids)) for split, ids in patients.items()}
    return SimpleNamespace(run="run", patients=known)  # type: ignore[return-value]


def test_a_patient_whom_the_language_model_has_read() -> None:
    for harmless in (read(), read(train="px", valid="pq")):
        leakage.check_unseen(SPLITS, harmless)
    for leak, said in (
        (read(train="pr"), r"1 of the 2 patients of test \(such as r\)"),
        (read(train="p", valid="rs"), r"2 of the 2 patients of test \(such as r\)"),
        (read(train="q"), r"1 of the 1 patients of valid \(such as q\)"),
    ):
        with pytest.raises(DataError, match=f"{said} are among those whose notes the language model has read"):
            leakage.check_unseen(SPLITS, leak)


def test_a_patient_in_two_splits() -> None:
    leakage.check_patients(SPLITS)
    with pytest.raises(DataError, match="patient p is in train and in test"):
        leakage.check_patients(SPLITS | {"test": [Example("5", "p", "", 0)]})


@pytest.mark.parametrize("changed", [0.0, 0.02])
def test_a_copied_note(changed: float) -> None:
    """Also one of which some words were changed; not one that shares half of its text."""
    draws = random.Random(1)
    notes = [[f"w{draws.randrange(3000)}" for _ in range(300)] for _ in range(60)]
    copy = [word if draws.random() >= changed else "other" for word in notes[7]]
    halves = notes[8][:150] + [f"v{n}" for n in range(150)]
    texts = [" ".join(words) for words in [*notes, halves, copy]]
    examples = [Example(str(n), f"p{n}", text, 0) for n, text in enumerate(texts)]
    clean = {"train": examples[:40], "test": examples[40:61]}
    assert leakage.copies([clean]) == []
    leakage.check_copies([clean])
    planted = {"train": examples[:40], "test": examples[40:]}
    assert [(a, b.example_id, c, d.example_id) for a, b, c, d in leakage.copies([planted])] == [
        ("test", "61", "train", "7")
    ]
    with pytest.raises(
        DataError, match="1 notes are nearly the same as one of another split, such as 61 in test and 7"
    ):
        leakage.check_copies([planted])


def test_a_copy_counts_where_a_fold_parts_it_from_its_original() -> None:
    text = " ".join(f"w{n}" for n in range(80))
    one, copy = Example("1", "p", text, 0), Example("2", "q", f"{text} more", 0)
    together: leakage.Splits = {"train": [one, copy], "test": []}
    assert leakage.copies([together, together]) == []
    apart: leakage.Splits = {"train": [copy], "test": [one]}
    assert [found[1].example_id for found in leakage.copies([together, apart])] == ["2"]


def test_a_note_the_language_model_would_read_that_is_one_of_test() -> None:
    text = " ".join(f"w{n}" for n in range(80))
    test = [Example("1", "p", text, 0), Example("1b", "p", text, 1)]
    leakage.check_unlabelled(test, [("q", " ".join(f"v{n}" for n in range(80)))])
    with pytest.raises(
        DataError, match=r"1 notes of lm\.notes are nearly the same as one of test, such as one of .* r "
    ):
        leakage.check_unlabelled(test, [("q", "short"), ("r", f"{text} more")])


@pytest.mark.skipif(not MTSAMPLES.exists(), reason="CHARTLM_DATA with mtsamples is not there")
def test_real_notes_raise_no_alarm() -> None:
    task = ClassifyTask(url=str(MTSAMPLES), text="transcription", label="medical_specialty")
    examples = task.cohort(CleanConfig()).examples
    assert leakage.copies([{"train": examples[::2], "test": examples[1::2]}]) == []
