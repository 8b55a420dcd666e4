"""Annotated notes: JSON lines, one note a line; what every other room of concepts reads and writes.

    {"doc_id": "n1", "note_date": "2015-08-02", "text": "…", "sections": […],
     "spans": [{"id": "T1", "start": 34, "end": 42, "text": "shingles", "label": "condition",
                "concept": "herpes_zoster", "attributes": {"negation": "affirmed", "temporality": "historical"}}],
     "relations": [{"type": "dated", "head": "T1", "tail": "T2"}]}

Offsets are code points into `text`, end exclusive, and the text is never altered. An attribute that is missing is not
annotated, which is not its default. Keys that are not known here are kept as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster import logs, storage
from cluster.errors import DataError
from downstream.tasks.table import records

VALUES = {
    "negation": ("affirmed", "negated"),
    "certainty": ("certain", "uncertain", "hypothetical", "conditional", "generic"),
    "temporality": ("current", "historical", "future", "not_particular"),
    "experiencer": ("patient", "family", "other"),
}


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def record(self) -> dict[str, Any]:
        """As it is written: what was never said is left out."""
        return self.model_dump(exclude_unset=True, mode="json")


class Section(_Record):
    """A stretch of a note under one heading, or one that was learned to be such."""

    start: int
    end: int
    label: str
    heading: tuple[int, int] | None = None
    source: str = ""
    score: float = 1.0


class Span(_Record):
    """A mention, a date, a value. `fragments`: where it is in pieces; `start` and `end` then hold all of them."""

    id: str
    start: int
    end: int
    text: str = ""
    label: str = ""
    concept: str | None = None
    code: Any = None
    fragments: list[tuple[int, int]] | None = None
    section: str | None = None
    attributes: dict[str, str] = Field(default_factory=dict)
    scores: dict[str, float] = Field(default_factory=dict)
    cues: dict[str, tuple[int, int]] = Field(default_factory=dict)
    value: dict[str, Any] | None = None


class Relation(_Record):
    """From one span to another, by their ids."""

    type: str
    head: str
    tail: str


class Note(_Record):
    """An annotated note."""

    doc_id: str
    text: str
    patient_id: str | None = None
    note_date: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)
    sections: list[Section] = Field(default_factory=list)
    spans: list[Span] = Field(default_factory=list)
    relations: list[Relation] = Field(default_factory=list)
    labels: dict[str, Any] = Field(default_factory=dict)


def problem(note: Note) -> str:
    """What is wrong with an annotated note, by span id and offsets and never by text; "" where nothing is."""
    length, ids = len(note.text), set()
    same_place: dict[tuple[int, int, str, str | None], Span] = {}
    for span in note.spans:
        if span.id in ids:
            return f"span {span.id}: a second one of this id"
        ids.add(span.id)
        for start, end in [(span.start, span.end), *(span.fragments or ())]:
            if not 0 <= start < end <= length:
                return f"span {span.id}: {start} to {end} of {length} characters"
        said = note.text[span.start : span.end]
        if span.text and not span.fragments and span.text != said:
            beyond = any(ord(sign) > 0xFFFF for sign in note.text[: span.end])
            hint = "; are the offsets of UTF-16? read it with format=label-studio or format=xmi" if beyond else ""
            return f"span {span.id}: its text is not what stands at {span.start} to {span.end}{hint}"
        for name, value in span.attributes.items():
            if name in VALUES and value not in VALUES[name]:
                return f"span {span.id}: {name}={value[:30]!r}; the values are {', '.join(VALUES[name])}"
        twin = same_place.setdefault((span.start, span.end, span.label, span.concept), span)
        wrong = next((k for k, v in twin.attributes.items() if span.attributes.get(k, v) != v), None)
        if wrong is not None:
            return f"spans {twin.id} and {span.id} are at one place and do not agree on {wrong or repr(wrong)}"
    if crossing := _crossing(note.spans):
        return "spans {} and {} of one label overlap, and neither lies within the other".format(*crossing)
    for relation in note.relations:
        if missing := {relation.head, relation.tail} - ids:
            return f"relation {relation.type}: no span has the id {sorted(missing)[0]}"
    for section in note.sections:
        if not 0 <= section.start <= section.end <= length:
            return f"section {section.label}: {section.start} to {section.end} of {length} characters"
    return ""


def _crossing(spans: Iterable[Span]) -> tuple[str, str] | None:
    """The first two spans of one label and concept that share some but not all of their characters."""
    around: dict[tuple[str, str | None], list[Span]] = {}  # of each label the spans that are not over yet
    for span in sorted(spans, key=lambda one: (one.start, -one.end)):
        if span.fragments:
            continue
        outer = around.setdefault((span.label, span.concept), [])
        while outer and outer[-1].end <= span.start:
            outer.pop()
        if outer and outer[-1].end < span.end:
            return outer[-1].id, span.id
        outer.append(span)
    return None


def read(url: str, skip_bad: bool = False) -> Iterator[Note]:
    """The notes of an annotated file. Raises DataError at the first bad one, naming file, document and span; with
    `skip_bad` such notes are left out and counted.
    """
    bad = 0
    for number, record in enumerate(records(url), start=1):
        try:
            note = Note.model_validate(record)
            wrong = problem(note)
        except ValidationError as exc:
            note, wrong = None, _said(exc)
        if note and not wrong:
            yield note
            continue
        name = record.get("doc_id", f"in line {number}")
        if not skip_bad:
            raise DataError(f"{url}: note {name}: {wrong}; mend it, or leave such notes out with skip_bad=true")
        bad += 1
    if bad:
        logs.say(f"{url}: {bad:,} bad notes left out")


def _said(error: ValidationError) -> str:
    first = error.errors(include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def line(note: Note) -> str:
    """The note as its line, without a line end."""
    return json.dumps(note.record(), ensure_ascii=False)


def write(url: str, notes: Iterable[Note]) -> int:
    """Writes an annotated file note by note, whole or not at all; the number of its notes."""
    count = 0
    with storage.atomic_writer(url) as stream:
        for note in notes:
            count += 1
            stream.write(f"{line(note)}\n".encode())
    return count
