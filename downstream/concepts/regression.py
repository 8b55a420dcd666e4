"""One logistic regression of what is said of mentions, on their features (features.py).

How much a language model's states, mentions of other corpora and tuned models count, and from where on a rare value is
said, is chosen by what is said of documents left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import scipy.sparse as sparse
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from downstream.concepts.features import BUCKETS, Examples
from downstream.metrics import Floats, Ints, patient_draws

C = 1.0  # inverse regularization
PARTS = 4  # of documents, for the offsets and the scale
SCALES = (0.0, 1.0, 3.0)  # of the states
WEIGHTS = (0.03, 0.1)  # of a mention of other corpora
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of what tuned models say, beside the regression
OFFSETS = np.linspace(-2, 4, 25)
DRAWS = 100  # of documents
LEAST = -20.0  # log-probability

# What was said of documents left out (log-probabilities [N, classes]) by kinds, scale and weight.
LeftOut: TypeAlias = dict[tuple[bool, float, float], Floats]


class _Rows(NamedTuple):
    """What a regression is fitted to."""

    words: sparse.csr_matrix
    states_NP: Floats
    truth_N: np.ndarray

    @classmethod
    def of(cls, examples: Examples, name: str, kinds: bool) -> _Rows:
        return cls(_words(examples, kinds), examples.states_NP, truth_of(examples, name))

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
    def fit(
        cls,
        examples: Examples,
        name: str,
        kinds: bool,
        others: Examples | None = None,
        left_out: LeftOut | None = None,
    ) -> Regression:
        """The states, then mentions of other corpora, then tuned models count as much as finds the truth the likeliest
        in documents that were left out in turn, and nothing if macro-F1 gains nothing there (of states no more than its
        standard error). What `left_out` holds already, of the same mentions, is not calculated again.
        """
        left_out = {} if left_out is None else left_out
        known, beside = _Rows.of(examples, name, kinds), _Rows.of(others, name, kinds) if others else None
        classes, places_N = np.unique(known.truth_N, return_inverse=True)
        parts = _parts(known.truth_N, examples.documents)
        seen = np.concatenate([np.zeros(0, int), *(held for _, held in parts)])
        truth_N = places_N[seen]
        documents = examples.documents[seen].tolist()
        draws_DN = np.stack([*patient_draws(documents, DRAWS, 0)]) if documents else np.zeros((0, 0))

        def said_of(scale: float, weight: float) -> Floats:
            if (kinds, scale, weight) not in left_out:
                logs_NK = [np.zeros((0, len(classes)))]
                for rows, held in parts:
                    fitted, asked = cls._fitted(kinds, known.at(rows), scale, beside, weight), known.at(held)
                    logs_NK.append(fitted._logs(asked.words, asked.states_NP))
                left_out[kinds, scale, weight] = np.concatenate(logs_NK)
            return left_out[kinds, scale, weight]

        tried = {scale: said_of(scale, 0.0) for scale in (SCALES if known.states_NP.shape[1] else SCALES[:1])}
        scale = _likeliest(tried, truth_N, draws_DN, errors=1.0)
        weighed = {0.0: tried[scale]}
        if beside:
            weighed |= {weight: said_of(scale, weight) for weight in WEIGHTS}
        weight = _likeliest(weighed, truth_N, draws_DN)
        tuned_NK = tuned_logs(examples, name, classes)
        heard = {0.0: weighed[weight]}
        if tuned_NK is not None:
            heard = {share: mix(weighed[weight], tuned_NK[seen], share) for share in SHARES}
        share = _likeliest(heard, truth_N, draws_DN)
        fitted = cls._fitted(kinds, known, scale, beside, weight)
        return fitted._replace(offsets_K=_offsets(heard[share], truth_N, draws_DN), share=share)

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


def truth_of(examples: Examples, name: str) -> np.ndarray:
    """The value of an attribute of each mention [N]."""
    return np.array([span.attributes[name] for span in examples.spans])


def _parts(truth_N: np.ndarray, documents: np.ndarray) -> list[tuple[Ints, Ints]]:
    """Mentions to learn from and to leave out, by document; none where the documents are few."""
    if len(set(documents)) < PARTS:
        return []
    parts = GroupKFold(PARTS).split(truth_N, truth_N, documents)
    return [(rows, held) for rows, held in parts if len(set(truth_N[rows])) == len(set(truth_N))]


def _likeliest(tried: Mapping[float, Floats], truth_N: Ints, draws_DN: Floats, errors: float = 0.0) -> float:
    """Of log-probabilities [N, classes] those that find the truth the likeliest, where their macro-F1 is above that of
    the first by more than so many standard errors of the gain over draws of documents: one of several F1 is the highest
    by chance, as it counts few mentions, and the likelihood all of them.
    """
    first = next(iter(tried))
    found = max(tried, key=lambda one: tried[one][np.arange(len(truth_N)), truth_N].sum())
    if found == first:
        return first
    (whole, *gains) = (_scores(tried[found], truth_N, draws_DN) - _scores(tried[first], truth_N, draws_DN)).tolist()
    return found if whole > errors * np.std(gains) else first


def tuned_logs(examples: Examples, name: str, classes: Iterable[str]) -> Floats | None:
    """What tuned models say of an attribute [N, classes], None where there are none."""
    if name not in examples.tuned:
        return None
    nothing = np.full(len(examples.spans), LEAST)
    logs_NK = np.stack([examples.tuned[name].get(one, nothing) for one in classes], 1)
    logs: Floats = np.maximum(logs_NK, LEAST)
    return logs


def mix(logs_NK: Floats, tuned_NK: Floats | None, share: float) -> Floats:
    """The two in these shares, log-probabilities again."""
    if tuned_NK is None or not share:
        return logs_NK
    both_NK = (1 - share) * logs_NK + share * tuned_NK
    mixed: Floats = both_NK - logsumexp(both_NK, 1, keepdims=True)
    return mixed


def _offsets(log_NK: Floats, truth_N: Ints, draws_DN: Floats) -> Floats:
    """For every class but the most frequent one what brings most macro-F1, one after the other: the mean of what does
    in each draw of documents (bagging, Breiman 1996), since where F1 of few mentions is highest is chance.
    """
    offsets_K = np.zeros(log_NK.shape[1])
    if not len(truth_N):
        return offsets_K
    classes = np.arange(len(offsets_K))
    usual = int(np.bincount(truth_N).argmax())
    for k in classes[classes != usual]:
        said_SN = np.stack([(log_NK + np.where(classes == k, step, offsets_K)).argmax(1) for step in OFFSETS])
        scores_DS = _macro_f1(said_SN, truth_N, draws_DN[draws_DN @ (truth_N == k) > 0], len(classes))
        # of each draw a plateau's middle: its edges are chance
        best = [np.flatnonzero(scores_S >= scores_S.max() - 1e-9) for scores_S in scores_DS]
        if best:
            offsets_K[k] = np.mean([OFFSETS[places[len(places) // 2]] for places in best])
    return offsets_K


def _scores(log_NK: Floats, truth_N: Ints, draws_DN: Floats) -> Floats:
    """Macro-F1 with offsets: of all, then of every draw."""
    said_N = (log_NK + _offsets(log_NK, truth_N, draws_DN)).argmax(1)
    every_DN = np.concatenate([np.ones((1, len(truth_N))), draws_DN])
    return _macro_f1(said_N[None], truth_N, every_DN, log_NK.shape[1])[:, 0]


def _macro_f1(said_SN: Ints, truth_N: Ints, draws_DN: Floats, classes: int) -> Floats:
    """[D, S]: of every draw, of S answers."""
    total_DS = np.zeros((len(draws_DN), len(said_SN)))
    for k in range(classes):
        said_NS, true_N = (said_SN == k).T.astype(float), (truth_N == k).astype(float)
        either_DS = draws_DN @ said_NS + (draws_DN @ true_N)[:, None]
        total_DS += 2 * (draws_DN @ (said_NS * true_N[:, None])) / np.maximum(either_DS, 1.0)
    scores_DS: Floats = total_DS / classes
    return scores_DS
