"""UIMA CAS as XMI, as cTAKES writes it. Read only.

    <textsem:DiseaseDisorderMention xmi:id="9" sofa="1" begin="34" end="42" polarity="-1" uncertainty="0"
      conditional="false" generic="false" historyOf="1" subject="patient" ontologyConceptArr="12"/>
    <refsem:UmlsConcept xmi:id="12" cui="C0019360"/>   <cas:Sofa xmi:id="1" sofaID="_InitialView" sofaString="…"/>

Where there are annotations of cTAKES's textsem all others (tokens, sentences) are left out, and so are relations.
Offsets in the file are of UTF-16 code units. A DTD is refused: nobody needs one here, and entities can fill memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple
from xml.parsers import expat

from cluster import storage
from downstream.concepts.formats import exchange
from downstream.concepts.formats.exchange import Found, Record, Utf16, Wrong

_ID = "http://www.omg.org/XMI id"
_SYNTAX = {"DocumentAnnotation", "Sentence", "Segment", "Paragraph", "SourceDocumentInformation"}
_ROLES = {"SemanticArgument", "SemanticRoleRelation", "Predicate"}
_WHO = {"patient": "patient", "family_member": "family"}


class _Element(NamedTuple):
    space: str
    name: str
    values: Mapping[str, str]


def found(url: str) -> Iterator[Found]:
    """The document of a file, or those of the .xmi and .xml files of a folder."""
    for name in exchange.files(url, ".xmi", ".xml"):
        doc = re.sub(r"(\.txt)?\.(xmi|xml)$", "", name.rsplit("/", 1)[-1])
        yield Found(name, doc, partial(_document, name, doc))


def _document(url: str, doc: str) -> Record:
    return _parsed(doc, _elements(storage.read_bytes(url)))


def _elements(data: bytes) -> list[_Element]:
    elements: list[_Element] = []
    parser = expat.ParserCreate(namespace_separator=" ")

    def start(name: str, values: dict[str, str]) -> None:
        space, _, local = name.rpartition(" ")
        elements.append(_Element(space, local, values))

    def refuse(*_: object) -> None:
        raise Wrong("it has a DTD, which is not read; take it out")

    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as exc:
        # expat's messages name no text, only what kind of error it is.
        said = expat.errors.messages.get(exc.code, "not XML")
        raise Wrong(f"not XML at line {exc.lineno}, column {exc.offset}: {said}") from exc
    except (LookupError, ValueError) as exc:
        raise Wrong("not XML in an encoding that can be read; save it as UTF-8") from exc
    return elements


def _parsed(doc: str, elements: list[_Element]) -> Record:
    sofas = [one for one in elements if one.name == "Sofa" and "sofaString" in one.values]
    if not sofas:
        raise Wrong("no Sofa with a sofaString; save the CAS with its text")
    sofa = next((one for one in sofas if one.values.get("sofaID") == "_InitialView"), sofas[0])
    text, here = sofa.values["sofaString"], sofa.values.get(_ID)
    by_id = {one.values[_ID]: one for one in elements if _ID in one.values}
    placed = [
        one
        for one in elements
        if {"begin", "end"} <= set(one.values)
        and one.values.get("sofa", here) == here
        and one.name not in _SYNTAX | _ROLES
        and not re.search(r"/(syntax|textspan)\.ecore$", one.space)
    ]
    mentions = [one for one in placed if one.space.endswith("/textsem.ecore")] or placed
    offsets = Utf16(text)
    spans = []
    for place, one in enumerate(mentions, start=1):
        name = one.values.get(_ID, f"T{place}")
        start, end = (offsets.points(_number(one.values[key], name, key), name) for key in ("begin", "end"))
        if start == end:
            continue  # of no width: a marker, not a mention
        span = exchange.span_of(name, start, end, text, one.name)
        if attributes := _attributes(one.values):
            span["attributes"] = attributes
        if codes := _codes(one.values.get("ontologyConceptArr", ""), by_id):
            span["code"] = codes[0] if len(codes) == 1 else codes
        spans.append(span)
    named = {one.values["documentID"] for one in elements if one.values.get("documentID")}
    return {"doc_id": named.pop() if len(named) == 1 else doc, "text": text, "spans": spans}


def _number(value: str, name: str, key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,11}", value):
        raise Wrong(f"span {name}: {key} is no offset")
    return int(value)


def _attributes(values: Mapping[str, str]) -> dict[str, str]:
    """cTAKES says certainty in three places; the one that takes most away from a finding counts."""
    found: dict[str, str] = {}
    if values.get("polarity") in ("-1", "1"):
        found["negation"] = "negated" if values["polarity"] == "-1" else "affirmed"
    if values.get("generic") == "true":
        found["certainty"] = "generic"
    elif values.get("conditional") == "true":
        found["certainty"] = "conditional"
    elif values.get("uncertainty") in ("0", "1"):
        found["certainty"] = "uncertain" if values["uncertainty"] == "1" else "certain"
    if values.get("historyOf") in ("0", "1"):
        found["temporality"] = "historical" if values["historyOf"] == "1" else "current"
    if subject := values.get("subject"):
        found["experiencer"] = _WHO.get(subject.lower(), "other")
    return found


def _codes(references: str, by_id: Mapping[str, _Element]) -> list[str]:
    """The CUIs of concepts, each once; they may stand in an array of their own."""
    codes: dict[str, None] = {}
    for reference in references.split():
        concept = by_id.get(reference)
        if concept is not None and concept.name == "FSArray":
            concepts = [by_id.get(inner) for inner in concept.values.get("elements", "").split()]
        else:
            concepts = [concept]
        codes |= {one.values["cui"]: None for one in concepts if one is not None and one.values.get("cui")}
    return list(codes)
