"""Sets of classes that hold the truth as often as was asked for, class by class: split conformal prediction.

    validation ─► of each class the 1 - α quantile of 1 - p(class) ─► test: all classes that lie within theirs

Whatever the model, at least 1 - α of the notes *of each class* get a set with that class in it (class-conditional or
Mondrian: Vovk 2012, arXiv:1209.2673; an introduction: Angelopoulos and Bates 2021, arXiv:2107.07511), on average
over validation sets. That holds for notes like those of validation, and only as far as the model was not chosen or
calibrated on them. Sets may be empty (like nothing seen) or hold several classes (cannot tell).

Notes of a patient resemble each other, so a patient counts once for a class: of those of a patient's notes that have
the class one is drawn, from (seed, patient). What is promised is then about a new patient: a note of the class, drawn
likewise.

The curves of risk over coverage say what it is worth to leave out the notes the model is least sure of (Geifman and
El-Yaniv 2017, arXiv:1705.08500).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError
from downstream.metrics import Floats, Ints

Bools = NDArray[np.bool_]


class Coverage(NamedTuple):
    """How often sets hold the truth: of all notes, and by class (None where no note has it); their mean size, and the
    shares of those with no class and with one alone.
    """

    overall: float
    by_class: list[float | None]
    mean_size: float
    empty: float
    single: float


def thresholds(
    labels_N: Ints, probabilities_NK: Floats, patients: Sequence[str], alpha: float, seed: int, classes: Sequence[str]
) -> Floats:
    """Of each class how far from 1 its probability may be [K], learned on calibration notes.

    Raises ConfigError where a class has fewer than 1/α - 1 patients, as no finite quantile would do, and where notes
    have several labels (0 and 1 [N, K]).
    """
    if labels_N.ndim != 1:
        raise ConfigError("conformal: sets need one label a note; leave conformal out, or set several=false")
    found = np.empty(len(classes))
    for k, name in enumerate(classes):
        notes = one_each(np.flatnonzero(labels_N == k), patients, seed)
        rank = math.ceil((len(notes) + 1) * (1 - alpha) - 1e-9)  # 50 · (1 - 0.42) is 29, not a little more
        if rank > len(notes):
            raise ConfigError(
                f"conformal={alpha:g}: class {name!r} has {len(notes)} patients in validation and needs "
                f"{math.ceil(1 / alpha - 1 - 1e-9)}; raise conformal, or give validation more patients"
            )
        found[k] = np.sort(1 - probabilities_NK[notes, k])[rank - 1]
    return found


def one_each(notes: Ints, patients: Sequence[str], seed: int) -> Ints:
    """One of the notes of each patient, drawn with a hash of seed and patient: other patients do not change it."""
    by_patient: dict[str, list[int]] = {}
    for note in notes.tolist():
        by_patient.setdefault(patients[note], []).append(note)
    drawn = []
    for patient, own in by_patient.items():
        number = int.from_bytes(hashlib.blake2b(f"{seed} {patient}".encode(), digest_size=8).digest(), "little")
        drawn.append(own[number % len(own)])
    return np.array(drawn, np.int64)


def sets(probabilities_NK: Floats, thresholds_K: Floats) -> Bools:
    """Whether a note's set holds a class [N, K]."""
    held_NK: Bools = 1 - probabilities_NK <= thresholds_K
    return held_NK


def coverage(labels_N: Ints, sets_NK: Bools) -> Coverage:
    """How good sets are."""
    held_N, sizes_N = sets_NK[np.arange(len(labels_N)), labels_N], sets_NK.sum(1)
    by_class = [held_N[labels_N == k] for k in range(sets_NK.shape[1])]
    return Coverage(
        float(held_N.mean()),
        [float(held.mean()) if len(held) else None for held in by_class],
        float(sizes_N.mean()),
        float((sizes_N == 0).mean()),
        float((sizes_N == 1).mean()),
    )


def risk_coverage(labels_N: Ints, probabilities_NK: Floats) -> tuple[Floats, Floats]:
    """(coverage [N], risk [N]): the share of errors among the 1, 2, … N surest notes. Equally sure ones count as their
    average.
    """
    wrong_N = probabilities_NK.argmax(1) != labels_N
    _, level_N, sizes = np.unique(-probabilities_NK.max(1), return_inverse=True, return_counts=True)
    wrong_by_level = np.bincount(level_N, wrong_N) / sizes
    counts_N = np.arange(1, len(labels_N) + 1)
    return counts_N / len(labels_N), np.cumsum(np.repeat(wrong_by_level, sizes)) / counts_N


def area(coverage_N: Floats, risk_N: Floats) -> float:
    """Mean risk over all coverages; lower is better. Where sureness says nothing, it is the share of errors."""
    return float(np.diff(coverage_N, prepend=0.0) @ risk_N)
