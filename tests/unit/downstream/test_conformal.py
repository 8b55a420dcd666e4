"""Conformal sets hold the truth of every class as often as promised, for new patients; and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.errors import ConfigError
from downstream.conformal import area, coverage, one_each, risk_coverage, sets, thresholds

NAMES = ["rare", "common", "odd"]


def drawn(generator: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] of three classes, unequally frequent, and probabilities that are worst for the rare one."""
    labels_N = generator.choice(3, size=rows, p=[0.1, 0.6, 0.3])
    logits_NK = generator.standard_normal((rows, 3)) + np.array([0.2, 2.0, 1.0])[labels_N, None] * np.eye(3)[labels_N]
    p_NK = np.exp(logits_NK)
    return labels_N, p_NK / p_NK.sum(1, keepdims=True)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_every_class_is_covered(alpha: float) -> None:
    """Over 300 calibration sets the mean coverage of each class lies between 1 - α and 1 - α + 1/(n + 1)."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(300):
        labels_N, p_NK = drawn(generator, 400)
        limits_K = thresholds(labels_N, p_NK, [str(n) for n in range(400)], alpha, 0, NAMES)
        labels_N, p_NK = drawn(generator, 1000)
        found.append(coverage(labels_N, sets(p_NK, limits_K)).by_class)
    by_class_DK = np.array(found)
    error_K = by_class_DK.std(0) / math.sqrt(300)
    assert (by_class_DK.mean(0) > 1 - alpha - 3 * error_K).all()
    assert (by_class_DK.mean(0) < 1 - alpha + 1 / np.array([25, 200, 100]) + 3 * error_K).all()


def test_one_threshold_for_all_would_fail_the_rare_class() -> None:
    """The same data with one class for the quantile: what the Mondrian one is for."""
    generator = np.random.default_rng(0)
    labels_N, p_NK = drawn(generator, 20_000)
    true_N = p_NK[np.arange(20_000), labels_N]
    limit = thresholds(np.zeros(20_000, int), true_N[:, None], [str(n) for n in range(20_000)], 0.1, 0, ["all"])
    said = coverage(labels_N, sets(p_NK, np.repeat(limit, 3)))
    assert said.overall == pytest.approx(0.9, abs=0.01)
    assert said.by_class[0] is not None
    assert said.by_class[0] < 0.8


def test_rank_is_exact() -> None:
    """50 · 0.58 is 29, though computers find a little more."""
    p_N1 = np.linspace(1, 0, 49)[:, None]
    limit = thresholds(np.zeros(49, int), p_N1, [str(n) for n in range(49)], 0.42, 0, ["a"])
    assert limit == 1 - p_N1[28]


def test_patients_with_many_notes_count_once() -> None:
    """A hundred copies of one patient's note neither move the threshold nor make up for patients."""
    p_N = np.linspace(0.05, 0.95, 19)
    p_NK, patients = np.stack([p_N, 1 - p_N], 1), [f"p{n}" for n in range(19)]
    once = thresholds(np.zeros(19, int), p_NK[:, :1], patients, 0.1, 0, ["a"])
    assert once == pytest.approx(1 - p_N[1])  # the 18th of 19 from above: ⌈20 · 0.9⌉
    copied = np.concatenate([p_NK, np.repeat(p_NK[:1], 100, axis=0)])
    more = thresholds(np.zeros(119, int), copied[:, :1], patients + ["p0"] * 100, 0.1, 0, ["a"])
    assert more == once
    with pytest.raises(ConfigError, match="class 'a' has 1 patients in validation and needs 9"):
        thresholds(np.zeros(119, int), copied[:, :1], ["p0"] * 119, 0.1, 0, ["a"])


def test_notes_of_new_patients_are_covered_where_notes_of_one_resemble_each_other() -> None:
    generator = np.random.default_rng(1)
    found = []
    for _ in range(400):
        notes = generator.integers(1, 40, size=60)  # of each patient; the last 30 are tested, one note each
        own = np.where(notes > 20, 0.3, 0.8) + 0.2 * generator.random(60)
        p_N = np.concatenate([np.full(count, p) for count, p in zip(notes, own, strict=True)])
        patients = [str(patient) for patient, count in enumerate(notes) for _ in range(count)]
        calibrating = notes[:30].sum()
        limit = thresholds(np.zeros(calibrating, int), p_N[:calibrating, None], patients[:calibrating], 0.2, 0, ["a"])
        found.append(sets(own[30:, None], limit).mean())
    assert 0.79 < np.mean(found) < 0.8 + 1 / 31 + 0.01


def test_note_of_a_patient_is_drawn_from_seed_and_patient() -> None:
    patients = [f"p{n // 4}" for n in range(400)]
    chosen = one_each(np.arange(400), patients, seed=0)
    assert (chosen // 4 == np.arange(100)).all()
    assert np.bincount(chosen % 4, minlength=4).min() > 10  # any of them
    assert (one_each(np.arange(200, 400), patients, seed=0) == chosen[50:]).all()  # whoever else is there
    assert (one_each(np.arange(400), patients, seed=1) != chosen).any()


@pytest.mark.parametrize(("alpha", "needed"), [(0.1, 9), (0.05, 19), (0.2, 4), (0.3, 3), (1 / 49, 48)])
def test_class_with_too_few_patients_is_refused(alpha: float, needed: int) -> None:
    p_NK = np.full((2 * needed, 2), 0.5)
    labels_N = np.repeat([0, 1], needed)
    patients = [str(n) for n in range(2 * needed)]
    limits_K = thresholds(labels_N, p_NK, patients, alpha, 0, ["a", "b"])
    assert limits_K.tolist() == [0.5, 0.5]
    assert sets(p_NK, limits_K).all()  # what lies on the threshold is in
    labels_N[needed] = 0
    with pytest.raises(ConfigError) as raised:
        thresholds(labels_N, p_NK, patients, alpha, 0, ["a", "b"])
    assert str(raised.value) == (
        f"conformal={alpha:g}: class 'b' has {needed - 1} patients in validation and needs {needed}; "
        "raise conformal, or give validation more patients"
    )


def test_coverage_by_hand() -> None:
    sets_NK = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]], bool)
    found = coverage(np.array([0, 0, 0, 1]), sets_NK)
    assert found == (0.75, [pytest.approx(2 / 3), 1.0, None], 1.25, 0.25, 0.25)


def test_several_labels_a_note_are_refused() -> None:
    with pytest.raises(ConfigError, match="sets need one label a note"):
        thresholds(np.ones((40, 2), int), np.full((40, 2), 0.5), [str(n) for n in range(40)], 0.1, 0, ["a", "b"])


def test_risk_over_coverage_by_hand() -> None:
    p_NK = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    coverage_N, risk_N = risk_coverage(np.array([0, 0, 0, 1]), p_NK)
    assert coverage_N.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk_N == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert area(coverage_N, risk_N) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert area(np.array([0.5, 0.6, 1.0]), np.array([0.2, 0.1, 0.5])) == pytest.approx(0.1 + 0.01 + 0.2)


def test_equally_sure_notes_count_as_their_average() -> None:
    p_NK = np.array([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.6, 0.4]])
    for labels in ([0, 1, 1, 0], [1, 0, 1, 0]):
        assert risk_coverage(np.array(labels), p_NK)[1] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 4])
