"""From an example's text to the tokens a model reads, and where in them is what it is asked about.

    zoster, shingles :   … the patient had  [ shingles ]  in 2015 and …
    ── query ──────      ──── near: `window` tokens on each side ──────

A causal model that is not told what to look for has to carry everything it read to the end of the note. So it may be
told in three ways (van Aken et al. 2021, doi:10.18653/v1/2021.nlpmc-1.5, for the markers): the question stands before
the note, marks stand round every mention, and only what lies near a mention is pooled (classifier.py).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cluster import logs
from cluster.config import Section
from downstream.tasks.examples import Example
from sharding.tokenizer import Tokenizer

Spans = tuple[tuple[int, int], ...]
Tokens = NDArray[np.integer]

OPEN, CLOSE, COLON = "[", "]", ":"


class TellConfig(Section):
    """How a model is told what to look for, where a task asks about something."""

    query: bool = Field(True, description="the concept and its synonyms stand before the note")
    markers: bool = Field(True, description="[ and ] stand round every mention")
    window: int = Field(128, ge=0, description="tokens on each side of a mention that count; 0: the whole note counts")


PLAIN = TellConfig(query=False, markers=False)  # the note as it stands, mentions known


class Note(NamedTuple):
    """A note as it is read. Spans are of tokens, end exclusive."""

    tokens: Tokens
    mentions: Spans = ()
    near: Spans = ()  # what counts; empty: everything
    query: Tokens = np.empty(0, np.int64)
    first: int = 0  # which token of the whole note it begins with

    def reversed(self) -> Note:
        """The same note from its end to its beginning, for a model that reads backwards."""
        length = len(self.tokens)

        def turned(spans: Spans) -> Spans:
            return tuple((length - end, length - start) for start, end in reversed(spans))

        return Note(
            self.tokens[::-1].copy(), turned(self.mentions), turned(self.near), self.query[::-1].copy(), self.first
        )


def words_of(text: str) -> list[tuple[int, int]]:
    """Spans of the words of a cleaned text, as the tokenizer sees them; a line end is a word."""
    spans, start = [], 0
    for place, sign in enumerate(text):
        if sign in " \n":
            if place > start:
                spans.append((start, place))
            if sign == "\n":
                spans.append((place, place + 1))
            start = place + 1
    if len(text) > start:
        spans.append((start, len(text)))
    return spans


def encode(tokenizer: Tokenizer, examples: Sequence[Example], max_tokens: int, tell: TellConfig) -> list[Note]:
    """The notes as tokens. Of a longer one the last `max_tokens` are read (a summary ends with the plan), but from the
    window of its first mention on.
    """
    notes = []
    cut = 0
    for example in examples:
        asked = example.mentions or example.query
        note = _told(tokenizer, example, tell) if asked else Note(tokenizer.encode([example.text])[0])
        cut += len(note.tokens) > max_tokens
        notes.append(_cut(note, max_tokens))
    if cut:
        logs.say(
            f"{cut:,} of {len(notes):,} notes: only max_tokens={max_tokens:,} tokens of each are read, the last ones"
        )
    return notes


class _Said(NamedTuple):
    """The words of an example as they are read: each with its span in the text, (-1, -1) for what is not of it."""

    words: list[str]
    places: list[tuple[int, int]]
    mentions: list[tuple[int, int]]  # in words
    query: list[str]


def _said(example: Example, tell: TellConfig) -> _Said:
    query = example.query.split()
    found = _Said([], [], [], query)

    def add(words: Sequence[str], places: Sequence[tuple[int, int]] | None = None) -> None:
        found.words.extend(words)
        found.places.extend(places if places is not None else [(-1, -1)] * len(words))

    places = words_of(example.text)
    words = [example.text[start:end] for start, end in places]
    add([*query, COLON] if tell.query and query else [])
    done = 0
    for first, last in _words_of_mentions(places, example.mentions):
        add(words[done:first], places[done:first])
        add([OPEN] if tell.markers else [])
        found.mentions.append((len(found.words), len(found.words) + last - first))
        add(words[first:last], places[first:last])
        add([CLOSE] if tell.markers else [])
        done = last
    add(words[done:], places[done:])
    return found


def _told(tokenizer: Tokenizer, example: Example, tell: TellConfig) -> Note:
    said = _said(example, tell)
    tokens, starts = tokenizer.encode_words(said.words)
    mentions = tuple((int(starts[first]), int(starts[last])) for first, last in said.mentions)
    near = _near(mentions, tell.window, len(tokens)) if tell.window else ()
    return Note(tokens, mentions, near, tokenizer.encode_words(said.query)[0] if said.query else np.empty(0, np.int64))


def places_of_tokens(tokenizer: Tokenizer, example: Example, note: Note, tell: TellConfig) -> list[tuple[int, int]]:
    """For every token of a note (read forwards) the span of its word in the text, (-1, -1) for what is not of it."""
    said = _said(example, tell if example.mentions or example.query else PLAIN)
    tokens, starts = tokenizer.encode_words(said.words)
    places = [(-1, -1)] * len(tokens)
    for word, place in enumerate(said.places):
        places[starts[word] : starts[word + 1]] = [place] * int(starts[word + 1] - starts[word])
    return places[note.first : note.first + len(note.tokens)]


def _words_of_mentions(places: Sequence[tuple[int, int]], mentions: Spans) -> list[tuple[int, int]]:
    """The words that each mention shares a character with ("(zoster)," is one); of overlapping ones the first."""
    starts, ends = [start for start, _ in places], [end for _, end in places]
    found: list[tuple[int, int]] = []
    for start, end in sorted(mentions):
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)
        if first < last and (not found or first >= found[-1][1]):
            found.append((first, last))
    return found


def _near(mentions: Spans, window: int, length: int) -> Spans:
    return tuple((max(0, start - window), min(length, end + window)) for start, end in mentions)


def _cut(note: Note, max_tokens: int) -> Note:
    start = max(0, len(note.tokens) - max_tokens)
    if note.near:
        start = min(start, note.near[0][0])
    end = start + max_tokens
    if start == 0 and end >= len(note.tokens):
        return note

    def moved(spans: Spans) -> Spans:
        return tuple((max(a - start, 0), min(b, end) - start) for a, b in spans if b > start and a < end)

    return Note(note.tokens[start:end], moved(note.mentions), moved(note.near), note.query, start)
