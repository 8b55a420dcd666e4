"""Label Studio: a JSON list of tasks (https://labelstud.io/guide/export). Lossless both ways.

    {"id": 1, "data": {"text": "…", "doc_id": "n1"}, "meta": {"chartlm": {…}}, "annotations": [{"result": [
      {"id": "T1", "from_name": "label", "to_name": "text", "type": "labels",
       "value": {"start": 34, "end": 42, "text": "shingles", "labels": ["condition"]}},
      {"id": "T1", "from_name": "negation", "to_name": "text", "type": "choices",
       "value": {"start": 34, "end": 42, "choices": ["affirmed"]}},
      {"type": "relation", "from_id": "T1", "to_id": "T2", "direction": "right", "labels": ["dated"]}]}]}

Its offsets are of UTF-16 code units, ours of code points. What it has no place for is kept under the task's meta. Of
several annotations the first that was not cancelled is read, of predictions, where nobody annotated, the first.
Results of other kinds (text areas, ratings) are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from cluster import storage
from cluster.errors import DataError
from downstream.concepts.formats import exchange
from downstream.concepts.formats.exchange import Found, Record, Utf16, Wrong
from downstream.concepts.schema import Note


def found(url: str) -> Iterator[Found]:
    """The tasks of a file, or of the .json files of a folder."""
    for name in exchange.files(url, ".json"):
        tasks = exchange.parsed(exchange.decoded(storage.read_bytes(name), name), name)
        if isinstance(tasks, dict) and "data" in tasks:
            tasks = [tasks]
        if not isinstance(tasks, list):
            raise DataError(f"{name}: no list of tasks; export it from Label Studio as JSON")
        for number, task in enumerate(tasks, start=1):
            yield Found(name, f"in task {number}", partial(_parsed, task, number))


def _parsed(task: Any, number: int) -> Record:
    data = dict(exchange.typed(exchange.typed(task, dict, "task").get("data"), dict, "data"))
    text = exchange.typed(data.pop("text", None), str, "data.text")
    doc_id = str(data.pop("doc_id", task.get("id", number)))
    offsets = Utf16(text)
    spans: dict[str, Record] = {}
    bare: Record = {"doc_id": doc_id, "text": text, "spans": []}
    results = _results(task)
    for result in results:
        if result.get("type") in ("labels", "hypertextlabels"):
            name = str(result.get("id", f"T{len(spans) + 1}"))
            if name in spans:
                raise Wrong(f"span {name}: a second one of this id")
            spans[name] = _span(name, result, text, offsets)
    relations = []
    for result in results:
        if result.get("type") == "choices":
            chosen = exchange.typed(result.get("value"), dict, "choices: value").get("choices")
            chosen = [exchange.typed(choice, str, "choice") for choice in exchange.typed(chosen, list, "choices")]
            name = exchange.typed(result.get("from_name"), str, "choices: from_name")
            value = "|".join(chosen)
            if str(result.get("id")) in spans:
                attributes = spans[str(result.get("id"))].setdefault("attributes", {})
                if attributes.setdefault(name, value) != value:
                    raise Wrong(f"span {result.get('id')}: two values of one attribute")
            elif "start" in result["value"]:
                raise Wrong(f"choices: there is no span {str(result.get('id'))[:30]}")
            else:  # of the whole note
                bare.setdefault("labels", {})[name] = value
        elif result.get("type") == "relation":
            ends = [str(result.get(end)) for end in ("from_id", "to_id")]
            if result.get("direction") == "left":
                ends.reverse()
            if missing := [end for end in ends if end not in spans]:
                raise Wrong(f"relation: there is no span {missing[0][:30]}")
            labels = exchange.typed(result.get("labels") or [""], list, "relation: labels")
            relations.append({"type": str(labels[0]), "head": ends[0], "tail": ends[1]})
    bare["spans"] = list(spans.values())
    if relations:
        bare["relations"] = relations
    meta = dict(task["meta"]) if isinstance(task.get("meta"), dict) else {}
    rest = meta.pop(exchange.KEPT, None)
    meta = {**data, **meta}
    if isinstance(rest, dict):
        rest = {**rest, "doc_id": doc_id}
    return exchange.with_kept({**bare, "meta": meta} if meta else bare, rest, stable=True)


def _results(task: Mapping[str, Any]) -> list[Record]:
    done = exchange.typed(task.get("annotations") or task.get("completions") or [], list, "annotations")
    done = [one for one in done if isinstance(one, dict) and not one.get("was_cancelled")]
    done = done or exchange.typed(task.get("predictions") or [], list, "predictions")
    if not done:
        return []
    results = exchange.typed(exchange.typed(done[0], dict, "annotation").get("result") or [], list, "result")
    return [exchange.typed(result, dict, "result") for result in results]


def _span(name: str, result: Mapping[str, Any], text: str, offsets: Utf16) -> Record:
    value = exchange.typed(result.get("value"), dict, f"span {name}: value")
    ends = value.get("globalOffsets") if isinstance(value.get("globalOffsets"), dict) else value
    start = offsets.points(exchange.whole(ends.get("start"), f"span {name}: start"), name)
    end = offsets.points(exchange.whole(ends.get("end"), f"span {name}: end"), name)
    labels = exchange.typed(value.get("labels", value.get("hypertextlabels")) or [], list, f"span {name}: labels")
    label = exchange.typed(labels[0], str, f"span {name}: label") if labels else None
    span = exchange.span_of(name, start, end, text, label, value.get("text"))
    return {**span, "labels": labels} if len(labels) > 1 else span


def write(url: str, notes: Iterable[Note], predictions: bool = False) -> int:
    """Writes a file of tasks, whole or not at all; the number of its notes. As `predictions` they are shown to
    annotators as a proposal, not as done. Raises DataError at a note with a fault that schema.problem finds.
    """
    count = 0
    with storage.atomic_writer(url) as stream:
        stream.write(b"[")
        for count, note in enumerate(exchange.sound(notes, url), start=1):
            task = json.dumps(_written(note, count, predictions), ensure_ascii=False)
            stream.write(exchange.encoded(f"{',' if count > 1 else ''}\n{task}", url, note))
        stream.write(b"\n]\n")
    return count


def _written(note: Note, number: int, predictions: bool) -> Record:
    offsets = Utf16(note.text)
    results: list[Record] = []
    for span in note.spans:
        place = {"start": offsets.units(span.start), "end": offsets.units(span.end)}
        words = {**place, "text": note.text[span.start : span.end], "labels": [span.label] if span.label else []}
        region = {"id": span.id, "to_name": "text"}
        results.append({**region, "from_name": "label", "type": "labels", "value": words})
        for name, value in span.attributes.items():
            results.append({**region, "from_name": name, "type": "choices", "value": {**place, "choices": [value]}})
    for relation in note.relations:
        ends = {"from_id": relation.head, "to_id": relation.tail}
        results.append({"type": "relation", **ends, "direction": "right", "labels": [relation.type]})
    task: Record = {
        "id": number,
        "data": {"text": note.text, "doc_id": note.doc_id},
        "predictions" if predictions else "annotations": [{"result": results}],
    }
    return {**task, "meta": {exchange.KEPT: exchange.kept(_parsed(task, number), note.record())}}
