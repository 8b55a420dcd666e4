"""Metrics against scikit-learn, and intervals that resample patients."""

from __future__ import annotations

import math

import numpy as np
import pytest
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
    brier,
    ece,
    evaluate,
    macro_f1,
    patient_draws,
    rp80,
    selection,
    sensitivity_90,
)


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
