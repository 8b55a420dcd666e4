"""The bar to clear: TF-IDF of words and word pairs, and logistic regression, on the same texts and splits.

Vocabulary and document frequencies come from the training notes only; the regularization is chosen on
validation, with the number that also chooses the fine-tuned model's epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from downstream.metrics import Floats, Ints, selection
from downstream.tasks.examples import Example

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # inverse regularization C
MAX_FEATURES = 100_000


class Baseline(NamedTuple):
    """Probabilities [N, K] by split, and the C that validation chose."""

    probabilities: dict[str, Floats]
    strength: float


def tfidf_regression(splits: Mapping[str, Sequence[Example]]) -> Baseline:
    """Fits on `train`, chooses C on `valid`, predicts `valid` and `test`."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=MAX_FEATURES)
    features = {"train": vectorizer.fit_transform(e.text for e in splits["train"])}
    for name in ("valid", "test"):
        features[name] = vectorizer.transform(e.text for e in splits[name])
    train_labels, valid_labels = labels_of(splits["train"]), labels_of(splits["valid"])
    best: tuple[float, float, LogisticRegression] | None = None
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
        model.fit(features["train"], train_labels)
        score = selection(valid_labels, model.predict_proba(features["valid"]))
        if best is None or score > best[0]:
            best = score, strength, model
    assert best is not None
    _, strength, model = best
    return Baseline({name: model.predict_proba(features[name]) for name in ("valid", "test")}, strength)


def labels_of(examples: Sequence[Example]) -> Ints:
    """Labels [N]."""
    return np.array([example.label for example in examples], dtype=np.int64)
