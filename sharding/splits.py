"""Which split a patient belongs to: a pure function of the patient, so that no other patient can move it.

The same function serves pretraining and the labelled tasks: a patient the language model was trained on is
never in the test set of a task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from pydantic import Field, model_validator

from cluster.config import Section
from sharding.schema import SPLITS


class SplitConfig(Section):
    """Fractions of the patients; what is left is for training. Another salt draws other patients."""

    salt: str = "chartlm"
    valid: float = Field(default=0.05, ge=0, lt=1)
    test: float = Field(default=0.05, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_training(self) -> SplitConfig:
        if self.valid + self.test >= 1:
            raise ValueError("valid + test must be less than 1, or no patient is left for training")
        return self


def split_of(patient_id: str, config: SplitConfig) -> str:
    """ "train", "valid" or "test". Test takes the low end: its patients stay when `valid` is changed."""
    return SPLITS[splits_of([patient_id], config)[0]]


def splits_of(patient_ids: Sequence[str], config: SplitConfig) -> np.ndarray:
    """The `split_of` every patient as its place in SPLITS, int8 [patients]."""
    salt = hashlib.blake2b(f"{config.salt}|".encode(), digest_size=8)
    digests = bytearray()
    for patient_id in patient_ids:
        salted = salt.copy()
        salted.update(patient_id.encode())
        digests += salted.digest()
    place = np.frombuffer(digests, ">u8") / 2**64
    train, valid, test = (SPLITS.index(name) for name in ("train", "valid", "test"))
    tested, validated = place < config.test, place < config.test + config.valid
    return np.where(tested, test, np.where(validated, valid, train)).astype(np.int8)
