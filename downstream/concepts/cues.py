"""Rules: what the words near a mention say of it, without any model (ConText, Harkema et al. 2009; cues.toml).

A cue reaches through its sentence, away from itself, as far as a word that ends it. They serve alone
(`annotate … rules`), and as features of the learned model, which corrects them.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from downstream.concepts.words import Found, Phrases, Text

DEFAULTS = {"negation": "affirmed", "certainty": "certain", "temporality": "current", "experiencer": "patient"}
# words, of cues that stand before
REACH = {"negation": 14, "certainty": 10, "temporality": 12, "experiencer": 14, "course": 8}
AFTER = 6  # words, of cues that stand after
FIELDS = ("before", "after", "pseudo", "ends")


class Cue(NamedTuple):
    """What a phrase means: for which axis, which value of it, and how (one of FIELDS)."""

    axis: str
    value: str
    kind: str


class Hit(NamedTuple):
    """A cue that reaches a mention: where (characters), and how many words lie between."""

    value: str
    start: int
    end: int
    distance: int
    phrase: str


@functools.cache
def _phrases() -> dict[str, Phrases[Cue]]:
    """By axis: a phrase ("with") may end one axis and open another, and the longest of one must not hide another's."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {
        axis: Phrases(
            (phrase, Cue(axis, value, kind), False)
            for value, lists in values.items()
            for kind in FIELDS
            for phrase in lists.get(kind, ())
        )
        for axis, values in tables.items()
    }


class Cues:
    """The cues of a text, found once for all its mentions."""

    def __init__(self, text: Text):
        self.text = text
        self._by_sentence: dict[str, dict[int, list[Found[Cue]]]] = {}
        for axis, phrases in _phrases().items():
            places: dict[int, list[Found[Cue]]] = {}
            for found in phrases.find(text, overlapping=True):
                places.setdefault(text.sentence(found.first)[0], []).append(found)
            self._by_sentence[axis] = places

    def of(self, first: int, last: int) -> dict[str, list[Hit]]:
        """By axis the cues that reach the mention at these words, the nearest first."""
        sentence = self.text.sentence(first)[0]
        return {
            axis: self._reaching(places.get(sentence, ()), axis, first, last)
            for axis, places in self._by_sentence.items()
        }

    def _reaching(self, cues: Sequence[Found[Cue]], axis: str, first: int, last: int) -> list[Hit]:
        # "no change in the rash" denies nothing, but of "change in vision" it does
        pseudo = [
            other for other in cues if other.payload.kind == "pseudo" and (other.last <= first or other.first >= last)
        ]
        hits = []
        for cue in cues:
            if any(other.first <= cue.first and cue.last <= other.last for other in pseudo):
                continue
            value, kind = cue.payload.value, cue.payload.kind
            # "no acute" of "no acute distress" may lie within the mention for a part
            if kind == "before" and cue.first < first:
                distance, between = max(0, first - cue.last), (cue.last, first)
                reach = REACH[axis]
            elif kind == "after" and cue.last > last:
                distance, between = max(0, cue.first - last), (last, cue.first)
                reach = AFTER
            else:
                continue
            ended = any(
                other.payload.kind == "ends" and other.payload.value == value
                and between[0] <= other.first and other.last <= between[1]
                for other in cues
            )  # fmt: skip
            if distance <= reach and not ended:
                start, end = self.text.starts[cue.first], self.text.ends[cue.last - 1]
                hits.append(Hit(value, start, end, distance, " ".join(self.text.lower[cue.first : cue.last])))
        return sorted(hits, key=lambda hit: hit.distance)


# A heading says what the words do not.
OF_SECTION = {
    "past_medical_history": ("temporality", "historical"),
    "past_surgical_history": ("temporality", "historical"),
    "family_history": ("experiencer", "family"),
}


def decide(hits: dict[str, list[Hit]], section: str | None = None) -> dict[str, str]:
    """The value of every axis, by the nearest cue, else by the section, else the default."""
    found = {}
    for axis, default in DEFAULTS.items():
        of_axis, value = OF_SECTION.get(section or "", ("", ""))
        nearest = hits.get(axis)
        found[axis] = nearest[0].value if nearest else value if of_axis == axis else default
    return found
