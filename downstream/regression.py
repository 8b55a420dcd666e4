"""Logistic regression on many features of few notes: its weights, what it says, and how strong it is held.

A label is one of several classes (int [N]) or each class is yes or no (int [N, K]).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse as sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.multiclass import OneVsRestClassifier

from downstream.metrics import Floats, Ints, selection

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # inverse regularization C
MANY = 1000  # notes

Features: TypeAlias = sparse.csr_matrix | Floats  # [N, features]


def regress(features: Features, labels: Ints, strength: float) -> dict[str, Any]:
    """`weight`, `bias` and `several` of a balanced logistic regression."""
    one = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000, tol=1e-3)
    if few := _few(features):
        wide = features
        features, base_NR = _spanned(wide)
        one.tol = 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if labels.ndim == 2:
            many = OneVsRestClassifier(one).fit(features, labels).estimators_
            weight, bias = np.concatenate([m.coef_ for m in many]), np.concatenate([m.intercept_ for m in many])
        else:
            one.fit(features, labels)
            weight, bias = one.coef_, one.intercept_
    if few:
        weight = (wide.T @ (base_NR @ weight.T)).T
    return {"weight": weight, "bias": bias, "several": np.array(labels.ndim == 2)}


def probabilities(found: Mapping[str, Any], features: Features) -> Floats:
    """Probabilities [N, K] of rows of features, by what `regress` found."""
    logits_NK = features @ found["weight"].T + found["bias"]
    if found["several"]:
        alone: Floats = 1 / (1 + np.exp(-logits_NK))
        return alone
    if logits_NK.shape[1] == 1:
        logits_NK = np.concatenate([np.zeros_like(logits_NK), logits_NK], 1)
    raised = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    said: Floats = raised / raised.sum(1, keepdims=True)
    return said


class Choice(NamedTuple):
    """A C, its score, and what is said with it of each note by a fit without that note [N, K]; None where a class is
    missing in a fold.
    """

    strength: float
    score: float
    said_NK: Floats | None


def chosen(
    features: sparse.csr_matrix, labels: Ints, patients: Sequence[str], strengths: Sequence[float], seed: int
) -> Choice:
    """The C with the best score of predictions out of five folds by patient (three of many notes): with some hundred
    labels a fifth of them alone is a bad guide.
    """
    rows = _spanned(features)[0] if _few(features) else features
    cuts = cuts_of(labels, patients, seed)
    order = np.concatenate([left for _, left in cuts])
    best: Choice | None = None
    for strength in strengths:
        said = []
        for learned, left in cuts:
            said.append(probabilities(regress(rows[learned], labels[learned], strength), rows[left]))
        if len({one.shape[1] for one in said}) > 1:
            return Choice(strength, 0.0, None)  # too few notes to choose
        joined_NK = np.concatenate(said)
        score = selection(labels[order], joined_NK)
        if best is None or score > best.score:
            best = Choice(strength, score, joined_NK[np.argsort(order)])
    assert best is not None
    return best


def cuts_of(labels: Ints, patients: Sequence[str], seed: int) -> list[tuple[Ints, Ints]]:
    """Folds by patient (learned from, left out): five, or three of many notes."""
    strata = labels if labels.ndim == 1 else labels.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer notes than folds
        cutter = StratifiedGroupKFold(5 if len(labels) < MANY else 3, shuffle=True, random_state=seed)
        return list(cutter.split(strata, strata, patients))


def _few(features: Features) -> bool:
    return bool(features.shape[0] < min(MANY, features.shape[1]))


def _spanned(features: Features) -> tuple[Floats, Floats]:
    """The rows [N, R] in an orthonormal base of what they span, and that base [N, R] as sums of rows. Products of rows
    stay, and with them the regression: with a hundred words for every note it is found many times as fast.
    """
    if isinstance(features, np.ndarray):
        values_R, vectors_NR = np.linalg.eigh(features @ features.T)
    else:
        values_R, vectors_NR = np.linalg.eigh((features @ features.T).toarray())
    kept = values_R > 1e-10 * values_R[-1]
    root_R = np.sqrt(values_R[kept])
    return vectors_NR[:, kept] * root_R, vectors_NR[:, kept] / root_R
