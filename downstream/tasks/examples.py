"""What a task hands on: labelled notes, and the cohort counts that say where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster import logs


class Example(NamedTuple):
    """One labelled note. `label` indexes the classes of its cohort (with several labels a note: all that apply,
    ascending); `patient_id` decides its split. Where a task asks about something, `mentions` are the spans of it in
    the text, in characters, end exclusive, and `query` is what is asked.
    """

    example_id: str
    patient_id: str
    text: str
    label: int | tuple[int, ...]
    mentions: tuple[tuple[int, int], ...] = ()
    query: str = ""


class Cohort(NamedTuple):
    """The examples of a task in a deterministic order. Of two classes, the second is the positive one; with `several`
    each class is a question of its own.
    """

    examples: list[Example]
    classes: tuple[str, ...]
    several: bool = False


class Filter(NamedTuple):
    """One row of the cohort table: what was filtered, how many fell out, and what is left."""

    name: str
    dropped: int
    left: int
    patients: int


def filtered(name: str, before: Sequence[object], patients: Sequence[str]) -> Filter:
    """The row of a filter that left these patients (one for each thing left) of those before."""
    return Filter(name, len(before) - len(patients), len(patients), len(set(patients)))


def show_filters(title: str, unit: str, filters: Sequence[Filter]) -> None:
    """Prints the cohort table: the reader can see which filter took how many."""
    rows = [(f.name, f"{f.dropped:,}" if f.dropped else "", f"{f.left:,}", f"{f.patients:,}") for f in filters]
    logs.table(title, ["filter", "dropped", f"{unit} left", "patients left"], rows)
