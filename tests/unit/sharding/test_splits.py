"""The split of a patient is a function of the patient alone."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sharding.splits import SplitConfig, split_of

FIRST = ["test", "test", "train", "test", "train", "train", "valid", "train"]
PATIENTS = [str(number) for number in range(20_000)]


def test_fractions_are_met_and_known_patients_stay_forever() -> None:
    config = SplitConfig(valid=0.1, test=0.2)
    found = [split_of(patient, config) for patient in PATIENTS]
    assert found.count("test") / len(found) == pytest.approx(0.2, abs=0.01)
    assert found.count("valid") / len(found) == pytest.approx(0.1, abs=0.01)
    # Written down once: a change here moves patients between the splits of every corpus made before.
    assert [split_of(patient, config) for patient in ("0", "1", "2", "3", "4", "5", "6", "7")] == FIRST


def test_more_validation_takes_no_patient_out_of_test() -> None:
    few, many = SplitConfig(valid=0.05, test=0.1), SplitConfig(valid=0.3, test=0.1)
    for patient in PATIENTS[:2000]:
        assert (split_of(patient, few) == "test") == (split_of(patient, many) == "test")


def test_another_salt_draws_other_patients() -> None:
    here, there = SplitConfig(test=0.5), SplitConfig(test=0.5, salt="other")
    moved = sum(split_of(patient, here) != split_of(patient, there) for patient in PATIENTS)
    assert moved / len(PATIENTS) == pytest.approx(0.5, abs=0.05)


def test_fractions_must_leave_training() -> None:
    with pytest.raises(ValidationError, match="less than 1"):
        SplitConfig(valid=0.5, test=0.5)
