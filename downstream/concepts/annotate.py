"""`./launch.sh annotate READER NOTES concepts=FILE`: every mention of every concept in notes, and what is said of it.

READER is `rules`, which needs no model, or the folder of what was learned from annotated notes:

    ./launch.sh finetune recipes/concepts/train.toml corpus=gold.jsonl out=runs/concepts
    ./launch.sh annotate runs/concepts notes.csv concepts=recipes/concepts/zoster.toml

`to=doccano` writes pre-labels for the tools of annotators; fine-tuning learns from what was corrected there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import date, timedelta
from typing import Literal

from pydantic import Field

from cluster import config, logs
from cluster.config import Place
from cluster.errors import ConfigError, DataError
from downstream.concepts import dates, formats, labs
from downstream.concepts.features import mentions_of, sections_of
from downstream.concepts.mentions import Finder, load
from downstream.concepts.reader import Reader
from downstream.concepts.schema import Note, Relation, Span
from downstream.concepts.words import Text
from downstream.tasks.table import rows

PRESENT = timedelta(days=30)  # what is dated within so many days is of now
BESIDE = 60  # characters between a lab test and its value
EVERY = 10.0  # seconds between two lines about how far it is

Written = Literal["jsonl", "brat", "doccano", "label-studio", "label-studio-predictions"]


class AnnotateRecipe(config.Section):
    """`./launch.sh annotate READER NOTES concepts=FILE [out=FILE]`."""

    reader: str = Field(description="'rules', or the folder of a learned reader")
    notes: Place = Field(description="notes: CSV, JSON lines or Parquet")
    concepts: Place = Field(description="what to look for: TOML, or a table of concept and name")
    out: Place = Field("annotated.jsonl", description="annotated notes, one a line")
    id: str = Field("id", description="column of the note's name")
    text: str = Field("text", description="column of the note")
    patient: str | None = Field(None, description="column of the patient")
    date: str | None = Field(None, description="column of the note's date, YYYY-MM-DD; a time after it is left out")
    to: Written = Field("jsonl", description="format of the annotated notes")


def main(args: list[str]) -> None:
    """The verb."""
    places = [word for word in args if "=" not in word]
    if len(places) != 2:
        raise ConfigError("annotate what? give a reader ('rules', or the folder of a learned one) and a table of notes")
    named = [f"reader={places[0]}", f"notes={places[1]}", *(word for word in args if "=" in word)]
    asked = config.load(AnnotateRecipe, named, None)
    annotator = Annotator(Finder(load(asked.concepts)), Reader.load(asked.reader))
    counts = {"mentions": 0, "notes": 0, "with": 0}
    began = told = time.monotonic()

    def annotated() -> Iterator[Note]:
        nonlocal told
        for note in _notes(asked):
            found = annotator(note)
            counts["notes"] += 1
            mentions = sum(span.concept is not None for span in found.spans)
            counts["mentions"] += mentions
            counts["with"] += mentions > 0
            if (now := time.monotonic()) - told > EVERY:
                told = now
                logs.say(f"annotating: {counts['notes']:,} notes, {counts['notes'] / (now - began):,.0f} notes/s")
            yield found

    formats.WRITERS[asked.to](asked.out, annotated())
    logs.say(
        f"{counts['notes']:,} notes, {counts['with']:,} with a mention, {counts['mentions']:,} mentions; in {asked.out}"
    )


class Annotator:
    """Finds sections, mentions, dates and lab values, and says what is said of them."""

    def __init__(self, finder: Finder, reader: Reader):
        self.finder, self.reader = finder, reader

    def __call__(self, note: Note) -> Note:
        """The note with sections, spans and relations; its text as it is."""
        note = note.model_copy(update={"sections": sections_of(note.text, self.reader.tagger)})
        text = Text(note.text)
        spans = self.finder(text)
        mentions = mentions_of(note, spans, text)
        for span, mention, (values, scores) in zip(spans, mentions, self.reader(note, spans, mentions), strict=True):
            span.attributes, span.cues = values, mention.cues
            if mention.section:
                span.section = mention.section
            if scores:
                span.scores = scores
        relations: list[Relation] = []
        if spans:
            _dated(note, text, spans, relations)
            _measured(note, spans, relations)
        return note.model_copy(update={"spans": spans, "relations": relations})


def _dated(note: Note, text: Text, spans: list[Span], relations: list[Relation]) -> None:
    """Adds the dates of sentences that hold a mention, and links each mention with the nearest of its sentence. A
    mention that is said to be current but dated before the note's day is historical, one dated after it is future.
    """
    day = date.fromisoformat(note.note_date) if note.note_date else None
    mentions = list(spans)
    by_sentence: dict[int, list[Span]] = {}
    for found in dates.find(note.text, day):
        value = {"from": found.first.isoformat(), "to": found.last.isoformat(), "granularity": found.granularity}
        span = Span(
            id=f"D{found.start}", start=found.start, end=found.end, text=note.text[found.start : found.end],
            label="date", value=value,
        )  # fmt: skip
        by_sentence.setdefault(_sentence(text, span), []).append(span)
    used: dict[str, Span] = {}
    for mention in mentions:
        near = by_sentence.get(_sentence(text, mention))
        if not near:
            continue
        tail = min(near, key=lambda span: max(span.start - mention.end, mention.start - span.end))
        used[tail.id] = tail
        relations.append(Relation(type="dated", head=mention.id, tail=tail.id))
        when = tail.value or {}
        if day and mention.attributes.get("temporality") == "current":
            past, future = date.fromisoformat(when["to"]) < day - PRESENT, date.fromisoformat(when["from"]) > day
            if past or future:
                mention.attributes["temporality"] = "historical" if past else "future"
                mention.scores.pop("temporality", None)  # of "current"; a reader has not seen the date
    spans += used.values()


def _sentence(text: Text, span: Span) -> int:
    return text.sentence(text.span_of(span.start, span.end)[0])[0]


def _measured(note: Note, spans: list[Span], relations: list[Relation]) -> None:
    """Adds the values of lab tests, each linked with its test."""
    tests = [span for span in spans if span.label == "lab_test"]
    if not tests:
        return
    taken = [(span.start, span.end) for span in spans]
    values = [value for value in labs.find(note.text) if not any(a < value.end and b > value.start for a, b in taken)]
    linked = labs.link(note.text, [(one.start, one.end) for one in values], [(one.start, one.end) for one in tests])
    for value, which in zip(values, linked, strict=True):
        if which is None or abs(value.start - tests[which].end) > BESIDE:
            continue
        said = {"number": value.number, "comparison": value.comparison, "to": value.high, "unit": value.unit}
        kept = {key: one for key, one in (said | {"flag": value.flag}).items() if one not in (None, "")}
        span = Span(
            id=f"V{value.start}", start=value.start, end=value.end, text=note.text[value.start : value.end],
            label="lab_value", value=kept,
        )  # fmt: skip
        spans.append(span)
        relations.append(Relation(type="value_of", head=span.id, tail=tests[which].id))


def _notes(asked: AnnotateRecipe) -> Iterator[Note]:
    columns = list(dict.fromkeys(name for name in (asked.id, asked.text, asked.patient, asked.date) if name))
    for number, cells in enumerate(rows(asked.notes, columns), start=1):
        row = dict(zip(columns, cells, strict=True))
        found = {"doc_id": row[asked.id] or f"row {number}", "text": row[asked.text]}
        if asked.patient:
            found["patient_id"] = row[asked.patient]
        if asked.date and (said := row[asked.date][:10]):
            try:
                found["note_date"] = date.fromisoformat(said).isoformat()
            except ValueError:
                raise DataError(f"{asked.notes}: row {number}: {asked.date} is not YYYY-MM-DD") from None
        yield Note.model_validate(found)
