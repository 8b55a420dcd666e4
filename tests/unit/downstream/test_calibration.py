"""Calibration of several labels a note: a temperature and a bias for every class (of one label: test_metrics)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from downstream.calibration import Calibration, SeveralCalibration, calibrate, restored
from downstream.metrics import auroc


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_every_class_has_its_own_temperature_and_bias() -> None:
    generator = np.random.default_rng(0)
    temperatures, biases = np.array([1.0, 2.0, 0.5]), np.array([0.0, -2.0, 1.0])
    said_NK = 2 * generator.standard_normal((6000, 3))
    labels_NK = (generator.random((6000, 3)) < sigmoid(said_NK / temperatures + biases)).astype(np.int64)
    learned = calibrate(labels_NK, sigmoid(said_NK))
    assert isinstance(learned, SeveralCalibration)
    assert learned.temperatures == pytest.approx(temperatures, rel=0.1)
    assert learned.biases == pytest.approx(biases, abs=0.15)
    quiet_NK = learned(sigmoid(said_NK))
    exact_NK = sigmoid(said_NK / np.array(learned.temperatures) + np.array(learned.biases))
    assert quiet_NK == pytest.approx(exact_NK, abs=1e-9)
    ones = np.ones(6000)
    for k in range(3):
        assert auroc(labels_NK[:, k], quiet_NK[:, k], ones) == auroc(labels_NK[:, k], said_NK[:, k], ones)
        alone = calibrate(labels_NK[:, k], np.stack([1 - sigmoid(said_NK[:, k]), sigmoid(said_NK[:, k])], 1))
        assert alone == Calibration(learned.temperatures[k], learned.biases[k])  # of two classes it is the same


def test_class_that_no_note_of_validation_has_stays_possible() -> None:
    p_NK = np.random.default_rng(0).random((40, 2))
    learned = calibrate(np.zeros((40, 2), np.int64), p_NK)
    assert np.isfinite([*learned.temperatures, *learned.biases]).all()  # type: ignore[union-attr]
    assert (learned(p_NK) > 0).all()
    assert (learned(p_NK).mean(0) < 0.1).all()  # but not likely


def test_certain_probabilities_stay_numbers() -> None:
    learned = SeveralCalibration([2.0, 1.0], [0.0, 1.0])
    assert learned(np.array([[0.0, 1.0]])) == pytest.approx(np.array([[0, 1]]), abs=1e-5)


def test_calibrations_come_back_from_json() -> None:
    for one in (Calibration(1.5, -0.5), SeveralCalibration([1.5, 2.0], [0.25, 0.0])):
        again = restored(json.loads(json.dumps(one._asdict())))
        assert again == one
        assert type(again) is type(one)
