"""How good predictions are, with intervals that respect patients.

N examples, K classes. Every metric takes weights [N], because a bootstrap draw of patients is a vector of
weights: a patient drawn twice counts twice, with all the rows at once. Rows of one patient are not
independent, so resampling rows would give intervals that are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# (labels [N], scores [N] of the positive class or [N, K] of all, weights [N]) → value, NaN where undefined
Metric = Callable[[Ints, Floats, Floats], float]


class Interval(NamedTuple):
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _curve(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> tuple[Floats, Floats]:
    """Weight of the positives and of the negatives at or above each distinct score, from the highest down."""
    order = np.argsort(-scores_N, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores_N[order])), len(order) - 1)  # tied scores are one step
    weights_N, positive_N = weights_N[order], labels_N[order] == 1
    return np.cumsum(weights_N * positive_N)[ends], np.cumsum(weights_N * ~positive_N)[ends]


def roc(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> tuple[Floats, Floats]:
    """(false positive rates, true positive rates) of the ROC curve, from (0, 0) to (1, 1)."""
    positives, negatives = _curve(labels_N, scores_N, weights_N)
    zero = np.zeros(1)
    return np.concatenate([zero, negatives / negatives[-1]]), np.concatenate([zero, positives / positives[-1]])


def auroc(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
    """Area under the ROC curve; ties count half."""
    if not _both(labels_N, weights_N):
        return math.nan
    false_N, true_N = roc(labels_N, scores_N, weights_N)
    return float(np.sum(np.diff(false_N) * (true_N[1:] + true_N[:-1]) / 2))


def precision_recall(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> tuple[Floats, Floats]:
    """(recalls, precisions) at every distinct score, from the highest down."""
    positives, negatives = _curve(labels_N, scores_N, weights_N)
    seen = positives + negatives > 0
    return positives[seen] / positives[-1], positives[seen] / (positives + negatives)[seen]


def auprc(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
    """Average precision, Σ recall step · precision (the trapezoid flatters); chance is the prevalence."""
    if not _both(labels_N, weights_N):
        return math.nan
    positives, negatives = _curve(labels_N, scores_N, weights_N)
    found = positives > 0  # before the first positive the recall step is zero
    steps = np.diff(np.concatenate([np.zeros(1), positives / positives[-1]]))
    return float(np.sum(steps[found] * positives[found] / (positives + negatives)[found]))


def _both(labels_N: Ints, weights_N: Floats) -> bool:
    return bool(weights_N[labels_N == 1].sum() > 0 and weights_N[labels_N == 0].sum() > 0)


def accuracy(labels_N: Ints, scores_NK: Floats, weights_N: Floats) -> float:
    """Share of the weight that is classed correctly."""
    return float(np.average(scores_NK.argmax(1) == labels_N, weights=weights_N))


def macro_f1(labels_N: Ints, scores_NK: Floats, weights_N: Floats) -> float:
    """Mean F1 over the classes that occur among labels or predictions (as sklearn's f1_score does)."""
    predicted_N = scores_NK.argmax(1)
    classes = scores_NK.shape[1]
    hits = np.bincount(labels_N, weights_N * (predicted_N == labels_N), classes)
    total = np.bincount(labels_N, weights_N, classes) + np.bincount(predicted_N, weights_N, classes)
    return float(np.mean(2 * hits[total > 0] / total[total > 0]))


def rp80(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
    """Recall at a precision of 80% (Huang et al. 2019, arXiv:1904.05342): the largest at any threshold; 0 at none."""
    if not _both(labels_N, weights_N):
        return math.nan
    positives, negatives = _curve(labels_N, scores_N, weights_N)
    good = positives * 0.2 >= negatives * 0.8 * (1 - 1e-9)
    return float((positives[good & (positives > 0)] / positives[-1]).max(initial=0.0))


def sensitivity_90(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
    """Sensitivity at a specificity of at least 90%."""
    if not _both(labels_N, weights_N):
        return math.nan
    false_N, true_N = roc(labels_N, scores_N, weights_N)
    return float(true_N[false_N <= 0.1 + 1e-9].max())


def brier(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
    """Mean squared difference of probability and truth; lower is better."""
    return float(np.average((scores_N - labels_N) ** 2, weights=weights_N))


def ece(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
    """Expected calibration error over bins of equal weight: how far probabilities are from frequencies, on average."""
    bins = reliability(labels_N, scores_N, weights_N)
    return float(sum(share * abs(said - seen) for said, seen, share in bins))


def reliability(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> list[tuple[float, float, float]]:
    """(mean probability, share of positives, share of the weight) of `BINS` bins of equal weight, by probability."""
    order = np.argsort(scores_N, kind="stable")
    weights = weights_N[order]
    middle = np.cumsum(weights) - weights / 2
    bin_N = np.minimum((BINS * middle / weights.sum()).astype(int), BINS - 1)
    mass = np.bincount(bin_N, weights, BINS)
    said = np.bincount(bin_N, weights * scores_N[order], BINS)
    seen = np.bincount(bin_N, weights * labels_N[order], BINS)
    return [(said[b] / mass[b], seen[b] / mass[b], mass[b] / mass.sum()) for b in range(BINS) if mass[b]]


def _one_to_one(metric: Metric) -> Metric:
    """The metric as it would be with as many positives as negatives: the negatives weigh less."""

    def balanced(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
        if not _both(labels_N, weights_N):
            return math.nan
        share = weights_N[labels_N == 1].sum() / weights_N[labels_N == 0].sum()
        return metric(labels_N, scores_N, np.where(labels_N == 1, weights_N, weights_N * share))

    return balanced


BINS = 15
# ClinicalBERT's test set is balanced 1:1, where precision says nothing of a hospital: its numbers compare with the
# last two only.
BINARY: Mapping[str, Metric] = {
    "auroc": auroc,
    "auprc": auprc,
    "rp80": rp80,
    "sensitivity_90": sensitivity_90,
    "brier": brier,
    "ece": ece,
    "auprc_balanced": _one_to_one(auprc),
    "rp80_balanced": _one_to_one(rp80),
}
MULTICLASS: Mapping[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1}


def scores_of(probabilities_NK: Floats) -> tuple[Floats, Mapping[str, Metric]]:
    """What the metrics for this number of classes take, and these metrics."""
    if probabilities_NK.shape[1] == 2:
        return probabilities_NK[:, 1], BINARY
    return probabilities_NK, MULTICLASS


def selection(labels_N: Ints, probabilities_NK: Floats) -> float:
    """The number that chooses epochs and settings on validation: AUROC of two classes, macro-F1 of more."""
    ones = np.ones(len(labels_N))
    if probabilities_NK.shape[1] == 2:
        return auroc(labels_N, probabilities_NK[:, 1], ones)
    return macro_f1(labels_N, probabilities_NK, ones)


def patient_draws(patients: Sequence[str], draws: int, seed: int) -> Iterator[Floats]:
    """`draws` weight vectors [N]: patients with replacement, all rows of a patient together."""
    _, patient_N = np.unique(np.asarray(patients), return_inverse=True)
    count = int(patient_N.max()) + 1
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        yield times[patient_N].astype(np.float64)


def evaluate(
    labels_N: Ints, probabilities: Mapping[str, Floats], patients: Sequence[str], draws: int, seed: int
) -> dict[str, dict[str, Interval]]:
    """Every metric of every system (`probabilities` [N, K] by name), with percentile intervals.

    The systems see the same draws, so the difference of the first system and each later one is paired; it
    stands under "first - later". Draws in which a metric is not defined (a class is absent) do not count for
    it.
    """
    systems = {name: scores_of(p_NK) for name, p_NK in probabilities.items()}
    first, *others = systems

    def measured(weights_N: Floats) -> dict[str, dict[str, float]]:
        values = {
            system: {name: metric(labels_N, scores, weights_N) for name, metric in metrics.items()}
            for system, (scores, metrics) in systems.items()
        }
        for other in others:
            values[f"{first} - {other}"] = {name: values[first][name] - values[other][name] for name in values[first]}
        return values

    whole = measured(np.ones(len(labels_N)))
    drawn = [measured(weights_N) for weights_N in patient_draws(patients, draws, seed)]
    return {
        system: {
            name: _interval(value, np.array([one[system][name] for one in drawn])) for name, value in values.items()
        }
        for system, values in whole.items()
    }


def _interval(value: float, drawn_D: Floats) -> Interval:
    defined = drawn_D[~np.isnan(drawn_D)]
    if not len(defined):
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(value, float(low), float(high))
