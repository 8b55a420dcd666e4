"""BRAT: a folder of X.txt and X.ann (https://brat.nlplab.org/standoff.html). Lossless both ways.

    T1    condition 34 42              shingles         a span; 0 5;8 12 is one in pieces
    A1    Temporality T1 historical                     an attribute
    N1    Reference T1 UMLS:C0019360   shingles         a code
    R1    dated Arg1:T1 Arg2:T2                         a relation
    #1    AnnotatorNotes T1            {"concept": …}   what BRAT has no place for

What a whole note carries beside its text (sections, dates, its id) stands in X.json, which BRAT does not look at.
annotation.conf tells BRAT the labels. Events are read as their triggers, an event's arguments and equivalences as
relations. A comment that is not ours is kept as the key `note` of its span.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from cluster import storage
from cluster.errors import DataError
from downstream.concepts.formats import exchange
from downstream.concepts.formats.exchange import Found, Record, Wrong
from downstream.concepts.schema import VALUES, Note

_LINE_END = re.compile(r"[\r\n]+")
_WORD = re.compile(r"[A-Za-z0-9_-]+")
_CODE = "code:"  # stands before a code that names no database: BRAT wants one


def found(url: str) -> Iterator[Found]:
    """The documents of a folder, or the one of an .ann; a .txt without .ann is one that nobody annotated."""
    names = list(exchange.files(url, ".ann", ".txt"))
    if not names[0].endswith((".ann", ".txt")):
        raise DataError(f"{url}: no folder and no .ann; name one of BRAT's")
    annotated = {name for name in names if name.endswith(".ann")}
    if len(names) == 1 and not annotated:
        names = [name for name in (re.sub(r"txt$", "ann", names[0]),) if storage.exists(name)] or names
        annotated = {name for name in names if name.endswith(".ann")}
    root = f"{storage.absolute(url).rstrip('/')}/"
    for name in names:
        stem = re.sub(r"\.(ann|txt)$", "", name)
        if name in annotated or f"{stem}.ann" not in annotated:
            doc = stem.removeprefix(root) if stem.startswith(root) else stem.rsplit("/", 1)[-1]
            yield Found(url, doc, partial(_document, stem, doc, name in annotated))


def _document(stem: str, doc: str, annotated: bool) -> Record:
    if not storage.exists(f"{stem}.txt"):
        raise Wrong("there is no .txt beside its .ann")
    text = exchange.decoded(storage.read_bytes(f"{stem}.txt"), f"{stem}.txt")
    ann = exchange.decoded(storage.read_bytes(f"{stem}.ann"), f"{stem}.ann") if annotated else ""
    record = _parsed(doc, text, ann)
    if storage.exists(f"{stem}.json"):
        beside = exchange.parsed(exchange.decoded(storage.read_bytes(f"{stem}.json"), f"{stem}.json"), f"{stem}.json")
        if isinstance(beside, dict):
            record = exchange.restored(record, {key: value for key, value in beside.items() if key != "doc_id"})
            record["doc_id"] = str(beside.get("doc_id", doc))
    return record


def _parsed(doc: str, text: str, ann: str) -> Record:
    spans: dict[str, Record] = {}
    relations: dict[str, Record] = {}
    events: dict[str, str] = {}
    rows: list[tuple[int, str, str]] = []
    for number, row in enumerate(ann.split("\n"), start=1):
        mark, _, body = row.removesuffix("\r").partition("\t")
        if mark[:1] == "T":
            if mark in spans:
                raise Wrong(f"line {number}: a second {mark}")
            spans[mark] = _span(mark, body, text)
        elif mark[:1] == "E":
            events[mark] = body.split()[0].partition(":")[2] if body.split() else ""
            rows.append((number, mark, body))
        elif mark[:1] in "RAMN#*" and mark:
            rows.append((number, mark, body))
        elif row.strip():
            raise Wrong(f"line {number}: not a line of BRAT's; it begins with none of T, A, M, R, E, N, #, *")

    def place(name: str, number: int) -> str:
        name = events.get(name, name)
        if name not in spans:
            raise Wrong(f"line {number}: there is no span {name}")
        return name

    for number, mark, body in rows:
        if mark[:1] in "RE*":
            for index, relation in enumerate(_relations(mark, body, number)):
                ends = {end: place(relation[end], number) for end in ("head", "tail")}
                relations[mark if mark[:1] == "R" else f"{mark} {number} {index}"] = {**relation, **ends}
    rests: dict[str, Record] = {}
    for number, mark, body in rows:
        if mark[:1] in "AMN#":
            said, _, tail = body.partition("\t")
            words = said.split()
            if len(words) < 2:
                raise Wrong(f"line {number}: {mark} names no span")
            target = words[1] if words[1] in relations else ""
            if not target and mark[0] == "#" and words[1] not in spans and words[1] not in events:
                continue  # a comment on an attribute, or on a line by its number
            target = target or place(words[1], number)
            thing = relations[target] if target in relations else spans[target]
            if mark[0] == "#":
                _comment(rests.setdefault(target, {}), tail)
            elif mark[0] == "N":
                _code(thing, words, number)
            else:
                _attribute(thing, words, number)
    ids = {}
    for mark, span in spans.items():
        spans[mark] = exchange.restored(span, rests.get(mark, {}))
        ids[mark] = spans[mark]["id"]
    record: Record = {"doc_id": doc, "text": text, "spans": list(spans.values())}
    if relations:
        record["relations"] = [
            exchange.restored({**one, "head": ids[one["head"]], "tail": ids[one["tail"]]}, rests.get(mark, {}))
            for mark, one in relations.items()
        ]
    return record


def _span(mark: str, body: str, text: str) -> Record:
    said, _, words = body.partition("\t")
    label, _, offsets = said.strip().partition(" ")
    pieces: list[tuple[int, int]] = []
    for piece in offsets.split(";"):
        ends = piece.split()
        if len(ends) != 2 or not all(end.isascii() and end.isdigit() and len(end) < 12 for end in ends):
            raise Wrong(f"span {mark}: its offsets are not two numbers")
        start, end = int(ends[0]), int(ends[1])
        exchange.span_of(mark, start, end, text, label)
        gap = text[pieces[-1][1] : start] if pieces else ""
        if gap and _LINE_END.fullmatch(gap):  # BRAT has no spans across a line end: it is one to us
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((start, end))
    joined = " ".join(text[start:end] for start, end in pieces)
    if words and exchange.squeezed(words) != exchange.squeezed(joined):
        raise Wrong(f"span {mark}: its text is not what stands at {pieces[0][0]} to {pieces[-1][1]}")
    span = exchange.span_of(mark, min(start for start, _ in pieces), max(end for _, end in pieces), text, label)
    return span if len(pieces) == 1 else {**span, "text": joined, "fragments": [list(piece) for piece in pieces]}


def _relations(mark: str, body: str, number: int) -> list[Record]:
    words = body.partition("\t")[0].split()
    pairs = [word.partition(":")[::2] for word in words]
    if mark[0] == "*" and len(words) > 2:
        return [{"type": words[0], "head": a, "tail": b} for a, b in itertools.pairwise(words[1:])]
    if mark[0] == "R" and len(words) == 3:
        return [{"type": words[0], "head": pairs[1][1], "tail": pairs[2][1]}]
    if mark[0] == "E" and words and pairs[0][1]:
        return [
            {"type": role.rstrip("0123456789") or role, "head": pairs[0][1], "tail": end} for role, end in pairs[1:]
        ]
    raise Wrong(f"line {number}: {mark} does not say what is related to what")


def _attribute(thing: Record, words: list[str], number: int) -> None:
    name, value = _name(words[0]), " ".join(words[2:])
    if not value:  # a flag
        name, value = ("negation", "negated") if name in ("negation", "Negated") else (name, "true")
    if thing.setdefault("attributes", {}).setdefault(name, value) != value:
        raise Wrong(f"line {number}: span {words[1]} has two values of {name}")


def _name(written: str) -> str:
    return written.lower() if written.lower() in VALUES else written


def _code(thing: Record, words: list[str], number: int) -> None:
    if len(words) < 3:
        raise Wrong(f"line {number}: span {words[1]}: no code")
    code = words[2].removeprefix(_CODE)
    before = thing.get("code")
    thing["code"] = code if before is None else [*(before if isinstance(before, list) else [before]), code]


def _comment(rest: Record, words: str) -> None:
    """Ours is JSON; an annotator may have written after it, or something else altogether."""
    if words.startswith("{"):
        try:
            ours, end = json.JSONDecoder().raw_decode(words)
            rest.update(ours)
            words = words[end:].strip()
        except (ValueError, RecursionError):
            pass
    if words:
        rest["note"] = f"{rest['note']}\n{words}" if isinstance(rest.get("note"), str) else words


def write(url: str, notes: Iterable[Note]) -> int:
    """Writes a folder for BRAT; the number of its notes. Raises DataError where it already holds annotations: they
    may be somebody's work.
    """
    if any(name.endswith((".ann", ".txt")) for name in storage.names(url)):
        raise DataError(f"{url}: there are annotations in this folder; name a new one")
    taken: set[str] = set()
    kinds: dict[str, set[str]] = {"entities": set(), "relations": set(), "events": set(), "attributes": set()}
    for note in exchange.sound(notes, url):
        stem = _stem(note.doc_id, taken)
        ann, beside = _written(note, stem)
        storage.write_bytes(storage.join(url, f"{stem}.txt"), exchange.encoded(note.text, url, note), durable=False)
        if beside:
            data = exchange.encoded(json.dumps(beside, ensure_ascii=False) + "\n", url, note)
            storage.write_bytes(storage.join(url, f"{stem}.json"), data, durable=False)
        storage.write_bytes(storage.join(url, f"{stem}.ann"), exchange.encoded(ann, url, note), durable=False)
        kinds["entities"] |= {_label(span.label) for span in note.spans}
        kinds["relations"] |= {f"{_label(one.type)}\tArg1:<ENTITY>, Arg2:<ENTITY>" for one in note.relations}
        kinds["attributes"] |= {line.split("\t")[1] for line in ann.split("\n") if line.startswith("A")}
    storage.write_bytes(storage.join(url, "annotation.conf"), _settings(kinds).encode())
    return len(taken)


def _settings(kinds: dict[str, set[str]]) -> str:
    """What BRAT shows and lets annotate: without it, it refuses every label."""
    values: dict[str, set[str]] = {name.capitalize(): set(known) for name, known in VALUES.items()}
    for line in kinds["attributes"]:
        name, _, value = line.split(" ")
        if not set(value) & set("|,<>:"):
            values.setdefault(name, set()).add(value)
    overlap = "<OVERLAP>\tArg1:<ENTITY>, Arg2:<ENTITY>, <OVL-TYPE>:<ANY>"
    attributes = {f"{name}\tArg:<ENTITY>, Value:{'|'.join(sorted(said))}" for name, said in values.items()}
    parts = {**kinds, "relations": {overlap, *kinds["relations"]}, "attributes": attributes}
    return "".join(
        f"[{name}]\n{''.join(f'{line}{chr(10)}' for line in sorted(part))}\n" for name, part in parts.items()
    )


def _stem(doc_id: str, taken: set[str]) -> str:
    """A file name for a note, one that no file system and no listing of ours minds."""
    plain = re.sub(r"[^A-Za-z0-9.-]", "_", doc_id)[:150].removesuffix(".ann").removesuffix(".txt")
    plain = plain if plain[:1].isalnum() else f"n{plain}"
    stem, number = plain, 1
    while stem.lower() in taken:
        number += 1
        stem = f"{plain}-{number}"
    taken.add(stem.lower())
    return stem


def _written(note: Note, stem: str) -> tuple[str, Record]:
    numbers = {name: f"T{number}" for name, number in exchange.numbers_of(note).items()}
    lines: list[str] = []
    attributes = codes = 0
    for span in note.spans:
        mark = numbers[span.id]
        pieces = [part for piece in span.fragments or [(span.start, span.end)] for part in _parts(note.text, *piece)]
        words = re.sub(r"[\t\r\n]", " ", " ".join(note.text[start:end] for start, end in pieces))
        offsets = ";".join(f"{start} {end}" for start, end in pieces)
        lines.append(f"{mark}\t{_label(span.label)} {offsets}\t{words}")
        for name, value in span.attributes.items():
            written = name.capitalize() if name in VALUES else name
            if _name(written) == name and _WORD.fullmatch(written) and re.fullmatch(r"\S+", value):
                attributes += 1
                lines.append(f"A{attributes}\t{written} {mark} {value}")
        for code in span.code if isinstance(span.code, list) and len(span.code) > 1 else [span.code]:
            if isinstance(code, str) and re.fullmatch(r"\S+", code):
                codes += 1
                lines.append(f"N{codes}\tReference {mark} {code if ':' in code else _CODE + code}\t{words}")
    for count, relation in enumerate(note.relations, start=1):
        ends = f"Arg1:{numbers[relation.head]} Arg2:{numbers[relation.tail]}"
        lines.append(f"R{count}\t{_label(relation.type)} {ends}")
    bare, actual = _parsed(stem, note.text, "\n".join(lines)), note.record()
    things: list[tuple[str, Any, Any]] = [
        *zip(numbers.values(), bare["spans"], actual.get("spans", ()), strict=True),
    ]
    ids = {mark: name for name, mark in numbers.items()}
    for count, (plain, full) in enumerate(
        zip(bare.get("relations", ()), actual.get("relations", ()), strict=True), start=1
    ):
        things.append((f"R{count}", {**plain, "head": ids[plain["head"]], "tail": ids[plain["tail"]]}, full))
    rests = [(mark, rest) for mark, plain, full in things if (rest := exchange.left_over(plain, full))]
    for count, (mark, rest) in enumerate(rests, start=1):
        lines.append(f"#{count}\tAnnotatorNotes {mark}\t{json.dumps(rest, ensure_ascii=False)}")
    beside = exchange.left_over(exchange.outer(bare), exchange.outer(actual))
    if note.doc_id != stem:
        beside["doc_id"] = note.doc_id
    return "".join(f"{line}\n" for line in lines), beside


def _label(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", label) or "_"


def _parts(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """A piece without its line ends; one of line ends only stays whole."""
    parts = [(start + part.start(), start + part.end()) for part in re.finditer(r"[^\r\n]+", text[start:end])]
    return parts or [(start, end)]
