"""What a note says of something it mentions: is it there now, was it once, is it the father's, or only a vaccine.

The seed problem: a physician has labelled some two hundred patients whose notes contain "shingles", "zoster" or
"post-herpetic neuralgia". A classifier that is not told what to look for stays near majority, so the task hands on
where the mentions are and what is asked; `tell` and `head.pooling` say what the model makes of it.

    a table      one row a note, with its label     mentions are found by the concept, its synonyms or `patterns`
    annotations  JSON lines with spans              each span that has the attribute is an example
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from cluster import logs
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from downstream.tasks.examples import Cohort, Example, Filter, show_filters
from downstream.tasks.table import records, rows
from sharding.clean import CleanConfig, clean, cleaned_around


class StatusTask(Section):
    """`[task] name = "status"`."""

    name: Literal["status"] = "status"
    url: Place = Field(description="labelled notes: CSV, JSON lines or Parquet; or annotated notes, JSON lines")
    concept: str = Field("", description="what is asked about")
    synonyms: tuple[str, ...] = Field((), description="other words for it")
    patterns: tuple[str, ...] = Field(
        (), description="regular expressions that find a mention; else concept and synonyms"
    )
    text: str = Field("text", description="column of the note")
    label: str = Field("label", description="column of the label")
    id: str = Field("id", description="column of the note's name")
    patient: str | None = Field(None, description="column of the patient; without one each note is a patient")
    attribute: str | None = Field(None, description="of the spans of annotated notes; then no table is read")
    classes: tuple[str, ...] | None = Field(None, description="the classes wanted; of two, the second is positive")

    def cohort(self, config: CleanConfig) -> Cohort:
        """One example a note with a mention and a label, or a labelled mention, in the order of the file."""
        found, filters = self._annotated(config) if self.attribute else self._table(config)
        counts = Counter(label for _, label in found)
        ranked = sorted(counts, key=lambda label: (-counts[label], label))
        classes = self.classes if self.classes is not None else tuple(ranked)
        if absent := [label for label in classes if label not in counts]:
            raise DataError(f"{self.url}: no example has the label {absent[0]!r}; check task.classes")
        if len(classes) < 2:
            raise DataError(f"{self.url}: {len(classes)} class is left; at least 2 are needed")
        wanted = [example._replace(label=classes.index(label)) for example, label in found if label in classes]
        filters.append(_filter("label not among the classes", filters[-1].left, wanted))
        show_filters(f"what {self.url} says of {self.concept or 'its mentions'}", "examples", filters)
        return Cohort(wanted, classes)

    def ask(self, note: str, text: str) -> Example | None:
        """The example of a new note (cleaned), without a label; None where it has no mention."""
        finder = self._finder()
        mentions = tuple(match.span() for match in finder.finditer(text) if match.end() > match.start())
        return Example(note, note, text, -1, mentions, self._query()) if mentions else None

    def _query(self) -> str:
        return " , ".join([self.concept, *self.synonyms]).lower()

    def _finder(self) -> re.Pattern[str]:
        if not self.concept and not self.patterns:
            raise ConfigError("task.concept: is empty; say what to look for, or give task.patterns")
        named = [rf"(?<!\w){re.escape(name)}" for name in (self.concept, *self.synonyms) if name]
        try:
            return re.compile("|".join(self.patterns or named), re.IGNORECASE)
        except re.error as exc:
            raise ConfigError(f"task.patterns: {exc} in {'|'.join(self.patterns)!r}") from None

    def _table(self, config: CleanConfig) -> tuple[list[tuple[Example, str]], list[Filter]]:
        columns = [self.id, self.text, self.label, *([self.patient] if self.patient else [])]
        notes = mentioned = 0
        found: list[tuple[Example, str]] = []
        patients: set[str] = set()
        for row in rows(self.url, columns):
            notes += 1
            note, text, label = row[0], clean(row[1], config), row[2].strip()
            patients.add(row[-1] if self.patient else note)
            if example := self.ask(note, text):
                mentioned += 1
                if label:
                    found.append((example._replace(patient_id=row[-1] if self.patient else note), label))
        filters = [Filter("all notes", 0, notes, len(patients))]
        left = len({example.patient_id for example, _ in found})
        filters.append(Filter("no mention", notes - mentioned, mentioned, left))
        filters.append(Filter("no label", mentioned - len(found), len(found), left))
        return found, filters

    def _annotated(self, config: CleanConfig) -> tuple[list[tuple[Example, str]], list[Filter]]:
        found: list[tuple[Example, str]] = []
        spans = notes = 0
        patients: set[str] = set()
        for record in records(self.url):
            notes += 1
            name, text = str(record["doc_id"]), str(record["text"])
            patient = str(record.get("patient_id", name))
            patients.add(patient)
            annotated = sorted(record.get("spans", ()), key=lambda span: (span["start"], span["end"]))
            spans += len(annotated)
            labelled = [span for span in annotated if self.attribute in span.get("attributes", {})]
            _check(self.url, name, labelled, len(text))
            cleaned, places = cleaned_around(text, [(span["start"], span["end"]) for span in labelled], config)
            for span, (start, end) in zip(labelled, places, strict=True):
                if end > start:
                    query = self._query() if self.concept else cleaned[start:end].lower()
                    example = Example(f"{name}/{span['id']}", patient, cleaned, -1, ((start, end),), query)
                    found.append((example, str(span["attributes"][self.attribute])))
        logs.say(f"{self.url}: {notes:,} annotated notes")
        left = len({example.patient_id for example, _ in found})
        return found, [
            Filter("all spans", 0, spans, len(patients)),
            Filter(f"without {self.attribute}", spans - len(found), len(found), left),
        ]


def _filter(name: str, before: int, left: Sequence[Example]) -> Filter:
    return Filter(name, before - len(left), len(left), len({example.patient_id for example in left}))


def _check(url: str, note: str, spans: Sequence[dict[str, Any]], length: int) -> None:
    end = 0
    for span in spans:
        if not 0 <= span["start"] < span["end"] <= length:
            raise DataError(
                f"{url}: note {note}, span {span['id']}: {span['start']} to {span['end']} of {length} characters"
            )
        if span["start"] < end:
            raise DataError(f"{url}: note {note}, span {span['id']} overlaps the one before it; label one of them")
        end = span["end"]
