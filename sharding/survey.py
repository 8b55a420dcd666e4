"""What only all parts together can tell: duplicates, patients, and whether names are unique."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import DataError
from sharding import parts
from sharding.dedup import first_occurrences
from sharding.schema import SPLITS


@dataclass(frozen=True)
class Survey:
    """Which notes stay, and how many they are."""

    keep: list[np.ndarray]  # per part, a mask of its notes
    notes: Counter[str]  # per split
    patients: dict[str, int]  # per split
    duplicates: int


def survey(work: str, indices: Sequence[int], exact: bool) -> Survey:
    """Looks at the parts in input order, one at a time and without their texts. Raises DataError.

    `exact` leaves out notes whose text came before.
    """
    met: set[bytes] = set()
    names: set[str] = set()
    patients: dict[str, set[str]] = {split: set() for split in SPLITS}
    notes: Counter[str] = Counter()
    keep: list[np.ndarray] = []
    for index in indices:
        part = parts.read_columns(work, index, ["doc_id", "patient_id", "split", "digest"]).to_pydict()
        for name in part["doc_id"]:
            if name in names:
                raise DataError(f"doc_id {name} stands twice in the input; it must name one note")
            names.add(name)
        mask = first_occurrences(part["digest"], met)
        keep.append(mask if exact else np.ones_like(mask))
        for split, patient, stays in zip(part["split"], part["patient_id"], keep[-1], strict=True):
            if stays:
                notes[split] += 1
                patients[split].add(patient)
    counts = {split: len(found) for split, found in patients.items()}
    return Survey(keep, notes, counts, len(names) - notes.total())
