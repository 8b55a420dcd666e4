"""Which split a patient belongs to: a pure function of the patient, so that no other patient can move it.

The same function serves pretraining and the labelled tasks: a patient the language model was trained on is
never in the test set of a task.
"""

from __future__ import annotations

import hashlib

from pydantic import Field, model_validator

from cluster.config import Section


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
    digest = hashlib.blake2b(f"{config.salt}|{patient_id}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < config.test:
        return "test"
    return "valid" if place < config.test + config.valid else "train"
