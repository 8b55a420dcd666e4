"""What all formats share: offsets of UTF-16, JSON that is refused by name, and what a format has no place for.

A writer makes what its tool understands, reads that back as a stranger would, and keeps only the difference beside
it. So nothing is lost, and what an annotator changed in the tool is never undone by what was kept.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cluster import storage
from cluster.errors import DataError
from downstream.concepts import schema
from downstream.concepts.schema import Note

Record = dict[str, Any]

KEPT = "chartlm"  # the key under which a tool's own room for metadata holds what it has no place for
_CHANGED = "~"


class Wrong(Exception):
    """What is wrong with one document; never its text."""


class Found(NamedTuple):
    """A document that is there but not read yet: one that cannot be read need not end the others."""

    where: str
    name: str
    parse: Callable[[], Record]


def left_over(bare: Mapping[str, Any], actual: Mapping[str, Any]) -> Record:
    """What `bare` lacks to be `actual`: new keys as they are, others under "~" as [was, is] or, where gone, [was]."""
    rest: Record = {}
    changed: dict[str, list[Any]] = {}
    for key, value in actual.items():
        if key == "attributes" and value and isinstance(value, dict):
            if inner := left_over(bare.get(key) or {}, value):
                rest[key] = inner
        elif key not in bare and key != _CHANGED:
            rest[key] = value
        elif key not in bare or bare[key] != value:
            changed[key] = [bare.get(key), value]
    changed |= {key: [value] for key, value in bare.items() if key not in actual}
    return {**rest, _CHANGED: changed} if changed else rest


def restored(bare: Record, rest: Mapping[str, Any]) -> Record:
    """`bare` with what was left over. What the tool says wins where it is no longer what was written."""
    full = dict(bare)
    for key, value in rest.items():
        if key == "attributes" and isinstance(value, dict):
            full[key] = restored(full.get(key) or {}, value)
        elif key == _CHANGED:
            continue
        elif key not in full:
            full[key] = value
        elif isinstance(value, dict) and isinstance(full[key], dict):
            full[key] = {**value, **full[key]}
    changed = rest.get(_CHANGED)
    for key, pair in changed.items() if isinstance(changed, dict) else ():
        if isinstance(pair, list) and pair and full.get(key) == pair[0]:
            if len(pair) > 1:
                full[key] = pair[1]
            else:
                full.pop(key, None)
    return full


def outer(record: Mapping[str, Any]) -> Record:
    """A note without what is compared span by span, or stands elsewhere."""
    inner = {key for key in ("spans", "relations") if record.get(key)} | {"doc_id", "text"}
    return {key: value for key, value in record.items() if key not in inner}


def kept(bare: Record, actual: Record) -> Record:
    """What a tool has no place for, spans known by where they are: tools number them anew."""
    rest: Record = {"doc_id": actual["doc_id"]}
    if note := left_over(outer(bare), outer(actual)):
        rest["note"] = note
    spans, ids = [], {}
    for plain, full in zip(bare["spans"], actual.get("spans", ()), strict=True):
        ids[plain["id"]] = full["id"]
        entry = {"id": full["id"], "at": _place(plain)}
        if more := left_over({**plain, "id": full["id"]}, full):
            entry["rest"] = more
        spans.append(entry)
    if spans:
        rest["spans"] = spans
    plains = [_renamed(plain, ids) for plain in bare.get("relations", ())]
    more_of = [left_over(*pair) for pair in zip(plains, actual.get("relations", ()), strict=True)]
    if any(more_of):  # all of them: two may be of one kind and between the same spans
        rest["relations"] = [{**plain, "rest": more} for plain, more in zip(plains, more_of, strict=True)]
    return rest


def with_kept(bare: Record, rest: Any, stable: bool = False) -> Record:
    """The note again, from what the tool gave back and what `kept` put beside it; spans are known by their ids first
    where the tool keeps those (`stable`). Raises Wrong where what was kept is damaged.
    """
    if rest is None:
        return bare
    try:
        entries, others = list(rest.get("spans", ())), list(rest.get("relations", ()))
        spans = list(bare["spans"])
        matched = _matched(spans, entries, stable)
        taken, ids = {entry["id"] for entry in matched.values()}, {}
        for index, plain in enumerate(spans):
            entry = matched.get(index, {})
            new = entry["id"] if entry else _free(plain["id"], taken)
            taken.add(new)
            ids[plain["id"]] = new
            more = entry.get("rest", {})
            if entry and entry["at"][:2] != _place(plain)[:2]:  # moved: its pieces are no longer where they were
                more = {key: value for key, value in more.items() if key != "fragments"}
            spans[index] = restored({**plain, "id": new}, more)
        full = restored({**bare, "spans": spans}, rest.get("note", {}))
        if isinstance(rest.get("doc_id"), str):
            full["doc_id"] = rest["doc_id"]
        relations = []
        for plain in bare.get("relations", ()):
            relation = _renamed(plain, ids)
            found = next((one for one in others if all(one[key] == relation[key] for key in relation)), None)
            if found:
                others.remove(found)
            relations.append(restored(relation, found["rest"] if found else {}))
    except (AttributeError, KeyError, TypeError) as exc:
        raise Wrong(f"what is kept under {KEPT} is damaged; take it out") from exc
    return {**full, "relations": relations} if relations else full


def _place(span: Record) -> list[Any]:
    return [span["start"], span["end"], span.get("label", ""), span.get("attributes", {})]


def _matched(spans: Sequence[Record], entries: Sequence[Record], stable: bool) -> dict[int, Record]:
    """Which entry is which span's: of the same place, label and attributes first, then of ever less."""
    found: dict[int, Record] = {}
    free = dict.fromkeys(range(len(entries)))
    if stable:
        by_id = {entry["id"]: number for number, entry in enumerate(entries)}
        for index, span in enumerate(spans):
            if (number := by_id.pop(span["id"], -1)) >= 0:
                del free[number]
                found[index] = entries[number]
    for alike in (4, 3, 2):
        waiting: dict[str, list[int]] = {}
        for number in free:
            waiting.setdefault(json.dumps(entries[number]["at"][:alike], sort_keys=True), []).append(number)
        for index, span in enumerate(spans):
            same = waiting.get(json.dumps(_place(span)[:alike], sort_keys=True))
            if index not in found and same:
                number = same.pop(0)
                del free[number]
                found[index] = entries[number]
    return found


def _free(name: str, taken: set[str]) -> str:
    return next(new for new in itertools.chain([name], map("T{}".format, itertools.count(1))) if new not in taken)


def _renamed(relation: Record, ids: Mapping[str, str]) -> Record:
    """A relation by the ids of the note; one to a span that is not there stays as it is, for schema.problem to name."""
    return {key: ids.get(value, value) if key in ("head", "tail") else value for key, value in relation.items()}


def numbers_of(note: Note) -> dict[str, int]:
    """A number for every span id: that of T7 where all are of this kind, else the place in the list."""
    named = [span.id[1:] for span in note.spans]
    plain = all(
        f"T{name}" == span.id and name.isascii() and name.isdigit()
        for name, span in zip(named, note.spans, strict=True)
    )
    if plain and all(name[0] != "0" for name in named):
        return {span.id: int(name) for name, span in zip(named, note.spans, strict=True)}
    return {span.id: place for place, span in enumerate(note.spans, start=1)}


class Utf16:
    """Offsets of a text in code points and in UTF-16 code units, as JavaScript and Java count."""

    def __init__(self, text: str) -> None:
        self._same = text.isascii() or max(text, default="") < "\U00010000"
        self._units = [] if self._same else [0, *itertools.accumulate(1 + (sign > "\uffff") for sign in text)]
        self._points = {unit: point for point, unit in enumerate(self._units)}
        self._length = len(text)

    def units(self, point: int) -> int:
        """The offset in code units of one in code points."""
        return point if self._same else self._units[point]

    def points(self, unit: int, name: str) -> int:
        """The offset in code points of one in code units. Raises Wrong outside the text or within a character."""
        length = self._length if self._same else self._units[-1]
        if not 0 <= unit <= length:
            raise Wrong(f"span {name}: offset {unit} of {length} code units")
        if self._same:
            return unit
        if unit not in self._points:
            raise Wrong(f"span {name}: offset {unit} is within a character; are the offsets really of UTF-16?")
        return self._points[unit]


def whole(value: Any, what: str) -> int:
    """`value`, an integer. Raises Wrong where it is none."""
    if type(value) is not int:
        raise Wrong(f"{what}: a whole number is needed")
    return value


def typed(value: Any, kind: type, what: str) -> Any:
    """`value`, of a kind. Raises Wrong where it is not."""
    if not isinstance(value, kind):
        raise Wrong(f"{what}: {'missing' if value is None else f'not a {kind.__name__}'}")
    return value


def span_of(name: str, start: int, end: int, text: str, label: str | None, said: Any = None) -> Record:
    """A span as a record. Raises Wrong where it is outside `text`, or where `said` is not what stands there (white
    space aside: tools write line ends in ways of their own).
    """
    if not 0 <= start < end <= len(text):
        raise Wrong(f"span {name}: {start} to {end} of {len(text)} characters")
    there = text[start:end]
    if isinstance(said, str) and said and squeezed(said) != squeezed(there):
        raise Wrong(f"span {name}: its text is not what stands at {start} to {end}")
    span: Record = {"id": name, "start": start, "end": end, "text": there}
    return span if label is None else {**span, "label": label}


def squeezed(text: str) -> str:
    """Without white space, also where it is spelled as backslash and n."""
    return "".join(text.replace("\\n", " ").split()).replace("\\", "")


def decoded(data: bytes, where: str) -> str:
    """UTF-8 as text, line ends as they are. Raises DataError with the place of the first byte that is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise DataError(f"{where}: byte {exc.start:,} is not UTF-8; convert the file to UTF-8") from exc


def parsed(text: str, where: str) -> Any:
    """A JSON value. Raises DataError with the place where it stops being one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        raise DataError(f"{where}: not JSON at line {exc.lineno}, column {exc.colno}; export the file again") from exc
    except RecursionError as exc:
        raise DataError(f"{where}: JSON too deep to read; export the file again") from exc


def files(url: str, *endings: str) -> Iterator[str]:
    """The files that a URL names; of a folder those with one of the endings. Raises DataError where there is none."""
    found = storage.expand(url)
    kept_ones = [name for name in found if name.endswith(endings)]
    if not kept_ones and (len(found) > 1 or storage.names(url)):
        raise DataError(f"{url}: no file ends with {' or '.join(endings)}; name the file or its folder")
    yield from kept_ones or found


def sound(notes: Iterable[Note], url: str) -> Iterator[Note]:
    """The notes. Raises DataError at one that could not be read again."""
    for note in notes:
        if wrong := schema.problem(note):
            raise DataError(f"{url}: note {note.doc_id}: {wrong}; mend it before it is written")
        yield note


def half(note: Note) -> str:
    """What is wrong where a text has half a surrogate pair, as JSON can spell it; "" where it has none."""
    return "" if note.text.isascii() or not re.search("[\ud800-\udfff]", note.text) else "half a character in its text"


def encoded(text: str, url: str, note: Note) -> bytes:
    """Text as UTF-8. Raises DataError where it holds half a character."""
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{url}: note {note.doc_id}: half a character (a lone surrogate); take it out") from exc
