"""Probabilities that mean what they say: temperature scaling on validation notes.

The classes are balanced in training, so a model's probabilities are as if all classes were equally common, and they
are too sure of themselves. On validation notes, which have the natural prevalence, one temperature T is learned for
the logits (Guo et al. 2017, arXiv:1706.04599), of two classes also a bias (Platt 1999). Both keep the order of
scores, so nothing that ranks changes; of more than two classes the most likely one stays the most likely.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from downstream.metrics import Floats, Ints

TINY = 1e-12
# Of (log T)² and bias²: with few validation notes the answer stays near what the model said.
PRIOR = 0.5


class Calibration(NamedTuple):
    """softmax(log p / temperature), of two classes with `bias` added to the second one's logit."""

    temperature: float
    bias: float

    def __call__(self, probabilities_NK: Floats) -> Floats:
        """Calibrated probabilities [N, K]."""
        return _applied(probabilities_NK, self.temperature, self.bias)


def _applied(probabilities_NK: Floats, temperature: float, bias: float) -> Floats:
    logits_NK = np.log(np.maximum(probabilities_NK, TINY)) / temperature
    logits_NK[:, -1] += bias
    logits_NK -= logits_NK.max(1, keepdims=True)
    raised_NK = np.exp(logits_NK)
    calibrated: Floats = raised_NK / raised_NK.sum(1, keepdims=True)
    return calibrated


def calibrate(labels_N: Ints, probabilities_NK: Floats) -> Calibration:
    """Learns on validation notes that neither trained the model nor score it: the least negative log-likelihood."""
    two = probabilities_NK.shape[1] == 2

    def unlikely(found: Floats) -> float:
        bias = float(found[1]) if two else 0.0
        p_NK = _applied(probabilities_NK, float(np.exp(found[0])), bias)
        nll = -np.log(np.maximum(p_NK[np.arange(len(labels_N)), labels_N], TINY)).sum()
        return float(nll + PRIOR * (found**2).sum())

    found = minimize(unlikely, np.zeros(2 if two else 1), method="Nelder-Mead").x
    return Calibration(float(np.exp(found[0])), float(found[1]) if two else 0.0)
