"""The bars to clear, on the same texts and folds: TF-IDF of words and word pairs with logistic regression, and
majority.

Vocabulary and document frequencies come from the training notes only; the regularization is chosen on validation,
with the number that also chooses the fine-tuned model's stage. Where a task asks about mentions there are two: one is
told where (the words on either side), the other is not (the note and what is asked), as a model that reads notes
would be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from downstream import regression
from downstream.frozen import told
from downstream.metrics import Floats, Ints, selection
from downstream.regression import STRENGTHS
from downstream.tasks.examples import Example

MAX_FEATURES = 100_000
WORD = r"(?u)\b\w\w+\b|\b[lrc]_\S+"


class Baseline(NamedTuple):
    """Probabilities [N, K] by split (of `train` only where it is known by models that have not seen a note), and the C
    that validation chose.
    """

    probabilities: dict[str, Floats]
    strength: float


def untold(example: Example) -> str:
    """The whole note, and what is asked."""
    return f"{example.text} asked_{example.query.split(',')[0].replace(' ', '_')}"


def tfidf_regression(
    splits: Mapping[str, Sequence[Example]],
    classes: int,
    several: bool,
    text_of: Callable[[Example], str] = told,
    refit: bool = False,
) -> Baseline:
    """Fits on `train`, chooses C on `valid`, predicts `valid` and `test`; with `refit` the test notes by a fit on
    train and valid, as the frozen mode has it.
    """
    labels = {name: labels_of(examples, classes, several) for name, examples in splits.items()}
    texts = {name: [text_of(example) for example in examples] for name, examples in splits.items()}

    @functools.cache
    def fitted(names: tuple[str, ...]) -> tuple[TfidfVectorizer, Any, Ints]:
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=MAX_FEATURES, token_pattern=WORD
        )
        features = vectorizer.fit_transform(text for name in names for text in texts[name])
        return vectorizer, features, np.concatenate([labels[name] for name in names])

    def said(names: tuple[str, ...], strength: float, split: str) -> Floats:
        vectorizer, features, known = fitted(names)
        found = regression.regress(features, known, strength)
        return regression.probabilities(found, vectorizer.transform(texts[split]))

    if not refit:
        strength = max(STRENGTHS, key=lambda one: selection(labels["valid"], said(("train",), one, "valid")))
        return Baseline({name: said(("train",), strength, name) for name in ("valid", "test")}, strength)
    both = ("train", "valid")
    _, features, known = fitted(both)
    patients = [example.patient_id for name in both for example in splits[name]]
    strength, _, said_NK = regression.chosen(features, known, patients, STRENGTHS, 0)
    found = {"test": said(both, strength, "test")}
    if said_NK is None:
        found["valid"] = said(("train",), strength, "valid")
    else:
        found |= {"train": said_NK[: len(labels["train"])], "valid": said_NK[len(labels["train"]) :]}
    return Baseline(found, strength)


def majority(splits: Mapping[str, Sequence[Example]], classes: int, several: bool) -> dict[str, Floats]:
    """By split: how frequent the classes are in training, for every note [N, K]."""
    labels = labels_of(splits["train"], classes, several)
    share_K = labels.mean(0) if several else np.bincount(labels, minlength=classes) / len(labels)
    return {name: np.tile(share_K, (len(splits[name]), 1)) for name in ("valid", "test")}


def labels_of(examples: Sequence[Example], classes: int, several: bool = False) -> Ints:
    """Labels [N]; with several labels a note 0 and 1 [N, K]."""
    if not several:
        return np.array([example.label for example in examples], dtype=np.int64)
    found = np.zeros((len(examples), classes), np.int64)
    for row, example in enumerate(examples):
        found[row, list(example.label)] = 1  # type: ignore[arg-type]
    return found
