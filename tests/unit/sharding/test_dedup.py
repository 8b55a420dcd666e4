"""The first of equal texts stays, across parts."""

from __future__ import annotations

from sharding.dedup import first_occurrences, text_digest


def test_first_occurrence_stays() -> None:
    met: set[bytes] = set()
    first, second = [text_digest(text) for text in "aba"], [text_digest(text) for text in "cbcd"]
    assert first_occurrences(first, met).tolist() == [True, True, False]
    assert first_occurrences(second, met).tolist() == [True, False, False, True]


def test_digest_is_the_same_on_every_machine() -> None:
    assert text_digest("10² mg").hex() == "4dbff0da92564ee0561e87050bb0b20e"
