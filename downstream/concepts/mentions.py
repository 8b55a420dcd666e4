"""Which concepts a note mentions, by a dictionary of names: a TOML file, or a table (CSV, JSON lines, Parquet).

[[concept]]
name = "herpes_zoster"
names = ["shingles", "herpes zoster", "HZ"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable

from pydantic import Field, ValidationError

from cluster import config, storage
from cluster.errors import ConfigError
from downstream.concepts.schema import Span
from downstream.concepts.words import Phrases, Text
from downstream.tasks.table import rows

SHORT = 5  # letters: up to so many, an abbreviation in capitals ("MI", "ALL") counts only in capitals


class Concept(config.Section):
    """Something to look for."""

    name: str = Field(min_length=1)
    label: str = Field("condition", description="what kind of thing it is: condition, drug, lab_test, procedure …")
    names: tuple[str, ...] = Field(min_length=1, description="all names for it")
    exact: bool = Field(False, description="names count only in the case they are given in")
    fuzzy: bool = Field(True, description="a misspelt long word counts, too: one letter more, less or another")
    code: dict[str, str] | None = Field(None, description="system and id, e.g. of UMLS")


def load(url: str) -> list[Concept]:
    """The concepts of a TOML file, or of a table with the columns concept and name. Raises ConfigError, DataError."""
    if not url.lower().endswith(".toml"):
        names: dict[str, list[str]] = {}
        for concept, name in rows(url, ["concept", "name"]):
            if concept.strip() and name.strip():
                names.setdefault(concept.strip(), []).append(name.strip())
        concepts = [Concept(name=concept, names=tuple(dict.fromkeys(found))) for concept, found in names.items()]
    else:
        try:
            tables = tomllib.loads(storage.read_bytes(url).decode())
            concepts = [Concept.model_validate(one) for one in tables.get("concept", [])]
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{url}: is not TOML: {exc}") from None
        except ValidationError as exc:
            first = exc.errors()[0]
            raise ConfigError(f"{url}: concept: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not concepts:
        raise ConfigError(f"{url}: has no concept; write [[concept]] with name and names")
    if twice := [one.name for i, one in enumerate(concepts) if one.name in {other.name for other in concepts[:i]}]:
        raise ConfigError(f"{url}: two concepts are named {twice[0]}")
    return concepts


class Finder:
    """Finds the mentions of concepts: at word boundaries, the longest name, one pass over a note."""

    def __init__(self, concepts: Iterable[Concept]):
        self._exactly: Phrases[Concept] = Phrases(self._phrases(concepts, False))
        self._nearly: Phrases[Concept] = Phrases(self._phrases(concepts, True), fuzzy=True)

    @staticmethod
    def _phrases(concepts: Iterable[Concept], fuzzy: bool) -> Iterable[tuple[str, Concept, bool]]:
        for concept in concepts:
            if concept.fuzzy == fuzzy:
                for name in concept.names:
                    yield name, concept, concept.exact or (name.isupper() and len(name) <= SHORT)

    def __call__(self, text: Text) -> list[Span]:
        """The mentions in order, without attributes. A name of two concepts gives a span of each."""
        found = [*self._exactly.find(text), *self._nearly.find(text)]
        found.sort(key=lambda one: (one.first, -one.last))
        spans: list[Span] = []
        done = (-1, 0)  # the words of the last mention: another may stand there, none may overlap it
        for first, last, concept in found:
            if first < done[1] and (first, last) != done:
                continue
            done = (first, last)
            start, end = text.starts[first], text.ends[last - 1]
            span = Span(
                id=f"T{len(spans) + 1}", start=start, end=end, text=text.text[start:end], label=concept.label,
                concept=concept.name,
            )  # fmt: skip
            spans.append(span.model_copy(update={"code": concept.code}) if concept.code else span)
        return spans
