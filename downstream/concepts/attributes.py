"""What is said of a mention, learned: one logistic regression for each attribute, on its features (features.py).

Attributes are learned from the spans that have them, so that corpora that label other things train together. With few
labels the rules carry it; with many the words correct them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sparse
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold

from downstream.concepts.features import BUCKETS, Examples
from downstream.metrics import Floats, Ints

C = 1.0  # inverse regularization
PARTS = 4  # of documents, for the offsets and the scale
SCALES = (0.0, 1.0, 3.0)  # of the states
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of what tuned models say, beside the regression
TIE = 0.005  # macro-F1
OFFSETS = np.linspace(-2, 4, 25)
LEAST = -20.0  # log-probability
FEW = 5  # mentions of a label; of one with fewer nothing is concluded
SAYS = 0.95  # of a label's mentions have another value than most: it says the value itself; some are annotated wrongly
ARRAYS = ("rows", "weights", "states", "bias", "offsets", "share")


class Regression(NamedTuple):
    """A weight per bucket and class (two classes: of the second), another per number of the states. `offsets_K` are
    added to log-probabilities before one is chosen: rare values, as "uncertain", are never likelier than not. With
    `kinds` the label of a mention is told too. What tuned models say has a `share` in the log-probabilities.
    """

    kinds: bool
    weights_BK: Floats
    states_PK: Floats
    bias_K: Floats
    offsets_K: Floats
    share: float = 0.0

    @classmethod
    def fit(cls, examples: Examples, truth: np.ndarray, kinds: bool, name: str) -> Regression:
        """How much the states count, and the offsets, are those of the best macro-F1 on the documents that were left
        out in turn. Tuned models count as much as finds the truth there the likeliest, if macro-F1 is higher with them.
        """
        classes, places_N = np.unique(truth, return_inverse=True)
        tried, seen = [], np.zeros(len(truth), bool)
        for scale in SCALES if examples.states_NP.shape[1] else (0.0,):
            log_NK = np.zeros((len(truth), len(classes)))
            if len(set(examples.documents)) >= PARTS:
                for rows, held in GroupKFold(PARTS).split(truth, truth, examples.documents):
                    if len(set(truth[rows])) == len(classes):
                        one = cls._scaled(examples.rows(rows), truth[rows], kinds, scale)
                        log_NK[held] = one.logs(examples.rows(held))
                        seen[held] = True
            tried.append((scale, log_NK, _offsets(log_NK[seen], places_N[seen])[1]))
        # Of nearly equal ones the least: with few mentions of a value the differences are chance.
        enough = max(score for *_, score in tried) - TIE
        scale, log_NK, _ = next(one for one in tried if one[-1] >= enough)
        tuned_NK = _columns(examples, name, classes)
        shares = (0.0,) if tuned_NK is None else SHARES
        mixed = {share: _mixed(log_NK, tuned_NK, share)[seen] for share in shares}
        # One of several F1 is the highest by chance: it counts few mentions, the likelihood all of them.
        likeliest = max(shares, key=lambda one: mixed[one][np.arange(seen.sum()), places_N[seen]].sum())
        found = {share: _offsets(mixed[share], places_N[seen]) for share in (shares[0], likeliest)}
        share = max(found, key=lambda one: found[one][1])
        offsets_K = found[share][0]
        return cls._scaled(examples, truth, kinds, scale)._replace(offsets_K=offsets_K, share=share)

    @classmethod
    def _scaled(cls, examples: Examples, truth: np.ndarray, kinds: bool, scale: float) -> Regression:
        words, states_NP = examples.words + examples.kinds if kinds else examples.words, examples.states_NP
        mean_P, spread_P = np.zeros(states_NP.shape[1]), np.ones(states_NP.shape[1])
        if scale:
            mean_P, spread_P = states_NP.mean(0), (states_NP.std(0) + 1e-6) * states_NP.shape[1] ** 0.5 / scale
            words = sparse.hstack([words, sparse.csr_matrix((states_NP - mean_P) / spread_P)]).tocsr()
        used = {"solver": "liblinear"} if len(set(truth)) == 2 else {}  # ten times as fast, of two classes only
        one = LogisticRegression(C=C, max_iter=400, **used).fit(words, truth)
        weights_BK, states_PK = one.coef_.T[:BUCKETS], np.zeros((states_NP.shape[1], len(one.coef_)))
        if scale:
            states_PK = one.coef_.T[BUCKETS:] / spread_P[:, None]
        bias_K = one.intercept_ - mean_P @ states_PK
        return cls(kinds, weights_BK, states_PK, bias_K, np.zeros(len(one.classes_)))

    def logs(self, examples: Examples) -> Floats:
        """Log-probabilities [N, classes] without tuned models, none below -20."""
        words = examples.words + examples.kinds if self.kinds else examples.words
        scores = np.asarray(words @ self.weights_BK) + examples.states_NP @ self.states_PK + self.bias_K
        if scores.shape[1] == 1:
            scores = np.concatenate([np.zeros_like(scores), scores], 1)
        logs: Floats = np.maximum(scores - logsumexp(scores, 1, keepdims=True), LEAST)
        return logs


def _columns(examples: Examples, name: str, classes: Iterable[str]) -> Floats | None:
    """What tuned models say of an attribute [N, classes], None where there are none."""
    if name not in examples.tuned:
        return None
    nothing = np.full(len(examples.spans), LEAST)
    logs_NK = np.stack([examples.tuned[name].get(one, nothing) for one in classes], 1)
    logs: Floats = np.maximum(logs_NK, LEAST)
    return logs


def _mixed(logs_NK: Floats, tuned_NK: Floats | None, share: float) -> Floats:
    """The two in these shares, log-probabilities again."""
    if tuned_NK is None or not share:
        return logs_NK
    both_NK = (1 - share) * logs_NK + share * tuned_NK
    mixed: Floats = both_NK - logsumexp(both_NK, 1, keepdims=True)
    return mixed


class Attribute(NamedTuple):
    """A learned attribute. Where labels help, a mention with one of those that were learned from is read by `told`."""

    classes: tuple[str, ...]
    general: Regression
    told: Regression | None = None
    labels: frozenset[str] = frozenset()

    @classmethod
    def fit(cls, examples: Examples, name: str) -> Attribute:
        """Learned from the examples that have the attribute, of at least two values."""
        truth = np.array([span.attributes[name] for span in examples.spans])
        found = cls(tuple(map(str, np.unique(truth))), Regression.fit(examples, truth, False, name))
        labels = _labels_that_help(examples, truth)
        return found._replace(told=Regression.fit(examples, truth, True, name), labels=labels) if labels else found

    def __call__(self, examples: Examples, name: str) -> tuple[Floats, Ints]:
        """Log-probabilities [N, classes], and of each mention the place in `classes` of the chosen value."""
        tuned_NK = _columns(examples, name, self.classes)
        logs_NK = _mixed(self.general.logs(examples), tuned_NK, self.general.share)
        offsets_NK = np.tile(self.general.offsets_K, (len(logs_NK), 1))
        if self.told:
            known = np.array([span.label in self.labels for span in examples.spans])
            logs_NK[known] = _mixed(self.told.logs(examples), tuned_NK, self.told.share)[known]
            offsets_NK[known] = self.told.offsets_K
        return logs_NK, (logs_NK + offsets_NK).argmax(1)


def _labels_that_help(examples: Examples, truth: np.ndarray) -> frozenset[str]:
    """The labels, where there are two or more and none says the value itself, as MACCROBAT's History does: notes to be
    read would not have that one.
    """
    labels = np.array([span.label for span in examples.spans])
    names, counts = np.unique(labels, return_counts=True)
    values, times = np.unique(truth, return_counts=True)
    usual = values[times.argmax()]
    known = names[counts >= FEW]
    if len(known) < 2 or any((truth[labels == name] != usual).mean() >= SAYS for name in known):
        return frozenset()
    return frozenset(map(str, known))


def _offsets(log_NK: Floats, truth_N: np.ndarray) -> tuple[Floats, float]:
    """For every class but the most frequent one what brings most macro-F1, one after the other, and that score."""
    offsets_K, score = np.zeros(log_NK.shape[1]), 0.0
    if not len(truth_N):
        return offsets_K, score
    usual = int(np.bincount(truth_N, minlength=len(offsets_K)).argmax())
    for k in range(len(offsets_K)):
        if k == usual:
            continue
        tried = []
        for step in OFFSETS:
            offsets_K[k] = step
            said_N = (log_NK + offsets_K).argmax(1)
            tried.append(f1_score(truth_N, said_N, average="macro", zero_division=0.0))
        # a plateau's middle: its edges are chance
        best = np.flatnonzero(np.array(tried) >= max(tried) - 1e-9)
        offsets_K[k], score = OFFSETS[best[len(best) // 2]], max(tried)
    return offsets_K, score


class Attributes:
    """Learned attributes by name."""

    def __init__(self, learned: dict[str, Attribute]):
        self.learned = learned

    @classmethod
    def fit(cls, examples: Examples) -> Attributes:
        """One for each attribute of which two values occur; others are left to the rules."""
        found = {}
        for name in sorted({name for span in examples.spans for name in span.attributes}):
            having = examples.having(name)
            if len({span.attributes[name] for span in having.spans}) > 1:
                found[name] = Attribute.fit(having, name)
        return cls(found)

    def __call__(self, examples: Examples) -> list[tuple[dict[str, str], dict[str, float]]]:
        """For every mention its values and their probabilities; what was not learned is what the rules say."""
        said = [(dict(mention.rules), dict[str, float]()) for mention in examples.mentions]
        for name, attribute in self.learned.items():
            logs_NK, best_N = attribute(examples, name)
            for (values, scores), logs_K, best in zip(said, logs_NK, best_N, strict=True):
                values[name], scores[name] = attribute.classes[best], round(float(np.exp(logs_K[best])), 4)
        return said

    def hear_tuned(self) -> bool:
        """Whether what tuned models say counts anywhere."""
        parts = [part for one in self.learned.values() for part in (one.general, one.told) if part]
        return any(part.share for part in parts)

    def arrays(self) -> dict[str, Any]:
        """All of it as arrays: only the buckets that weigh anything are kept."""
        about = {name: (one.classes, sorted(one.labels)) for name, one in self.learned.items()}
        found: dict[str, Any] = {"attributes": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        for name, attribute in self.learned.items():
            for part, one in (("general", attribute.general), ("told", attribute.told)):
                if one:
                    rows = np.flatnonzero(np.abs(one.weights_BK).max(1) > 1e-9)
                    arrays = [rows, one.weights_BK[rows].astype(np.float32), *one[2:]]
                    found |= {f"{name}.{part}.{key}": array for key, array in zip(ARRAYS, arrays, strict=True)}
        return found

    @classmethod
    def of(cls, arrays: Any) -> Attributes:
        """The learned attributes of such arrays."""

        def regression(name: str, kinds: bool) -> Regression:
            part = "told" if kinds else "general"
            rows, kept, states_PK, bias_K, offsets_K, share = (arrays[f"{name}.{part}.{key}"] for key in ARRAYS)
            weights_BK = np.zeros((BUCKETS, kept.shape[1]))
            weights_BK[rows] = kept
            return Regression(kinds, weights_BK, states_PK, bias_K, offsets_K, float(share))

        found = {}
        for name, (classes, labels) in json.loads(bytes(arrays["attributes"])).items():
            told = regression(name, kinds=True) if labels else None
            found[name] = Attribute(tuple(classes), regression(name, kinds=False), told, frozenset(labels))
        return cls(found)
