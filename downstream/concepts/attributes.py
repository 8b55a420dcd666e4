"""What is said of a mention, learned: one logistic regression for each attribute, on its features (features.py).

Attributes are learned from the spans that have them, so that corpora that label other things train together. With few
labels the rules carry it; with many the words correct them. Mentions of other corpora may be learned from besides: what
is said of a disease there is written otherwise and annotated otherwise, so each counts little, as much as helps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
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
WEIGHTS = (0.03, 0.1)  # of a mention of other corpora
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of what tuned models say, beside the regression
TIE = 0.005  # macro-F1
OFFSETS = np.linspace(-2, 4, 25)
LEAST = -20.0  # log-probability
FEW = 5  # mentions of a label; of one with fewer nothing is concluded
SAYS = 0.95  # of a label's mentions have another value than most: it says the value itself; some are annotated wrongly
ARRAYS = ("rows", "weights", "states", "bias", "offsets", "share")


class _Rows(NamedTuple):
    """What a regression is fitted to."""

    words: sparse.csr_matrix
    states_NP: Floats
    truth_N: np.ndarray

    @classmethod
    def of(cls, examples: Examples, name: str, kinds: bool) -> _Rows:
        return cls(_words(examples, kinds), examples.states_NP, _truth(examples, name))

    def at(self, places: Ints) -> _Rows:
        return _Rows(*(one[places] for one in self))


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
    def fit(cls, examples: Examples, name: str, kinds: bool, others: Examples | None = None) -> Regression:
        """How much the states count, and the offsets, are those of the best macro-F1 on the documents that were left
        out in turn. Mentions of other corpora, and tuned models, count as much as finds the truth there the likeliest,
        if macro-F1 is higher with them.
        """
        known, beside = _Rows.of(examples, name, kinds), _Rows.of(others, name, kinds) if others else None
        classes, places_N = np.unique(known.truth_N, return_inverse=True)
        parts = _parts(known.truth_N, examples.documents)
        seen = np.concatenate([np.zeros(0, int), *(held for _, held in parts)])
        truth_N = places_N[seen]

        def left_out(scale: float, weight: float) -> Floats:
            logs_NK = [np.zeros((0, len(classes)))]
            for rows, held in parts:
                fitted, asked = cls._fitted(kinds, known.at(rows), scale, beside, weight), known.at(held)
                logs_NK.append(fitted._logs(asked.words, asked.states_NP))
            return np.concatenate(logs_NK)

        tried = {scale: left_out(scale, 0.0) for scale in (SCALES if known.states_NP.shape[1] else SCALES[:1])}
        scores = {scale: _offsets(logs_NK, truth_N)[1] for scale, logs_NK in tried.items()}
        # Of nearly equal ones the least: with few mentions of a value the differences are chance.
        scale = next(one for one in tried if scores[one] >= max(scores.values()) - TIE)
        weighed = {0.0: tried[scale]}
        if beside:
            weighed |= {weight: left_out(scale, weight) for weight in WEIGHTS}
        weight = _likeliest(weighed, truth_N)
        tuned_NK = _columns(examples, name, classes)
        mixed = {0.0: weighed[weight]}
        if tuned_NK is not None:
            mixed = {share: _mixed(weighed[weight], tuned_NK[seen], share) for share in SHARES}
        share = _likeliest(mixed, truth_N)
        fitted = cls._fitted(kinds, known, scale, beside, weight)
        return fitted._replace(offsets_K=_offsets(mixed[share], truth_N)[0], share=share)

    @classmethod
    def _fitted(cls, kinds: bool, known: _Rows, scale: float, others: _Rows | None, weight: float) -> Regression:
        learned = [known, others] if others and weight else [known]
        words = sparse.vstack([one.words for one in learned]).tocsr()
        used_U = np.unique(words.indices)  # the other buckets weigh nothing, and solvers are slow with them
        words = words[:, used_U]
        width = known.states_NP.shape[1]
        mean_P, spread_P = np.zeros(width), np.ones(width)
        if scale:
            mean_P, spread_P = known.states_NP.mean(0), (known.states_NP.std(0) + 1e-6) * width**0.5 / scale
            states_NP = np.concatenate([(one.states_NP - mean_P) / spread_P for one in learned])
            words = sparse.hstack([words, sparse.csr_matrix(states_NP)]).tocsr()
        truth_N = np.concatenate([one.truth_N for one in learned])
        counts_N = np.repeat([1.0, weight][: len(learned)], [len(one.truth_N) for one in learned])
        solver = "liblinear" if len(set(truth_N)) == 2 else "lbfgs"  # the former is faster, of two classes only
        one = LogisticRegression(C=C, max_iter=400, solver=solver).fit(words, truth_N, counts_N)
        weights_BK, states_PK = np.zeros((BUCKETS, len(one.coef_))), np.zeros((width, len(one.coef_)))
        weights_BK[used_U] = one.coef_.T[: len(used_U)]
        if scale:
            states_PK = one.coef_.T[len(used_U) :] / spread_P[:, None]
        bias_K = one.intercept_ - mean_P @ states_PK
        return cls(kinds, weights_BK, states_PK, bias_K, np.zeros(len(one.classes_)))

    def logs(self, examples: Examples) -> Floats:
        """Log-probabilities [N, classes] without tuned models, none below -20."""
        return self._logs(_words(examples, self.kinds), examples.states_NP)

    def _logs(self, words: sparse.csr_matrix, states_NP: Floats) -> Floats:
        scores = np.asarray(words @ self.weights_BK) + states_NP @ self.states_PK + self.bias_K
        if scores.shape[1] == 1:
            scores = np.concatenate([np.zeros_like(scores), scores], 1)
        logs: Floats = np.maximum(scores - logsumexp(scores, 1, keepdims=True), LEAST)
        return logs


def _words(examples: Examples, kinds: bool) -> sparse.csr_matrix:
    return examples.words + examples.kinds if kinds else examples.words


def _truth(examples: Examples, name: str) -> np.ndarray:
    return np.array([span.attributes[name] for span in examples.spans])


def _parts(truth_N: np.ndarray, documents: np.ndarray) -> list[tuple[Ints, Ints]]:
    """Mentions to learn from and to leave out, by document; none where the documents are few."""
    if len(set(documents)) < PARTS:
        return []
    parts = GroupKFold(PARTS).split(truth_N, truth_N, documents)
    return [(rows, held) for rows, held in parts if len(set(truth_N[rows])) == len(set(truth_N))]


def _likeliest(tried: Mapping[float, Floats], truth_N: Ints) -> float:
    """Of log-probabilities [N, classes] those that find the truth the likeliest, where their macro-F1 is above that of
    the first: one of several F1 is the highest by chance, as it counts few mentions, and the likelihood all of them.
    """
    first = next(iter(tried))
    found = max(tried, key=lambda one: tried[one][np.arange(len(truth_N)), truth_N].sum())
    return max((first, found), key=lambda one: _offsets(tried[one], truth_N)[1])


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
    def fit(cls, examples: Examples, name: str, others: Examples | None = None) -> Attribute:
        """Learned from the examples, which all have the attribute, of at least two values, and from those of others
        that have one of these values.
        """
        truth = _truth(examples, name)
        classes = tuple(map(str, np.unique(truth)))
        if others:
            places = [i for i, span in enumerate(others.spans) if span.attributes.get(name) in classes]
            others = others.rows(np.array(places)) if places else None
        found = cls(classes, Regression.fit(examples, name, False, others))
        labels = _labels_that_help(examples, truth)
        if not labels:
            return found
        return found._replace(told=Regression.fit(examples, name, True, others), labels=labels)

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
    def fit(
        cls, examples: Examples, others: Examples | None = None, passed: Callable[[str], None] | None = None
    ) -> Attributes:
        """One for each attribute of which two values occur in the examples; other attributes are left to the rules.
        `passed` hears the name of each that is learned.
        """
        havings = {
            name: examples.having(name)
            for name in sorted({name for span in examples.spans for name in span.attributes})
        }
        names = [name for name, having in havings.items() if len({span.attributes[name] for span in having.spans}) > 1]
        found = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # solvers let others calculate meanwhile
            for name, one in zip(names, pool.map(lambda n: Attribute.fit(havings[n], n, others), names), strict=True):
                found[name] = one
                if passed:
                    passed(name)
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
