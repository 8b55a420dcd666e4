"""Metrics against scikit-learn, and intervals that resample patients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_recall_curve,
    roc_auc_score,
)

from downstream.calibration import calibrate
from downstream.metrics import (
    BINARY,
    accuracy,
    auprc,
    auroc,
    auroc_within,
    brier,
    calibration_line,
    confusion,
    ece,
    evaluate,
    evaluate_several,
    macro_f1,
    patient_draws,
    per_class,
    roc_within,
    rp80,
    selection,
    sensitivity_90,
)


def test_auroc_within_folds_does_not_compare_the_scores_of_two_models() -> None:
    generator = np.random.default_rng(4)
    labels_N, folds_N = generator.integers(2, size=90), np.repeat([0, 1, 2], 30)
    weights_N = generator.integers(3, size=90).astype(float)
    scores_N = labels_N + generator.normal(size=90)
    within = auroc_within(folds_N)
    moved_N = scores_N * np.array([1, 0.2, 5])[folds_N] + 10 * folds_N  # as of three models
    assert within(labels_N, moved_N, weights_N) == pytest.approx(within(labels_N, scores_N, weights_N))
    assert auroc(labels_N, moved_N, weights_N) < within(labels_N, moved_N, weights_N) - 0.1
    right = pairs = 0.0
    for i in np.flatnonzero(labels_N == 1):
        for j in np.flatnonzero((labels_N == 0) & (folds_N == folds_N[i])):
            right += weights_N[i] * weights_N[j] * (moved_N[i] > moved_N[j])
            pairs += weights_N[i] * weights_N[j]
    assert within(labels_N, moved_N, weights_N) == pytest.approx(right / pairs)
    assert auroc_within(np.zeros(90))(labels_N, scores_N, weights_N) == auroc(labels_N, scores_N, weights_N)
    assert math.isnan(auroc_within(labels_N)(labels_N, scores_N, weights_N))  # every fold has one class
    two_NK = np.stack([1 - moved_N, moved_N], 1)
    found = evaluate(labels_N, {"model": two_NK}, [str(n) for n in range(90)], 5, 1, folds_N.tolist())
    assert found["model"]["auroc"].value == within(labels_N, moved_N, np.ones(90))


def test_the_curve_of_folds_is_the_mean_of_their_curves_and_has_their_area() -> None:
    # One fold is ranked rightly, of the other half: up to the first false positive 1 and ½, then 1 and 1.
    labels_N, folds_N = np.array([1, 1, 0, 0, 1, 1, 0, 0]), np.repeat([0, 1], 4)
    scores_N = np.array([9.0, 8, 2, 1, 90, 70, 80, 60])
    false_G, true_G = roc_within(labels_N, scores_N, folds_N)
    assert false_G.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert true_G.tolist() == [0, 0.75, 0.75, 1, 1, 1]
    generator = np.random.default_rng(8)
    labels_N, folds_N = generator.integers(2, size=90), np.repeat([0, 1, 2], [50, 30, 10])
    scores_N = labels_N + generator.integers(5, size=90).astype(float)  # many ties
    false_G, true_G = roc_within(labels_N, scores_N, folds_N)
    assert (np.diff(false_G) >= 0).all()
    assert (np.diff(true_G) >= 0).all()
    area = np.sum(np.diff(false_G) * (true_G[1:] + true_G[:-1]) / 2)
    assert area == pytest.approx(auroc_within(folds_N)(labels_N, scores_N, np.ones(90)), abs=1e-12)
    assert [len(side) for side in roc_within(labels_N, scores_N, labels_N)] == [0, 0]  # every fold is one class


@pytest.mark.parametrize("seed", range(5))
def test_weighted_metrics_are_those_of_sklearn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels_N = generator.integers(2, size=60)
    scores_N = generator.integers(8, size=60) / 8.0  # many ties
    weights_N = generator.integers(3, size=60).astype(float)  # some zero, as in a bootstrap draw
    expected = roc_auc_score(labels_N, scores_N, sample_weight=weights_N)
    assert auroc(labels_N, scores_N, weights_N) == pytest.approx(expected, abs=1e-12)
    expected = average_precision_score(labels_N, scores_N, sample_weight=weights_N)
    assert auprc(labels_N, scores_N, weights_N) == pytest.approx(expected, abs=1e-12)
    assert brier(labels_N, scores_N, weights_N) == pytest.approx(
        brier_score_loss(labels_N, scores_N, sample_weight=weights_N), abs=1e-12
    )
    precision, recall, _ = precision_recall_curve(labels_N, scores_N, sample_weight=weights_N)
    assert rp80(labels_N, scores_N, weights_N) == pytest.approx(recall[precision > 0.799999].max(), abs=1e-12)
    classes_N, scores_NK = generator.integers(4, size=60), generator.random((60, 4))
    predicted_N = scores_NK.argmax(1)
    expected = accuracy_score(classes_N, predicted_N, sample_weight=weights_N)
    assert accuracy(classes_N, scores_NK, weights_N) == pytest.approx(expected, abs=1e-12)
    expected = f1_score(classes_N, predicted_N, average="macro", sample_weight=weights_N)
    assert macro_f1(classes_N, scores_NK, weights_N) == pytest.approx(expected, abs=1e-12)


def test_one_class_alone_has_no_auroc() -> None:
    ones = np.ones(3)
    assert math.isnan(auroc(np.array([1, 1, 1]), np.arange(3.0), ones))
    assert math.isnan(auprc(np.array([0, 0, 0]), np.arange(3.0), ones))


def test_rows_of_a_patient_are_drawn_together() -> None:
    patients = ["a", "b", "a", "c", "b", "a"]
    draws = list(patient_draws(patients, 200, seed=0))
    for weights_N in draws:
        assert weights_N[0] == weights_N[2] == weights_N[5]
        assert weights_N[1] == weights_N[4]
        assert weights_N[0] + weights_N[1] + weights_N[3] == 3  # three patients, with replacement
    assert len({tuple(weights_N) for weights_N in draws}) == 10  # every multiset of three patients


def test_intervals_widen_with_copies_only_if_patients_are_ignored() -> None:
    generator = np.random.default_rng(0)
    labels_N = generator.integers(2, size=80)
    p_N = np.clip(0.3 * labels_N + 0.7 * generator.random(80), 0, 1)
    p_NK = np.stack([1 - p_N, p_N], 1)
    patients = [str(n) for n in range(80)]
    once = evaluate(labels_N, {"model": p_NK}, patients, 500, 0)["model"]["auroc"]
    again = evaluate(np.tile(labels_N, 4), {"model": np.tile(p_NK, (4, 1))}, patients * 4, 500, 0)["model"]["auroc"]
    assert again == pytest.approx(once, abs=1e-9)  # four notes of each patient say nothing new
    rows = [str(n) for n in range(320)]
    naive = evaluate(np.tile(labels_N, 4), {"model": np.tile(p_NK, (4, 1))}, rows, 500, 0)["model"]["auroc"]
    assert naive.high - naive.low < 0.6 * (once.high - once.low)


def test_difference_is_paired() -> None:
    generator = np.random.default_rng(1)
    labels_N = generator.integers(2, size=100)
    p_N = 0.5 * generator.random(100) + 0.4 * labels_N
    p_NK = np.stack([1 - p_N, p_N], 1)
    scores = evaluate(labels_N, {"model": p_NK, "same": p_NK.copy()}, [str(n) for n in range(100)], 50, 0)
    assert scores["model - same"]["auroc"] == (0, 0, 0)


def test_selection_takes_auroc_of_two_classes_and_macro_f1_of_more() -> None:
    labels_N = np.array([0, 1, 0, 1])
    assert selection(labels_N, np.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.05], [0.7, 0.3]])) == 1
    assert selection(np.array([0, 1, 2]), np.eye(3)) == 1


def test_thresholds_by_hand() -> None:
    ones = np.ones(12)
    labels_N = np.array([1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0])
    scores_N = np.linspace(1, 0, 12)
    assert rp80(labels_N, scores_N, ones) == 1.0  # 5 of 6 are positive where all are found
    assert rp80(1 - labels_N, scores_N, ones) == 0.0
    assert sensitivity_90(labels_N, scores_N, ones) == 0.8  # one false alarm in seven is more than a tenth
    assert rp80(labels_N, -scores_N, ones) == 0.0


def test_one_to_one_is_a_test_set_with_as_many_of_both() -> None:
    generator = np.random.default_rng(1)
    labels_N = np.repeat([1, 0], [50, 200])
    scores_N = generator.random(250) + 0.5 * labels_N
    copied_labels, copied_scores = np.repeat(labels_N, [4] * 50 + [1] * 200), np.repeat(scores_N, [4] * 50 + [1] * 200)
    for name in ("auprc", "rp80"):
        expected = BINARY[name](copied_labels, copied_scores, np.ones(400))
        assert BINARY[f"{name}_balanced"](labels_N, scores_N, np.ones(250)) == pytest.approx(expected, abs=1e-12)


def test_calibration_undoes_what_training_did() -> None:
    """Balanced classes and too much confidence: learned on some, right on others; nothing changes its rank."""
    generator = np.random.default_rng(2)
    truth_N = 1 / (1 + np.exp(-(1.2 * generator.standard_normal(8000) - 2.5)))
    labels_N = (generator.random(8000) < truth_N).astype(np.int64)
    logit_N = 2.0 * (np.log(truth_N / (1 - truth_N)) + 2.5)
    shouted_N = 1 / (1 + np.exp(-logit_N))
    shouted_NK = np.stack([1 - shouted_N, shouted_N], 1)
    half = slice(0, 4000), slice(4000, None)
    learned = calibrate(labels_N[half[0]], shouted_NK[half[0]])
    assert learned.temperature == pytest.approx(2.0, rel=0.1)
    assert learned.bias == pytest.approx(-2.5, rel=0.1)
    quiet_N = learned(shouted_NK[half[1]])[:, 1]
    ones, rest = np.ones(4000), labels_N[half[1]]
    assert ece(rest, quiet_N, ones) < 0.03 < 0.2 < ece(rest, shouted_N[half[1]], ones)
    assert auroc(rest, quiet_N, ones) == auroc(rest, shouted_N[half[1]], ones)
    of_three = generator.dirichlet(np.ones(3), size=500)
    cooled = calibrate(generator.integers(3, size=500), of_three)
    assert cooled.temperature > 1
    assert (cooled(of_three).argmax(1) == of_three.argmax(1)).all()
    few = calibrate(np.array([0, 1]), np.array([[0.9, 0.1], [0.1, 0.9]]))
    assert 0.2 < few.temperature < 1  # two right answers do not make it certain


def several_labels(seed: int, rows: int = 60, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """0 and 1 [N, K], and probabilities with many ties that know something of them."""
    generator = np.random.default_rng(seed)
    labels_NK = (generator.random((rows, classes)) < 0.3).astype(np.int64)
    return labels_NK, np.round(0.3 * labels_NK + 0.7 * generator.random((rows, classes)), 1)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_several_labels_are_those_of_sklearn(seed: int) -> None:
    labels_NK, p_NK = several_labels(seed)
    labels_NK[0] = 1  # no class is without notes
    scores = evaluate_several(labels_NK, {"model": p_NK}, [str(n) for n in range(60)], 0, 0)["model"]
    said_NK = p_NK >= 0.5
    expected = {
        "micro_f1": f1_score(labels_NK, said_NK, average="micro"),
        "macro_f1": f1_score(labels_NK, said_NK, average="macro"),
        "macro_auroc": roc_auc_score(labels_NK, p_NK, average="macro"),
        "macro_auprc": average_precision_score(labels_NK, p_NK, average="macro"),
    }
    assert {name: interval.value for name, interval in scores.items()} == pytest.approx(expected, abs=1e-12)
    assert selection(labels_NK, p_NK) == pytest.approx(expected["macro_auprc"], abs=1e-12)


def test_draws_of_several_labels_are_those_of_each_class_alone() -> None:
    """In draws, where notes count several times or not at all, the areas are those of two classes, one by one."""
    labels_NK, p_NK = several_labels(0, rows=12)
    labels_NK[:, 3] = np.arange(12) == 0  # in many draws no note has it
    patients = [str(n // 2) for n in range(12)]
    scores = evaluate_several(labels_NK, {"model": p_NK}, patients, 200, 7)["model"]
    for name, metric in (("macro_auroc", auroc), ("macro_auprc", auprc)):
        drawn = [
            [metric(labels_N, p_N, weights_N) for labels_N, p_N in zip(labels_NK.T, p_NK.T, strict=True)]
            for weights_N in patient_draws(patients, 200, 7)
        ]
        assert any(math.isnan(values[3]) for values in drawn)
        means = [np.mean([value for value in values if not math.isnan(value)]) for values in drawn]
        low, high = np.percentile(means, [2.5, 97.5])
        assert scores[name][1:] == pytest.approx((low, high), abs=1e-12)
    drawn = [
        f1_score(labels_NK, p_NK >= 0.5, average="micro", sample_weight=weights_N)
        for weights_N in patient_draws(patients, 200, 7)
    ]
    assert scores["micro_f1"][1:] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-12)


def test_differences_of_several_labels_are_paired() -> None:
    labels_NK, p_NK = several_labels(1)
    patients = [str(n // 3) for n in range(60)]
    scores = evaluate_several(labels_NK, {"model": p_NK, "same": p_NK.copy(), "worse": 1 - p_NK}, patients, 100, 0)
    assert set(scores) == {"model", "same", "worse", "model - same", "model - worse"}
    assert all(interval == (0, 0, 0) for interval in scores["model - same"].values())
    assert scores["model - worse"]["macro_auroc"].low > 0
    assert (
        scores["model"]["macro_auroc"].low < scores["model"]["macro_auroc"].value < scores["model"]["macro_auroc"].high
    )


def test_class_that_no_note_has_or_every_one_does_not_count() -> None:
    labels_NK, p_NK = np.array([[1, 0, 1], [0, 0, 1]]), np.array([[0.9, 0.1, 0.6], [0.2, 0.3, 0.7]])
    scores = evaluate_several(labels_NK, {"model": p_NK}, ["a", "b"], 0, 0)["model"]
    assert [scores[name].value for name in ("micro_f1", "macro_f1", "macro_auroc", "macro_auprc")] == [1, 1, 1, 1]
    labels_NK[0] = 0, 0, 1
    assert math.isnan(selection(labels_NK, p_NK))
    with np.errstate(all="raise"):  # nothing is there and nothing was said
        nothing = evaluate_several(0 * labels_NK, {"model": 0 * p_NK}, ["a", "b"], 2, 0)["model"]
    assert all(np.isnan(interval).all() for interval in nothing.values())


def test_class_by_class() -> None:
    labels_N, p_NK = np.array([0, 0, 1, 2]), np.eye(4)[[0, 1, 1, 0]]
    assert per_class(labels_N, p_NK) == [
        (0.5, 0.5, 0.5, 2),
        (0.5, 1.0, pytest.approx(2 / 3), 1),
        (0, 0, 0, 1),
        (0,) * 4,
    ]
    assert confusion(labels_N, p_NK).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    labels_NK = np.array([[1, 0], [1, 1], [0, 0]])
    p_NK = np.array([[0.5, 0.4], [0.4, 0.9], [0.6, 0.8]])
    assert per_class(labels_NK, p_NK) == [(0.5, 0.5, 0.5, 2), (0.5, 1.0, pytest.approx(2 / 3), 1)]


@pytest.mark.parametrize("seed", range(3))
def test_calibration_line_is_logistic_regression_on_the_logits(seed: int) -> None:
    generator = np.random.default_rng(seed)
    p_N = generator.beta(0.5, 2, size=400)
    labels_N = (generator.random(400) < p_N**1.5).astype(np.int64)
    weights_N = generator.integers(3, size=400).astype(float)
    logit_N1 = np.log(p_N / (1 - p_N))[:, None]
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit_N1, labels_N, weights_N)
    expected = float(model.coef_[0, 0]), float(model.intercept_[0])
    assert calibration_line(labels_N, p_N, weights_N) == pytest.approx(expected, abs=1e-4)


def test_calibration_line_finds_what_was_done_to_true_probabilities() -> None:
    generator = np.random.default_rng(0)
    logit_N = 1.5 * generator.standard_normal(50_000) - 1
    labels_N = (generator.random(50_000) < 1 / (1 + np.exp(-logit_N))).astype(np.int64)
    for slope, intercept in ((1.0, 0.0), (0.5, -1.0), (2.0, 1.0)):
        said_N = 1 / (1 + np.exp(-(logit_N - intercept) / slope))
        assert calibration_line(labels_N, said_N) == pytest.approx((slope, intercept), abs=0.06)
        binary = evaluate(labels_N, {"model": np.stack([1 - said_N, said_N], 1)}, ["a"] * 50_000, 1, 0)["model"]
        line = calibration_line(labels_N, said_N)
        assert (binary["calibration_slope"].value, binary["calibration_intercept"].value) == line


def test_calibration_line_of_parted_classes_is_undefined() -> None:
    labels_N = np.array([0, 0, 1, 1])
    for p_N in ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.2, 0.3], [0.5] * 4, [0.0, 0.0, 1.0, 1.0]):
        assert math.isnan(calibration_line(labels_N, np.array(p_N))[0])
    assert math.isnan(calibration_line(np.zeros(4, np.int64), np.linspace(0.1, 0.9, 4))[0])
    slope, _ = calibration_line(labels_N, np.array([0.1, 0.3, 0.2, 1.0]))  # a probability of 1 has a logit as well
    assert 0 < slope < 10
    ones = np.array([1.0, 1.0, 0.0, 1.0])  # in this draw a threshold parts them
    assert math.isnan(calibration_line(labels_N, np.array([0.1, 0.3, 0.2, 1.0]), ones)[0])


def test_calibration_line_where_newton_overshoots_or_logits_are_close() -> None:
    """Found by search: a rare class that is surely wrong, hessians that vanish; and a model that says one thing."""
    cases: list[tuple[list[float], list[int], list[int]]] = [
        ([0.16, -4.13, 0.0, 0.2], [29780, 5, 3, 73], [2, 0, 0, 7]),
        ([-0.6, -0.4, -0.22, 2.44, -1.19], [121, 0, 75989, 13521, 63], [1, 0, 2, 0, 1]),
        ([-0.52, 0.06, 0.04, -0.09], [790, 7, 66587, 0], [0, 337, 27, 3]),
        (np.random.default_rng(0).normal(-2, 1e-8, 50).tolist(), [1] * 50, [n % 3 for n in range(50)]),
    ]
    for logits, positive, negative in cases:
        logit_N = np.array([*logits, *logits])
        labels_N, weights_N = np.repeat([1, 0], len(logits)), np.array([*positive, *negative], float)
        p_N = 1 / (1 + np.exp(-logit_N))
        slope, intercept = calibration_line(labels_N, p_N, weights_N)
        excess_N = weights_N * (1 / (1 + np.exp(-(intercept + slope * logit_N))) - labels_N)
        assert excess_N.sum() == pytest.approx(0, abs=1e-3)  # as many positives as was said, low and high
        assert excess_N @ (logit_N - logit_N.mean()) / logit_N.std() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_calibration_error_of_few_notes_lies_within_its_interval(seed: int) -> None:
    """Draws with replacement are farther from their bins: their percentiles may all lie above the value."""
    draws = np.random.default_rng(seed)
    p_N = draws.random(40)
    labels_N = (draws.random(40) < p_N).astype(int)
    p_NK = np.stack([1 - p_N, p_N], 1)
    found = evaluate(labels_N, {"model": p_NK, "other": p_NK[::-1].copy()}, [str(i) for i in range(40)], 200, seed)
    for system in ("model", "other", "model - other"):
        value, low, high = found[system]["ece"]
        assert low < value < high
