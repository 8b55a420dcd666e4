"""doccano: JSON lines of its project kind "Sequence Labeling" with relations. Lossless both ways.

    {"id": 1, "text": "…",
     "entities": [{"id": 1, "start_offset": 34, "end_offset": 42, "label": "condition|historical"}],
     "relations": [{"id": 1, "from_id": 1, "to_id": 2, "type": "dated"}], "Comments": [], "meta": {"chartlm": {…}}}

Attributes stand behind the label: a value says which attribute it is of, others are written name=value. What doccano
has no place for is kept under meta; it is found again by the place of its span, since doccano numbers all anew. Offsets
are of code points: the project must not count grapheme clusters as one character.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from cluster import storage
from downstream.concepts.formats import exchange
from downstream.concepts.formats.exchange import Found, Record, Wrong
from downstream.concepts.schema import VALUES, Note
from downstream.tasks.table import records

_ATTRIBUTE = {value: name for name, values in VALUES.items() for value in values}
_OURS = ("id", "text", "data", "entities", "relations", "Comments", "comments", "label", "labels", "meta")


def found(url: str) -> Iterator[Found]:
    """The documents of a file, or of the .jsonl files of a folder."""
    for name in exchange.files(url, ".jsonl", ".json"):
        for number, record in enumerate(records(name), start=1):
            yield Found(name, str(record.get("id", f"in line {number}"))[:60], partial(_parsed, record, number))


def _parsed(record: Mapping[str, Any], number: int) -> Record:
    text = exchange.typed(record.get("text", record.get("data")), str, "text")
    spans, ids = [], {}
    for place, entity in enumerate(_entities(record), start=1):
        key = entity.get("id", place)
        name = f"T{key}" if type(key) is int else str(key)
        if key in ids:
            raise Wrong(f"span {name}: a second one of this id")
        ids[key] = name
        start, end = (exchange.whole(entity.get(end), f"span {name}: {end}") for end in ("start_offset", "end_offset"))
        label, *behind = exchange.typed(entity.get("label"), str, f"span {name}: label").split("|")
        span = exchange.span_of(name, start, end, text, label)
        for word in behind:
            attribute, _, value = word.partition("=") if "=" in word else (_ATTRIBUTE.get(word, word), "", word)
            value = value if attribute != word or "=" in word else "true"
            if span.setdefault("attributes", {}).setdefault(attribute, value) != value:
                raise Wrong(f"span {name}: two values of one attribute")
        spans.append(span)
    bare: Record = {"doc_id": str(record.get("id", number)), "text": text, "spans": spans}
    relations = []
    for relation in exchange.typed(record.get("relations") or [], list, "relations"):
        ends = [exchange.typed(relation, dict, "relation").get(end) for end in ("from_id", "to_id")]
        if missing := [end for end in ends if not isinstance(end, int | str) or end not in ids]:
            raise Wrong(f"relations: no entity has the id {str(missing[0])[:30]}")
        kind = exchange.typed(relation.get("type"), str, "relations: type")
        relations.append({"type": kind, "head": ids[ends[0]], "tail": ids[ends[1]]})
    if relations:
        bare["relations"] = relations
    meta = record.get("meta")
    meta = dict(meta) if isinstance(meta, dict) else {} if meta is None else {"meta": meta}
    rest = meta.pop(exchange.KEPT, None)
    meta |= {key: value for key, value in record.items() if key not in _OURS}
    if comments := record.get("Comments") or record.get("comments"):
        meta["comments"] = comments
    return exchange.with_kept({**bare, "meta": meta} if meta else bare, rest)


def _entities(record: Mapping[str, Any]) -> list[Record]:
    """Entities as they are, or the [start, end, label] of older versions as such."""
    key = next((key for key in ("entities", "label", "labels") if record.get(key)), "entities")
    listed = []
    for place, entity in enumerate(exchange.typed(record.get(key) or [], list, key), start=1):
        if isinstance(entity, list) and len(entity) == 3:
            entity = dict(zip(("start_offset", "end_offset", "label"), entity, strict=True))
        listed.append(exchange.typed(entity, dict, f"{key} {place}"))
        if not isinstance(listed[-1].get("id", place), int | str):
            raise Wrong(f"{key} {place}: its id is neither a number nor a string")
    return listed


def write(url: str, notes: Iterable[Note]) -> int:
    """Writes a file for doccano, whole or not at all; the number of its notes. Raises DataError at a note with a fault
    that schema.problem finds: it could not be read again.
    """
    count = 0
    with storage.atomic_writer(url) as stream:
        for count, note in enumerate(exchange.sound(notes, url), start=1):
            line = json.dumps(_written(note, count), ensure_ascii=False)
            stream.write(exchange.encoded(f"{line}\n", url, note))
    return count


def _written(note: Note, number: int) -> Record:
    ids = exchange.numbers_of(note)
    record: Record = {
        "id": number,
        "text": note.text,
        "entities": [
            {"id": ids[span.id], "start_offset": span.start, "end_offset": span.end, "label": _label(span)}
            for span in note.spans
        ],
        "relations": [
            {"id": place, "from_id": ids[relation.head], "to_id": ids[relation.tail], "type": relation.type}
            for place, relation in enumerate(note.relations, start=1)
        ],
        "Comments": [],
    }
    return {**record, "meta": {exchange.KEPT: exchange.kept(_parsed(record, number), note.record())}}


def _label(span: Any) -> str:
    names = sorted(span.attributes, key=lambda name: (list(VALUES).index(name) if name in VALUES else 99, name))
    words = [(name, span.attributes[name]) for name in names]
    said = [value if _ATTRIBUTE.get(value) == name else f"{name}={value}" for name, value in words]
    # A word that would be read as another attribute is kept beside the label.
    plain = [word for word, (name, _) in zip(said, words, strict=True) if "|" not in word and "=" not in name]
    return "|".join([span.label.replace("|", "_"), *plain])
