"""One label per note, from a labelled CSV (a specialty, a diagnosis, a document type).

    rows ─► minus labels not asked for ─► one example per distinct text ─► the frequent classes

Public collections repeat a text under several labels (MTSamples: 1,891 texts in 4,014 rows); scored by the
row, the same text lies in training and test under different names. So a text counts once, and only where all
its rows agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from cluster.config import Place, Section
from cluster.errors import DataError
from downstream.tasks.examples import Cohort, Example, Filter, show_filters
from sharding.clean import CleanConfig, clean
from sharding.dedup import text_digest
from sharding.readers import csv_file


class ClassifyTask(Section):
    """`[task] name = "classify"`: a CSV with a text and a label column."""

    name: Literal["classify"] = "classify"
    url: Place = Field(description="the labelled CSV file")
    text: str = Field(description="column of the note")
    label: str = Field(description="column of the label")
    id: str | None = Field(None, description="column of the example's id; without one it is the record number")
    patient: str | None = Field(None, description="column of the patient; without one a distinct text is a patient")
    drop_labels: tuple[str, ...] = Field((), description="labels that do not count, such as document types")
    classes: tuple[str, ...] | None = Field(None, description="the classes wanted; of two, the second is positive")
    top: int | None = Field(None, ge=2, description="only that many classes, the most frequent ones")
    min_count: int = Field(1, ge=1, description="only classes with that many examples")

    def cohort(self, config: CleanConfig) -> Cohort:
        """One example per distinct text, in the order of the file. Raises DataError below 2 classes."""
        optional = [column for column in (self.id, self.patient) if column is not None]
        dropped = {label.strip() for label in self.drop_labels}
        found: dict[str, Example] = {}
        labels: dict[str, set[str]] = {}
        patients: set[str] = set()
        n_rows = n_labelled = 0
        for n_rows, row in enumerate(csv_file.rows(self.url, [self.text, self.label, *optional]), start=1):
            text, label = clean(row[0], config), row[1].strip()
            key = text_digest(text).hex()  # the patient of a text without one, as in sharding
            patient = row[-1] if self.patient else key
            patients.add(patient)
            if not text.strip() or not label or label in dropped:
                continue
            n_labelled += 1
            labels.setdefault(key, set()).add(label)
            if key not in found:
                example_id = row[2] if self.id else str(n_rows)
                found[key] = Example(example_id, patient, text, -1)
        clear = {key: next(iter(names)) for key, names in labels.items() if len(names) == 1}
        classes = self._classes(Counter(clear.values()))
        wanted = {key: classes.index(label) for key, label in clear.items() if label in classes}
        filters = [Filter("all rows", 0, n_rows, len(patients))]
        steps: list[tuple[str, int, Iterable[str]]] = [
            ("no text, no label, or a dropped label", n_labelled, found),
            ("the same text again", len(found), found),
            ("more than one label", len(clear), clear),
            ("label not among the classes", len(wanted), wanted),
        ]
        for name, left, keys in steps:
            left_patients = len({found[key].patient_id for key in keys})
            filters.append(Filter(name, filters[-1].left - left, left, left_patients))
        show_filters(f"classes of {self.label} in {self.url}", "notes", filters)
        return Cohort([found[key]._replace(label=label) for key, label in wanted.items()], classes)

    def _classes(self, counts: Counter[str]) -> tuple[str, ...]:
        """The classes, most frequent first (ties by name) or as the recipe lists them."""
        ranked = sorted(counts, key=lambda label: (-counts[label], label))
        wanted = self.classes if self.classes is not None else tuple(ranked[: self.top])
        if absent := [label for label in wanted if label not in counts]:
            raise DataError(f"{self.url}: no note has the label {absent[0]!r} alone; check task.classes")
        classes = tuple(label for label in wanted if counts[label] >= self.min_count)
        if len(classes) < 2:
            raise DataError(f"{self.url}: {len(classes)} class in column {self.label} is left; at least 2 are needed")
        return classes
