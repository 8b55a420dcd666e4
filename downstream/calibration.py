"""Probabilities that mean what they say: temperature scaling on notes that a model has not seen.

The classes are balanced in training, so a model's probabilities are as if all classes were equally common, and they
are too sure of themselves. On validation notes, which have the natural prevalence, or on all labelled notes, each said
by models that were fitted without it, one temperature T is learned for the logits (Guo et al. 2017, arXiv:1706.04599),
of two classes also a bias (Platt 1999). Both keep the order of scores, so nothing that ranks changes; of more than two
classes the most likely one stays the most likely. With several labels a note every class is a question of its own, with
a temperature and a bias as of two classes. Where folds are joined it is what puts their scores on one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from downstream.metrics import TINY, Floats, Ints

# Of (log T)² and bias²: with few validation notes the answer stays near what the model said.
PRIOR = 0.5


class Calibration(NamedTuple):
    """softmax(log p / temperature), of two classes with `bias` added to the second one's logit."""

    temperature: float
    bias: float

    def __call__(self, probabilities_NK: Floats) -> Floats:
        """Calibrated probabilities [N, K]."""
        return _applied(probabilities_NK, self.temperature, self.bias)


class SeveralCalibration(NamedTuple):
    """Of every class sigmoid(logit p / temperature + bias): what is said of one does not depend on another."""

    temperatures: list[float]
    biases: list[float]

    def __call__(self, probabilities_NK: Floats) -> Floats:
        """Calibrated probabilities [N, K], each of its class against none."""
        each = zip(probabilities_NK.T, self.temperatures, self.biases, strict=True)
        return np.stack([_applied(_two(p_N), temperature, bias)[:, 1] for p_N, temperature, bias in each], 1)


def _two(p_N: Floats) -> Floats:
    """A class as the second of two [N, 2]."""
    return np.stack([1 - p_N, p_N], 1)


def _applied(probabilities_NK: Floats, temperature: float, bias: float) -> Floats:
    logits_NK = np.log(np.maximum(probabilities_NK, TINY)) / temperature
    logits_NK[:, -1] += bias
    logits_NK -= logits_NK.max(1, keepdims=True)
    raised_NK = np.exp(logits_NK)
    calibrated: Floats = raised_NK / raised_NK.sum(1, keepdims=True)
    return calibrated


def calibrate(labels: Ints, probabilities_NK: Floats) -> Calibration | SeveralCalibration:
    """Learns on notes that neither trained what said this of them nor score it: the least negative log-likelihood.

    `labels` [N], or with several labels a note 0 and 1 [N, K].
    """
    if labels.ndim == 1:
        return _learned(labels, probabilities_NK)
    learned = [_learned(labels_N, _two(p_N)) for labels_N, p_N in zip(labels.T, probabilities_NK.T, strict=True)]
    return SeveralCalibration([one.temperature for one in learned], [one.bias for one in learned])


def restored(stored: Mapping[str, Any]) -> Calibration | SeveralCalibration:
    """What `calibrate` gave, from its `_asdict` by way of JSON."""
    return Calibration(**stored) if "temperature" in stored else SeveralCalibration(**stored)


def _learned(labels_N: Ints, probabilities_NK: Floats) -> Calibration:
    two = probabilities_NK.shape[1] == 2

    def unlikely(found: Floats) -> float:
        bias = float(found[1]) if two else 0.0
        p_NK = _applied(probabilities_NK, float(np.exp(found[0])), bias)
        nll = -np.log(np.maximum(p_NK[np.arange(len(labels_N)), labels_N], TINY)).sum()
        return float(nll + PRIOR * (found**2).sum())

    found = minimize(unlikely, np.zeros(2 if two else 1), method="Nelder-Mead").x
    return Calibration(float(np.exp(found[0])), float(found[1]) if two else 0.0)
