"""One or several labels of a note or a patient, from a labelled table (a specialty, a diagnosis, a document type).

    rows ─► minus labels not asked for ─► one example per distinct text (or patient) ─► the frequent classes

Public collections repeat a text under several labels (MTSamples: 1,891 texts in 4,014 rows); scored by the
row, the same text lies in training and test under different names. So a text counts once, and only where all
its rows agree, or, with `several`, with all its labels, each a question of its own.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from downstream.tasks.examples import Cohort, Example, Filter, show_filters
from downstream.tasks.table import Cell, cells
from sharding.clean import CleanConfig, clean_notes
from sharding.dedup import folded, note_digests, word_hashes

BLOCK_ROWS = 1000  # cleaned at once


class _Row(NamedTuple):
    """A record: the cleaned text and its digest, every label beside it, and its id and patient where they are named."""

    text: str
    digest: str
    labels: set[str]
    ids: list[str]


class _Unit(NamedTuple):
    """A text, or all texts of a patient (by digest, in file order), with every label that stands beside them."""

    example_id: str
    patient_id: str
    texts: dict[str, str]
    labels: set[str]


class ClassifyTask(Section):
    """`[task] name = "classify"`: a table with a text and a label column."""

    name: Literal["classify"] = "classify"
    url: Place = Field(description="the labelled table: CSV, JSON lines or Parquet, by its name")
    text: str = Field(description="column of the note")
    label: str = Field(description="column of the label; in JSON lines and Parquet it may hold lists")
    id: str | None = Field(None, description="column of the example's id; without one it is the record number")
    patient: str | None = Field(None, description="column of the patient; without one a distinct text is a patient")
    per: Literal["note", "patient"] = Field("note", description="what is labelled; a patient's notes are read as one")
    several: bool = Field(
        False, description="a note may have several labels: every label of a text counts, each predicted on its own"
    )
    separator: str | None = Field(None, min_length=1, description="between the labels of a cell")
    drop_labels: tuple[str, ...] = Field((), description="labels that do not count, such as document types")
    classes: tuple[str, ...] | None = Field(None, description="the classes wanted; of two, the second is positive")
    top: int | None = Field(None, ge=2, description="only that many classes, the most frequent ones")
    min_count: int = Field(1, ge=1, description="only classes with that many examples")

    def cohort(self, config: CleanConfig) -> Cohort:
        """One example per distinct text or patient, in the order of the file. Raises DataError below 2 classes."""
        if self.per == "patient" and self.patient is None:
            raise ConfigError('task.per="patient": task.patient must name the column of the patient')
        units, filters = self._read(config)
        dropped = self._dropped()
        if self.per == "patient":
            units = [unit for unit in units if unit.labels]
            filters.append(_filter("no label, or a dropped label", filters[-1], units))
        if not self.several:
            units = [unit for unit in units if len(unit.labels) == 1]
            filters.append(_filter("more than one label", filters[-1], units))
        classes = self._classes(Counter(label for unit in units for label in unit.labels - dropped))
        place = {label: k for k, label in enumerate(classes)}
        if not self.several:
            units = [unit for unit in units if unit.labels <= place.keys()]
            filters.append(_filter("label not among the classes", filters[-1], units))
        found = []
        for unit in units:
            # With several labels, one that has none of those chosen is a negative for all of them.
            chosen = tuple(sorted(place[label] for label in unit.labels if label in place))
            label = chosen if self.several else chosen[0]
            found.append(Example(unit.example_id, unit.patient_id, "\n\n".join(unit.texts.values()), label))
        unit_name = "notes" if self.per == "note" else "patients"
        show_filters(f"classes of {self.label} in {self.url}", unit_name, filters)
        return Cohort(found, classes, self.several)

    def _dropped(self) -> set[str]:
        return {label.strip() for label in self.drop_labels}

    def _read(self, config: CleanConfig) -> tuple[list[_Unit], list[Filter]]:
        """Row by row: kept are distinct texts. With `several`, labels hold dropped ones: they tell a negative from a
        note that nobody labelled. Of a patient every note is read, labelled or not.
        """
        dropped = set() if self.several else self._dropped()
        units: dict[str, _Unit] = {}
        patients: set[str] = set()
        n_rows = n_kept = 0
        for n_rows, row in enumerate(self._rows(config), start=1):
            text, digest, labels = row.text, row.digest, row.labels - dropped
            patient = row.ids[-1] if self.patient else digest  # as in sharding
            patients.add(patient)
            if not text.strip() or not (labels or self.per == "patient"):
                continue
            n_kept += 1
            key = digest if self.per == "note" else patient
            if key not in units:
                example_id = patient if self.per == "patient" else row.ids[0] if self.id else str(n_rows)
                units[key] = _Unit(example_id, patient, {}, set())
            units[key].labels.update(labels)
            units[key].texts.setdefault(digest, text)
        left = list(units.values())
        n_patients = len({unit.patient_id for unit in left})
        unlabelled = "no text or no label" if self.several else "no text, no label, or a dropped label"
        filters = [
            Filter("all rows", 0, n_rows, len(patients)),
            Filter(unlabelled if self.per == "note" else "no text", n_rows - n_kept, n_kept, n_patients),
        ]
        filters.append(
            _filter("the same text again" if self.per == "note" else "a further note of a patient", filters[-1], left)
        )
        return left, filters

    def _rows(self, config: CleanConfig) -> Iterator[_Row]:
        id_columns = [column for column in (self.id, self.patient) if column is not None]
        table = enumerate(cells(self.url, [self.text, self.label, *id_columns]), start=1)
        while block := list(itertools.islice(table, BLOCK_ROWS)):
            texts = [self._string(number, self.text, row[0]) for number, row in block]
            for (number, row), (text, digest) in zip(block, cleaned(texts, config), strict=True):
                ids = [self._string(number, *named).strip() for named in zip(id_columns, row[2:], strict=True)]
                if empty := [column for column, cell in zip(id_columns, ids, strict=True) if not cell]:
                    raise DataError(f"{self.url}: row {number}: empty {empty[0]}; every note needs one")
                yield _Row(text, digest, self._labels(row[1]), ids)

    def _string(self, number: int, column: str, cell: Cell) -> str:
        if not isinstance(cell, str):
            raise DataError(f"{self.url}: row {number}: {column} is a list, not text")
        return cell

    def _labels(self, cell: Cell) -> set[str]:
        if isinstance(cell, str):
            cell = cell.split(self.separator) if self.separator else [cell]
        return {label.strip() for label in cell} - {""}

    def _classes(self, counts: Counter[str]) -> tuple[str, ...]:
        """The classes, most frequent first (ties by name) or as the recipe lists them."""
        ranked = sorted(counts, key=lambda label: (-counts[label], label))
        wanted = self.classes if self.classes is not None else tuple(ranked[: self.top])
        if absent := [label for label in wanted if label not in counts]:
            alone = "" if self.several else " alone"
            raise DataError(f"{self.url}: no note has the label {absent[0]!r}{alone}; check task.classes")
        classes = tuple(label for label in wanted if counts[label] >= self.min_count)
        if len(classes) < 2:
            raise DataError(f"{self.url}: {len(classes)} class in column {self.label} is left; at least 2 are needed")
        return classes


def cleaned(texts: Sequence[str], config: CleanConfig) -> Iterator[tuple[str, str]]:
    """Of each what `clean` makes of it, and the `text_digest` of that; of many at once several times as fast."""
    words = clean_notes(pa.array(texts, pa.string()), config)
    digests = note_digests(word_hashes(folded(words.vocabulary)), words.ids, words.offsets)
    for (start, end), digest in zip(itertools.pairwise(words.offsets.tolist()), digests, strict=True):
        joined = " ".join([words.vocabulary[place] for place in words.ids[start:end].tolist()])
        yield re.sub(" ?\n ?", "\n", joined), digest.hex()


def _filter(name: str, before: Filter, left: Sequence[_Unit]) -> Filter:
    return Filter(name, before.left - len(left), len(left), len({unit.patient_id for unit in left}))
