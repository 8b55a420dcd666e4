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
from scipy.special import expit, logit
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# (labels [N], scores [N] of the positive class or [N, K] of all, weights [N]) → value, NaN where undefined
Metric = Callable[[Ints, Floats, Floats], float]
# weights [N] → the values of all metrics of a system
Measure = Callable[[Floats], dict[str, float]]


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


def auroc_within(folds_N: Ints) -> Metric:
    """AUROC over the pairs of notes of one fold. The scores of two folds are those of two models, and their order says
    as much of how the models differ as of the notes (Forman & Scholz 2010, doi:10.1145/1882471.1882479).
    """
    rows_F = [np.flatnonzero(folds_N == fold) for fold in np.unique(folds_N)]

    def within(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
        total = right = 0.0
        for rows in rows_F:
            labels, weights = labels_N[rows], weights_N[rows]
            if _both(labels, weights):
                pairs = weights[labels == 1].sum() * weights[labels == 0].sum()
                total, right = total + pairs, right + pairs * auroc(labels, scores_N[rows], weights)
        return float(right / total) if total else math.nan

    return within


def roc_within(labels_N: Ints, scores_N: Floats, folds_N: Ints) -> tuple[Floats, Floats]:
    """(false positive rates, true positive rates): at every rate of false positives the mean of the folds' curves, each
    weighted by its pairs (vertical averaging, Fawcett 2006, doi:10.1016/j.patrec.2005.10.010); the area under it is
    `auroc_within`. A fold without one of the classes has none; nothing at all where every fold is one.
    """
    curves, pairs = [], []
    for fold in np.unique(folds_N):
        rows = folds_N == fold
        labels, ones = labels_N[rows], np.ones(int(rows.sum()))
        if _both(labels, ones):
            curves.append(roc(labels, scores_N[rows], ones))
            pairs.append((labels == 1).sum() * (labels == 0).sum())
    false_G = np.unique(np.concatenate([np.empty(0), *(false_N for false_N, _ in curves)]))
    ends_2G = np.zeros((2, len(false_G)))  # where a curve rises straight up, its foot and its top
    for count, (false_N, true_N) in zip(pairs, curves, strict=True):
        share = count / sum(pairs)
        after, before = np.searchsorted(false_N, false_G), np.searchsorted(false_N, false_G, "right") - 1
        width = false_N[after] - false_N[before]
        along = np.divide(false_G - false_N[before], width, out=np.zeros(len(false_G)), where=width > 0)
        between = true_N[before] + along * (true_N[after] - true_N[before])
        ends_2G[0] += share * np.where(width > 0, between, true_N[after])
        ends_2G[1] += share * np.where(width > 0, between, true_N[before])
    return np.repeat(false_G, 2), ends_2G.T.reshape(-1)


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


def calibration_line(labels_N: Ints, p_N: Floats, weights_N: Floats | None = None) -> tuple[float, float]:
    """(slope, intercept) of the labels' log-odds over those of the probabilities (Cox 1958, Biometrika 45:562).

    Perfect is (1, 0). A slope below 1: too sure of itself; an intercept above 0 where the slope is 1: too low
    throughout. NaN where a threshold parts the classes, as no line is the most likely one then.
    """
    weights_N = np.ones(len(p_N)) if weights_N is None else weights_N
    logit_N = logit(np.clip(p_N, TINY, 1 - TINY))
    drawn_N = weights_N > 0
    positive, negative = logit_N[drawn_N & (labels_N == 1)], logit_N[drawn_N & (labels_N == 0)]
    if not len(positive) or not len(negative):
        return math.nan, math.nan
    if positive.min() >= negative.max() or negative.min() >= positive.max():
        return math.nan, math.nan
    # Around 0 with a spread of 1: logits of a model that says nearly the same of all notes would be too close together.
    centre, spread = logit_N[drawn_N].mean(), logit_N[drawn_N].std()
    x_N2 = np.stack([np.ones(len(p_N)), (logit_N - centre) / spread], 1)

    def unlikely(line_2: Floats) -> float:
        said_N = x_N2 @ line_2
        return float(weights_N @ (np.logaddexp(0, said_N) - labels_N * said_N))

    line_2 = np.zeros(2)
    for _ in range(50):  # Newton's method
        said_N = expit(x_N2 @ line_2)
        hessian_22 = (x_N2.T * (weights_N * said_N * (1 - said_N))) @ x_N2 + 1e-9 * np.eye(2)  # never singular
        step_2 = np.linalg.solve(hessian_22, x_N2.T @ (weights_N * (said_N - labels_N)))
        reached = unlikely(line_2)
        while unlikely(line_2 - step_2) > reached:  # whole steps overshoot where one class is rare; 0 ends it
            step_2 = step_2 / 2
        line_2 = line_2 - step_2
        if np.abs(step_2).max() < 1e-8:
            break
    slope = float(line_2[1] / spread)
    return slope, float(line_2[0] - slope * centre)


def calibration_slope(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
    """Of `calibration_line`."""
    return calibration_line(labels_N, scores_N, weights_N)[0]


def calibration_intercept(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
    """Of `calibration_line`."""
    return calibration_line(labels_N, scores_N, weights_N)[1]


def _one_to_one(metric: Metric) -> Metric:
    """The metric as it would be with as many positives as negatives: the negatives weigh less."""

    def balanced(labels_N: Ints, scores_N: Floats, weights_N: Floats) -> float:
        if not _both(labels_N, weights_N):
            return math.nan
        share = weights_N[labels_N == 1].sum() / weights_N[labels_N == 0].sum()
        return metric(labels_N, scores_N, np.where(labels_N == 1, weights_N, weights_N * share))

    return balanced


BINS = 15
TINY = 1e-12  # the least probability of which a logarithm is taken
# ClinicalBERT's test set is balanced 1:1, where precision says nothing of a hospital: its numbers compare with the
# last two only.
BINARY: Mapping[str, Metric] = {
    "auroc": auroc,
    "auprc": auprc,
    "rp80": rp80,
    "sensitivity_90": sensitivity_90,
    "brier": brier,
    "ece": ece,
    "calibration_slope": calibration_slope,
    "calibration_intercept": calibration_intercept,
    "auprc_balanced": _one_to_one(auprc),
    "rp80_balanced": _one_to_one(rp80),
}
MULTICLASS: Mapping[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1}
# Notes drawn with replacement lie farther from the shares of their bins than all notes do: the mean of that is taken
# off the interval.
FARTHER = frozenset({"ece"})


def scores_of(probabilities_NK: Floats) -> tuple[Floats, Mapping[str, Metric]]:
    """What the metrics for this number of classes take, and these metrics."""
    if probabilities_NK.shape[1] == 2:
        return probabilities_NK[:, 1], BINARY
    return probabilities_NK, MULTICLASS


class _Ranked(NamedTuple):
    """The notes of every class from the highest probability down, sorted once for all draws: `order` [K, N]; `last`
    [K, N], where those of the same probability end; `positive` [K, N] in that order.
    """

    order: Ints
    last: Ints
    positive: NDArray[np.bool_]

    @classmethod
    def of(cls, labels_NK: Ints, probabilities_NK: Floats) -> _Ranked:
        order_KN = np.argsort(-probabilities_NK.T, axis=1, kind="stable")
        sorted_KN = np.take_along_axis(probabilities_NK.T, order_KN, 1)
        rows, ends = sorted_KN.shape[1], np.ones(sorted_KN.shape, bool)
        ends[:, :-1] = sorted_KN[:, 1:] != sorted_KN[:, :-1]
        place_KN = np.where(ends, np.arange(rows), rows)
        last_KN = np.minimum.accumulate(place_KN[:, ::-1], axis=1)[:, ::-1]
        return cls(order_KN, last_KN, np.take_along_axis(labels_NK.T, order_KN, 1) == 1)

    def areas(self, weights_N: Floats) -> tuple[Floats, Floats]:
        """`auroc` and `auprc` of the classes [K]; NaN for one that all or none of the notes have."""
        weights_KN = weights_N[self.order]
        true_KN = np.take_along_axis(np.cumsum(weights_KN * self.positive, 1), self.last, 1)
        false_KN = np.take_along_axis(np.cumsum(weights_KN * ~self.positive, 1), self.last, 1)
        found_KN = np.diff(true_KN, axis=1, prepend=0)
        above_KN = false_KN - np.diff(false_KN, axis=1, prepend=0) / 2  # ties count half
        with np.errstate(invalid="ignore"):  # 0 / 0 of an undefined class, or above the first note that was drawn
            precision_KN = np.where(found_KN > 0, true_KN / (true_KN + false_KN), 0)
            auroc_K = 1 - (found_KN * above_KN).sum(1) / (true_KN[:, -1] * false_KN[:, -1])
            auprc_K = (found_KN * precision_KN).sum(1) / true_KN[:, -1]
        return auroc_K, np.where(np.isnan(auroc_K), math.nan, auprc_K)


def selection(labels: Ints, probabilities_NK: Floats, weights_N: Floats | None = None) -> float:
    """The number that chooses epochs and settings on validation: AUROC of two classes, macro-F1 of more; with several
    labels a note (0 and 1 [N, K]) macro-AUPRC.
    """
    weights = np.ones(len(labels)) if weights_N is None else weights_N
    if labels.ndim == 2:
        return _mean(_Ranked.of(labels, probabilities_NK).areas(weights)[1])
    if probabilities_NK.shape[1] == 2:
        return auroc(labels, probabilities_NK[:, 1], weights)
    return macro_f1(labels, probabilities_NK, weights)


def _mean(values_K: Floats) -> float:
    """Of those that are defined."""
    defined = values_K[~np.isnan(values_K)]
    return float(defined.mean()) if len(defined) else math.nan


def per_class(labels: Ints, probabilities_NK: Floats) -> list[tuple[float, float, float, int]]:
    """(precision, recall, F1, notes that have it) of every class; 0 where there is nothing to divide by.

    Said is the most likely class; with several labels a note (0 and 1 [N, K]) every class from a probability of ½ on.
    """
    said = probabilities_NK >= 0.5 if labels.ndim == 2 else probabilities_NK.argmax(1)
    classes = range(probabilities_NK.shape[1])
    found = precision_recall_fscore_support(labels, said, labels=classes, zero_division=0)
    return [(float(p), float(r), float(f1), int(n)) for p, r, f1, n in zip(*found, strict=True)]


def confusion(labels_N: Ints, probabilities_NK: Floats) -> Ints:
    """How many notes of each class (row) were taken for each (column) [K, K]."""
    table_KK: Ints = confusion_matrix(labels_N, probabilities_NK.argmax(1), labels=range(probabilities_NK.shape[1]))
    return table_KK


def patient_draws(patients: Sequence[str], draws: int, seed: int) -> Iterator[Floats]:
    """`draws` weight vectors [N]: patients with replacement, all rows of a patient together."""
    _, patient_N = np.unique(np.asarray(patients), return_inverse=True)
    count = int(patient_N.max()) + 1
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        yield times[patient_N].astype(np.float64)


def evaluate(
    labels_N: Ints,
    probabilities: Mapping[str, Floats],
    patients: Sequence[str],
    draws: int,
    seed: int,
    folds: Sequence[int] | None = None,
) -> dict[str, dict[str, Interval]]:
    """Every metric of every system (`probabilities` [N, K] by name), with percentile intervals (see FARTHER).
    `folds` says which notes were scored by the same model; without it all were.

    The systems see the same draws, so the difference of the first system and each later one is paired; it
    stands under "first - later". Draws in which a metric is not defined (a class is absent) do not count for
    it.
    """

    def measuring(p_NK: Floats) -> Measure:
        scores, metrics = scores_of(p_NK)
        if folds is not None and metrics is BINARY:
            metrics = {**BINARY, "auroc": auroc_within(np.array(folds))}
        return lambda weights_N: {name: metric(labels_N, scores, weights_N) for name, metric in metrics.items()}

    return _compared({name: measuring(p_NK) for name, p_NK in probabilities.items()}, patients, draws, seed)


def evaluate_several(
    labels_NK: Ints, probabilities: Mapping[str, Floats], patients: Sequence[str], draws: int, seed: int
) -> dict[str, dict[str, Interval]]:
    """The same with several labels a note (0 and 1): F1 from a probability of ½ on, and the areas under the curves.

    Macro is the mean over the classes that are defined in a draw: of F1 those that occur among labels or predictions,
    of areas those that some notes have and others not.
    """

    def measuring(p_NK: Floats) -> Measure:
        ranked, said_NK = _Ranked.of(labels_NK, p_NK), p_NK >= 0.5
        hit_NK, twice_NK = 2.0 * (said_NK & (labels_NK == 1)), 1.0 * said_NK + labels_NK

        def measure(weights_N: Floats) -> dict[str, float]:
            hit_K, twice_K = weights_N @ hit_NK, weights_N @ twice_NK
            with np.errstate(invalid="ignore"):
                f1_K = hit_K / twice_K
            auroc_K, auprc_K = ranked.areas(weights_N)
            return {
                "micro_f1": float(hit_K.sum() / twice_K.sum()) if twice_K.any() else math.nan,
                "macro_f1": _mean(f1_K),
                "macro_auroc": _mean(auroc_K),
                "macro_auprc": _mean(auprc_K),
            }

        return measure

    return _compared({name: measuring(p_NK) for name, p_NK in probabilities.items()}, patients, draws, seed)


def _compared(
    systems: Mapping[str, Measure], patients: Sequence[str], draws: int, seed: int
) -> dict[str, dict[str, Interval]]:
    first, *others = systems

    def measured(weights_N: Floats) -> dict[str, dict[str, float]]:
        values = {system: measure(weights_N) for system, measure in systems.items()}
        for other in others:
            values[f"{first} - {other}"] = {name: values[first][name] - values[other][name] for name in values[first]}
        return values

    whole = measured(np.ones(len(patients)))
    drawn = [measured(weights_N) for weights_N in patient_draws(patients, draws, seed)]
    return {
        system: {
            name: _interval(value, np.array([one[system][name] for one in drawn]), name in FARTHER)
            for name, value in values.items()
        }
        for system, values in whole.items()
    }


def _interval(value: float, drawn_D: Floats, farther: bool) -> Interval:
    defined = drawn_D[~np.isnan(drawn_D)]
    if not len(defined):
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(defined, [2.5, 97.5]) - (defined.mean() - value if farther else 0)
    return Interval(value, float(low), float(high))
