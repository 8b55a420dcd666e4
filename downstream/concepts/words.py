"""The words of a note in the text as it stands, its sentences, and phrases found among them by one automaton.

A word is a run of letters and digits, or one other sign; so a phrase matches at word boundaries only, whatever blanks
and line ends stand between its words.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import ahocorasick

_WORD = re.compile(r"[^\W_]+|_+|[^\w\s]")
_LONG = 6  # letters, from which on a misspelt word is looked for
_END = {".", "!", "?", ";"}
PayloadT = TypeVar("PayloadT")


class Text:
    """A text and its words. `starts` and `ends` are code points; `lower` are the words in lower case."""

    def __init__(self, text: str):
        self.text = text
        places = [match.span() for match in _WORD.finditer(text)]
        self.starts = [start for start, _ in places]
        self.ends = [end for _, end in places]
        self.words = [text[start:end] for start, end in places]
        self.lower = [word.lower() for word in self.words]

    def span_of(self, start: int, end: int) -> tuple[int, int]:
        """The words that share a character with a span, as first and one after the last."""
        return bisect.bisect_right(self.ends, start), bisect.bisect_left(self.starts, end)

    @cached_property
    def sentences(self) -> list[int]:
        """The first word of every sentence, ascending. A line end parts where the next line does not begin in lower
        case (a wrapped line does), a full stop where a blank follows and it ends no abbreviation.
        """
        found = [0]
        for i in range(1, len(self.words)):
            between = self.text[self.ends[i - 1] : self.starts[i]]
            if not between:
                continue
            if "\n" in between:
                parted = not self.words[i][0].islower() or between.count("\n") > 1 or self.words[i - 1] in _END
            else:
                parted = self.words[i - 1] in _END and not self._abbreviated(i - 1)
            if parted:
                found.append(i)
        return found

    def _abbreviated(self, stop: int) -> bool:
        before = self.lower[stop - 1] if stop else ""
        return self.words[stop] == "." and (before in ABBREVIATIONS or (len(before) == 1 and before.isalpha()))

    def sentence(self, word: int) -> tuple[int, int]:
        """First and one after the last word of the sentence that holds a word."""
        place = bisect.bisect_right(self.sentences, word)
        end = self.sentences[place] if place < len(self.sentences) else len(self.words)
        return self.sentences[place - 1], end


ABBREVIATIONS = frozenset("dr mr mrs ms vs approx fig pt no st jr e.g i.e resp".split())


class Found(NamedTuple, Generic[PayloadT]):
    """A phrase at words `first` to `last` (exclusive)."""

    first: int
    last: int
    payload: PayloadT


class Phrases(Generic[PayloadT]):
    """Phrases to look for, each with what it stands for. `exact` ones count only in the case they are given in."""

    def __init__(self, phrases: Iterable[tuple[str, PayloadT, bool]], fuzzy: bool = False):
        self._automaton = ahocorasick.Automaton()
        known: dict[str, list[tuple[tuple[str, ...], PayloadT]]] = {}
        vocabulary: set[str] = set()
        for phrase, payload, exact in phrases:
            words = _WORD.findall(phrase)
            if not words:
                continue
            key = f" {' '.join(words).lower()} "
            known.setdefault(key, []).append((tuple(words) if exact else (), payload))
            vocabulary |= {word.lower() for word in words}
        for key, meanings in known.items():
            self._automaton.add_word(key, (key.count(" ") - 1, meanings))
        self._automaton.make_automaton()
        self._nearly = _Nearly(vocabulary) if fuzzy else None

    def __len__(self) -> int:
        return len(self._automaton)

    def find(self, text: Text, overlapping: bool = False) -> list[Found[PayloadT]]:
        """What stands in a text, in order; of overlapping phrases the longest of those that begin first, or all."""
        if not len(self._automaton):
            return []
        words = [self._nearly(word) for word in text.lower] if self._nearly else text.lower
        ends, place = [], 0
        for word in words:
            place += len(word) + 1
            ends.append(place)
        matches = []
        for end, (length, meanings) in self._automaton.iter(f" {' '.join(words)} "):
            last = bisect.bisect_left(ends, end) + 1
            first = last - length
            said = tuple(text.words[first:last])
            if payloads := [payload for exact, payload in meanings if not exact or exact == said]:
                matches.append((first, last, payloads))
        matches.sort(key=lambda one: (one[0], -one[1]))
        found: list[Found[PayloadT]] = []
        done = 0
        for first, last, payloads in matches:
            if overlapping or first >= done:
                found += [Found(first, last, payload) for payload in payloads]
                done = last
        return found


class _Nearly:
    """A long word that is one letter off a word of a vocabulary becomes that word (deletions as SymSpell has them)."""

    def __init__(self, vocabulary: Iterable[str]):
        self._vocabulary = frozenset(vocabulary)
        self._near: dict[str, str] = {}
        for word in sorted(self._vocabulary):
            if len(word) >= _LONG and word.isalpha():
                for near in _deletions(word):
                    self._near.setdefault(near, word)

    def __call__(self, word: str) -> str:
        if len(word) < _LONG or word in self._vocabulary or not word.isalpha():
            return word
        for near in _deletions(word):
            meant = self._near.get(near)
            if meant and _one_off(word, meant):
                return meant
        return word


def _deletions(word: str) -> list[str]:
    return [word, *(word[:i] + word[i + 1 :] for i in range(len(word)))]


def _one_off(one: str, other: str) -> bool:
    """One letter more, less, another, or two neighbours that changed places."""
    if len(one) < len(other):
        one, other = other, one
    i = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
    if len(one) > len(other):
        return one[i + 1 :] == other[i:]
    turned = one[i : i + 2] == other[i : i + 2][::-1]
    return one[i + 1 :] == other[i + 1 :] or (turned and one[i + 2 :] == other[i + 2 :])


def windows(text: Text, first: int, last: int, width: int) -> tuple[Sequence[str], Sequence[str]]:
    """The words of its sentence before (nearest first) and after a mention, `width` at most on each side."""
    begin, end = text.sentence(first)
    end = max(end, last)
    return text.lower[max(begin, first - width) : first][::-1], text.lower[last : min(end, last + width)]
