"""`./launch.sh annotate READER NOTES concepts=FILE`: every mention of every concept in notes, and what is said of it.

READER is `rules`, which needs no model, or a file that was learned from annotated notes:

    ./launch.sh annotate reader.npz learn=gold.jsonl               learns it
    ./launch.sh annotate reader.npz notes.csv concepts=zoster.toml uses it
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from datetime import date
from zipfile import BadZipFile

import numpy as np
from pydantic import Field

from cluster import config, logs, storage
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from downstream.concepts import schema
from downstream.concepts.attributes import Attributes, mentions_of
from downstream.concepts.mentions import Finder, load
from downstream.concepts.schema import Note
from downstream.concepts.words import Text
from downstream.frozen import npz
from downstream.tasks.table import rows

RULES = "rules"
EVERY = 10.0  # seconds between two lines about how far it is


class AnnotateRecipe(Section):
    """`./launch.sh annotate READER NOTES concepts=FILE [out=FILE]`."""

    reader: str = Field(description="'rules', or the file of a learned reader")
    notes: Place | None = Field(None, description="notes: CSV, JSON lines or Parquet")
    concepts: Place | None = Field(None, description="what to look for: TOML, or a table of concept and name")
    out: Place = Field("annotated.jsonl", description="annotated notes, one a line")
    id: str = Field("id", description="column of the note's name")
    text: str = Field("text", description="column of the note")
    patient: str | None = Field(None, description="column of the patient")
    date: str | None = Field(None, description="column of the note's date, YYYY-MM-DD; a time after it is left out")
    learn: Place | None = Field(None, description="annotated notes: the reader is learned from them")
    skip_bad: bool = Field(False, description="annotated notes that are wrong are left out and counted")


def main(args: list[str]) -> None:
    """The verb."""
    places = [word for word in args if "=" not in word]
    if not 1 <= len(places) <= 2:
        raise ConfigError("annotate what? give a reader ('rules', or a learned file) and a table of notes")
    named = [f"reader={places[0]}", *(f"notes={one}" for one in places[1:]), *(word for word in args if "=" in word)]
    asked = config.load(AnnotateRecipe, named, None)
    if asked.learn:
        return learn(asked)
    if not asked.notes or not asked.concepts:
        raise ConfigError(f"{'notes' if not asked.notes else 'concepts'}: is needed; say which file")
    annotator = Annotator(Finder(load(asked.concepts)), reader(asked.reader))
    counts = {"mentions": 0, "notes": 0, "with": 0}
    began = told = time.monotonic()

    def annotated() -> Iterator[Note]:
        nonlocal told
        for note in _notes(asked):
            found = annotator(note)
            counts["notes"] += 1
            counts["mentions"] += len(found.spans)
            counts["with"] += bool(found.spans)
            if (now := time.monotonic()) - told > EVERY:
                told = now
                logs.say(f"annotating: {counts['notes']:,} notes, {counts['notes'] / (now - began):,.0f} notes/s")
            yield found

    schema.write(asked.out, annotated())
    logs.say(
        f"{counts['notes']:,} notes, {counts['with']:,} with a mention, {counts['mentions']:,} mentions; in {asked.out}"
    )


def learn(asked: AnnotateRecipe) -> None:
    """Learns a reader from annotated notes."""
    if asked.reader == RULES:
        raise ConfigError("reader: 'rules' learns nothing; give the file to write")
    assert asked.learn is not None
    notes = [note for url in storage.expand(asked.learn) for note in schema.read(url, asked.skip_bad)]
    learned = Attributes.fit(notes)
    if not learned.learned:
        raise DataError(f"{asked.learn}: no attribute has two values, so there is nothing to learn")
    storage.write_bytes(asked.reader, npz(learned.arrays()))
    logs.say(f"learned {', '.join(learned.learned)} from {len(notes):,} notes; reader in {asked.reader}")


def reader(url: str) -> Attributes:
    """The learned attributes of a file; none for 'rules'. Raises DataError."""
    if url == RULES:
        return Attributes({})
    try:
        return Attributes.of(np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False))
    except (ValueError, KeyError, BadZipFile, EOFError):
        raise DataError(f"{url}: is no reader; `annotate {url} learn=GOLD.jsonl` makes one") from None


class Annotator:
    """Finds mentions and says what is said of them."""

    def __init__(self, finder: Finder, attributes: Attributes):
        self.finder, self.attributes = finder, attributes

    def __call__(self, note: Note) -> Note:
        """The note with spans; its text as it is."""
        spans = self.finder(Text(note.text))
        mentions = mentions_of(note, spans)
        for span, mention, (values, scores) in zip(spans, mentions, self.attributes(mentions), strict=True):
            span.attributes, span.cues = values, mention.cues
            if scores:
                span.scores = scores
        return note.model_copy(update={"spans": spans})


def _notes(asked: AnnotateRecipe) -> Iterator[Note]:
    assert asked.notes is not None
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
