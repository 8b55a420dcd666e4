"""MedCATtrainer's export of projects with their texts. Read only.

    {"projects": [{"name": "p", "documents": [{"id": 1, "name": "n1", "text": "…", "annotations": [
      {"id": 7, "start": 34, "end": 42, "cui": "C0019360", "value": "shingles", "correct": true, "deleted": false,
       "killed": false, "meta_anns": {"Presence": {"value": "True"}, "Time": {"value": "Past"}}}]}]}]}

Annotations that were deleted, killed, found irrelevant, or not found correct are left out. The label of a span is
`concept`, its code the CUI. A meta-annotation we have no attribute for keeps its name and value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from cluster import storage
from cluster.errors import DataError
from downstream.concepts.formats import exchange
from downstream.concepts.formats.exchange import Found, Record, Wrong

LABEL = "concept"
_SAID = {  # meta-annotation: {attribute=value: what annotators call it}
    "presence": {
        "negation=affirmed": ("true", "affirmed", "present", "yes"),
        "negation=negated": ("false", "negated", "absent", "not present", "no"),
        "certainty=hypothetical": ("hypothetical", "not present (hypothetical)"),
        "certainty=uncertain": ("uncertain", "suspected", "possible"),
    },
    "subject": {
        "experiencer=patient": ("patient",),
        "experiencer=family": ("family", "relative"),
        "experiencer=other": ("other", "other/n/a"),
    },
    "time": {
        "temporality=current": ("recent", "current", "present"),
        "temporality=historical": ("past", "historical"),
        "temporality=future": ("future",),
    },
}
_META = {
    name: {word: ours for ours, words in values.items() for word in words}
    for name, values in [*_SAID.items(), ("experiencer", _SAID["subject"]), ("subject/experiencer", _SAID["subject"])]
}


def found(url: str) -> Iterator[Found]:
    """The documents of an export, or of the .json files of a folder."""
    for name in exchange.files(url, ".json"):
        export = exchange.parsed(exchange.decoded(storage.read_bytes(name), name), name)
        projects = export.get("projects") if isinstance(export, dict) else None
        if not isinstance(projects, list):
            raise DataError(f"{name}: no list of projects; export it from MedCATtrainer with the texts")
        for place, project in enumerate(projects, start=1):
            documents = project.get("documents") if isinstance(project, dict) else None
            if not isinstance(documents, list):
                raise DataError(f"{name}: project {place} has no list of documents; export it from MedCATtrainer again")
            for number, document in enumerate(documents, start=1):
                doc = f"in project {place}, document {number}"
                yield Found(name, doc, partial(_parsed, document, project, number))


def _parsed(document: Any, project: Mapping[str, Any], number: int) -> Record:
    text = exchange.typed(exchange.typed(document, dict, "document").get("text"), str, "text")
    annotations = document.get("annotations") or []
    annotations = list(annotations.values()) if isinstance(annotations, dict) else annotations
    spans = []
    for place, one in enumerate(exchange.typed(annotations, list, "annotations"), start=1):
        if not _counts(exchange.typed(one, dict, f"annotation {place}")):
            continue
        name = f"T{one.get('id', place)}"
        start, end = (exchange.whole(one.get(key), f"span {name}: {key}") for key in ("start", "end"))
        span = exchange.span_of(name, start, end, text, LABEL, one.get("value"))
        if one.get("cui"):
            span["code"] = str(one["cui"])
        if attributes := _attributes(one.get("meta_anns") or {}, name):
            span["attributes"] = attributes
        spans.append(span)
    record: Record = {"doc_id": str(document.get("name") or document.get("id", number)), "text": text, "spans": spans}
    return {**record, "meta": {"project": project["name"]}} if project.get("name") else record


def _counts(one: Mapping[str, Any]) -> bool:
    if one.get("deleted") or one.get("killed") or one.get("irrelevant"):
        return False
    # An annotator who chose another concept in its place, or marked it by hand, has found it right.
    return bool(one.get("correct", True) or one.get("alternative") or one.get("manually_created"))


def _attributes(metas: Any, name: str) -> dict[str, str]:
    attributes: dict[str, str] = {}
    listed = (
        metas if isinstance(metas, dict) else dict(enumerate(exchange.typed(metas, list, f"span {name}: meta_anns")))
    )
    for key, meta in listed.items():
        value = meta.get("value") if isinstance(meta, dict) else meta
        key = meta.get("name", key) if isinstance(meta, dict) else key
        if not isinstance(value, str) or not isinstance(key, str):
            raise Wrong(f"span {name}: a meta-annotation without a name or a value")
        ours = _META.get(key.lower(), {}).get(value.strip().lower(), f"{key}={value}")
        attribute, _, said = ours.partition("=")
        attributes[attribute] = said
    return attributes
