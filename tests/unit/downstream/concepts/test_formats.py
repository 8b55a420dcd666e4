"""Annotated notes from and for annotators' tools: what is said is read right, and what is written comes back whole."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError, StorageError
from downstream.concepts import schema
from downstream.concepts.formats import READERS, WRITERS, read
from downstream.concepts.schema import VALUES, Note

LOSSLESS = ("brat", "doccano", "label-studio", "label-studio-predictions")
DATA = ("concepts/negex.jsonl", "concepts/maccrobat2020.jsonl", "mtsamples/mention_status.jsonl")

# An emoji before everything, a line end of Windows, a mention across it, one in pieces.
TEXT = "🩺 No shingles\r\nin 2015; left and right\r\nknee pain."


def at(words: str) -> tuple[int, int]:
    start = TEXT.index(words)
    return start, start + len(words)


NOTE: dict[str, Any] = {
    "doc_id": "ward 3/Nôte",
    "note_date": "2016-01-02",
    "source": {"kept": [1, 2.5, None]},
    "text": TEXT,
    "sections": [{"start": 0, "end": 14, "label": "history"}],
    "spans": [
        {
            "id": "T1",
            "start": at("shingles")[0],
            "end": at("shingles")[1],
            "text": "shingles",
            "label": "condition",
            "concept": "herpes_zoster",
            "code": "UMLS:C0019360",
            "attributes": {"negation": "negated", "temporality": "historical", "status": "PAST", "odd one": "a b|c"},
            "cues": {"negation": [2, 4]},
        },
        {"id": "date-1", "start": at("2015")[0], "end": at("2015")[1], "label": "a date|x", "value": {"year": 2015}},
        {
            "id": "T9",
            "start": at("left")[0],
            "end": at("knee pain")[1],
            "text": "left knee pain",
            "label": "condition",
            "fragments": [list(at("left")), list(at("knee pain"))],
            "attributes": {},
            "code": ["C1", "C2"],
        },
        {"id": "T4", "start": at("right")[0], "end": at("knee pain")[1], "text": "", "label": ""},
    ],
    "relations": [
        {"type": "dated", "head": "T1", "tail": "date-1", "sure": 0.5},
        {"type": "same as", "head": "T9", "tail": "T4"},
    ],
}


def there(folder: Path, form: str) -> str:
    return str(folder / "out" if form == "brat" else folder / "out.jsonl")


def back(folder: Path, form: str, notes: list[Note]) -> list[Note]:
    url = there(folder, form)
    assert WRITERS[form](url, notes) == len(notes)
    return list(read(url, form.removesuffix("-predictions")))


def put(folder: Path, name: str, content: Any) -> str:
    data = content if isinstance(content, bytes | str) else json.dumps(content)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(folder / name)


def said(url: str, form: str) -> str:
    """The one line of a refusal; never text of the note."""
    with pytest.raises((DataError, StorageError)) as caught:
        list(READERS[form](url))
    line = str(caught.value)
    assert "shingles" not in line
    assert "\n" not in line
    return line


@pytest.mark.parametrize("form", [*LOSSLESS, "jsonl"])
def test_a_note_with_everything_comes_back_as_it_was(tmp_path: Path, form: str) -> None:
    notes = [Note.model_validate(NOTE), Note(doc_id="empty", text=""), Note(doc_id="none", text="x", spans=[])]
    found = back(tmp_path, form, notes)
    assert sorted((note.record() for note in found), key=str) == sorted((note.record() for note in notes), key=str)


@pytest.mark.parametrize("form", LOSSLESS)
def test_keys_like_ours_and_relations_that_are_alike_come_back(tmp_path: Path, form: str) -> None:
    odd = {"~": {"~": [1]}, "attributes": "none", "chartlm": 1, "rest": {}}
    spans = [{"id": name, "start": 0, "end": 1, "attributes": {"~": "~"}, **odd} for name in ("T02", "a b", "")]
    spans = [{**span, "attributes": {"~": "~", "NEGATION": "x", "Status": "A"}} for span in spans]
    alike = {"type": "dated", "head": "", "tail": "a b"}
    relations = [alike, {**alike, **odd}, alike, {**alike, "attributes": {"sure": "yes"}}]
    note = Note.model_validate({"doc_id": "n", "text": "abc", "spans": spans, "relations": relations, **odd})
    assert [one.record() for one in back(tmp_path, form, [note])] == [note.record()]


@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize("name", DATA)
def test_real_notes_come_back_as_they_were(tmp_path: Path, form: str, name: str) -> None:
    if not os.environ.get("CHARTLM_DATA"):
        pytest.skip("CHARTLM_DATA is not set")
    notes = list(schema.read(f"{os.environ['CHARTLM_DATA']}/{name}"))
    found = {note.doc_id: note.record() for note in back(tmp_path, form, notes)}
    assert len(found) == len(notes)
    assert all(found[note.doc_id] == note.record() for note in notes)


signs = st.characters(exclude_categories=("Cs",))
words = st.text(st.one_of(signs, st.sampled_from(" \t\r\n|=~😀{}:;\u2028\\n")), max_size=12)


@st.composite
def annotated(draw: st.DrawFn) -> Note:
    text = draw(st.text(st.one_of(signs, st.sampled_from("\r\n 😀")), max_size=30))
    ids = draw(st.lists(st.one_of(st.from_regex(r"T[0-9]{1,2}", fullmatch=True), words), unique=True, max_size=5))
    spans = []
    for name in ids if text else []:
        start = draw(st.integers(0, len(text) - 1))
        end = draw(st.integers(start + 1, len(text)))
        span: dict[str, Any] = {"id": name, "start": start, "end": end}
        if draw(st.booleans()):
            span["text"] = draw(st.sampled_from(["", text[start:end]]))
        if draw(st.booleans()):
            span["label"] = draw(words)
        if draw(st.booleans()):
            known = {key: draw(st.sampled_from(values)) for key, values in VALUES.items() if draw(st.booleans())}
            span["attributes"] = {**draw(st.dictionaries(words, words, max_size=2)), **known}
        if draw(st.booleans()):
            span["code"] = draw(st.one_of(words, st.none(), st.lists(words, max_size=3), st.integers()))
        if draw(st.booleans()) and end - start > 2:
            span["fragments"] = [[start, start + 1], [end - 1, end]]
            span["text"] = draw(words)
        if draw(st.booleans()):
            span["concept"] = draw(words)
        spans.append(span)
    record: dict[str, Any] = {"doc_id": draw(words), "text": text, "spans": spans}
    if draw(st.booleans()):
        ends = st.sampled_from([span["id"] for span in spans]) if spans else st.nothing()
        one = st.fixed_dictionaries({"type": words, "head": ends, "tail": ends}, optional={"sure": st.booleans()})
        record["relations"] = draw(st.lists(one, max_size=3)) if spans else []
    if draw(st.booleans()):
        record["meta"] = draw(st.dictionaries(words, words, max_size=2))
    return Note.model_validate(record)


counter = itertools.count()


@pytest.mark.parametrize("form", LOSSLESS)
def test_any_note_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, form: str) -> None:
    folder = tmp_path_factory.mktemp("any")

    @settings(max_examples=60, deadline=None)
    @given(annotated())
    def proof(note: Note) -> None:
        if schema.problem(note):  # spans at one place that do not agree
            return
        place = folder / str(next(counter))
        place.mkdir()
        assert [one.record() for one in back(place, form, [note])] == [note.record()]

    proof()


def test_brat_reads_what_brat_and_maccrobat_write(tmp_path: Path) -> None:
    put(tmp_path, "n1.txt", TEXT)
    start, end = at("right")[0], at("knee pain")[1]
    lines = [
        f"T1\tSign_symptom {at('shingles')[0]} {at('shingles')[1]}\tshingles",
        f"T2\tDate {at('2015')[0]} {at('2015')[1]}\t2015",
        f"T3\tSign_symptom {at('left')[0]} {at('left')[1]};{at('knee pain')[0]} {at('knee pain')[1]}\tleft knee pain",
        f"T4\tSign_symptom {start} {at('right')[1]};{at('knee')[0]} {end}\tright knee pain",
        "E1\tSign_symptom:T1 Time:T2 Modify2:E2",
        "E2\tSign_symptom:T3",
        "A1\tNegation E1",
        "A2\tTemporality T1 historical",
        "A3\tDoctimerel E2 Before",
        "*\tEquiv T1 T3 T4",
        "R1\tdated Arg1:T1 Arg2:T2\t",
        "N1\tReference T1 UMLS:C0019360\tHerpes zoster",
        '#1\tAnnotatorNotes T1\t{"concept": "herpes_zoster"} ask Ann',
        "#2\tAnnotatorNotes T3\tnot sure",
    ]
    url = put(tmp_path, "n1.ann", "\r\n".join(lines))
    (note,) = read(url, "brat")
    one, _, three, four = note.spans
    assert (note.doc_id, note.text, one.concept, one.code) == ("n1", TEXT, "herpes_zoster", "UMLS:C0019360")
    assert one.attributes == {"negation": "negated", "temporality": "historical"}
    assert three.fragments == [at("left"), at("knee pain")]
    assert (three.text, three.attributes) == ("left knee pain", {"Doctimerel": "Before"})
    assert (four.start, four.end, four.fragments) == (start, end, None)  # only a line end is between its pieces
    assert [(relation.type, relation.head, relation.tail) for relation in note.relations] == [
        ("Time", "T1", "T2"),
        ("Modify", "T1", "T3"),
        ("Equiv", "T1", "T3"),
        ("Equiv", "T3", "T4"),
        ("dated", "T1", "T2"),
    ]
    assert (one.record()["note"], three.record()["note"]) == ("ask Ann", "not sure")
    for same in (str(tmp_path), str(tmp_path / "n1.txt")):
        assert [found.record() for found in read(same, "brat")] == [note.record()]
    again = tmp_path / "again"
    again.mkdir()
    assert [found.record() for found in back(again, "brat", [note])] == [note.record()]


def test_brat_is_written_as_brat_wants_it(tmp_path: Path) -> None:
    url = there(tmp_path, "brat")
    WRITERS["brat"](url, [Note.model_validate(NOTE)])
    (ann,) = (tmp_path / "out").glob("*.ann")
    lines = ann.read_bytes().decode().split("\n")
    start, end = at("right")[0], at("knee pain")[1]
    assert lines[0] == "T1\tcondition 5 13\tshingles"
    assert "A1\tNegation T1 negated" in lines
    assert "N1\tReference T1 UMLS:C0019360\tshingles" in lines
    assert f"T4\t_ {start} {at('right')[1]};{at('knee')[0]} {end}\tright knee pain" in lines
    settings_of = (tmp_path / "out/annotation.conf").read_text()
    assert "Negation\tArg:<ENTITY>, Value:affirmed|negated\n" in settings_of
    assert "dated\tArg1:<ENTITY>, Arg2:<ENTITY>\n" in settings_of
    with pytest.raises(DataError, match="name a new one"):
        WRITERS["brat"](url, [])


def test_doccano_reads_new_and_old_files(tmp_path: Path) -> None:
    new = {
        "id": 5,
        "text": TEXT,
        "entities": [
            {"id": 31, "start_offset": 5, "end_offset": 13, "label": "condition|negated|historical|status=PAST"},
            {"id": 32, "start_offset": at("2015")[0], "end_offset": at("2015")[1], "label": "date"},
        ],
        "relations": [{"id": 1, "from_id": 31, "to_id": 32, "type": "dated"}],
        "Comments": ["look"],
    }
    old = {"id": 6, "text": TEXT, "label": [[5, 13, "condition|uncertain|shy"]]}
    older = {"id": 7, "text": TEXT, "labels": [[5, 13, "condition"]]}
    url = put(tmp_path, "a.jsonl", "\n".join(map(json.dumps, (new, old, older))))
    first, second, third = read(url, "doccano")
    assert first.spans[0].attributes == {"negation": "negated", "temporality": "historical", "status": "PAST"}
    assert [(one.type, one.head, one.tail) for one in first.relations] == [("dated", "T31", "T32")]
    assert (first.doc_id, first.meta) == ("5", {"comments": ["look"]})
    assert second.spans[0].attributes == {"certainty": "uncertain", "shy": "true"}
    assert (third.spans[0].text, third.spans[0].attributes) == ("shingles", {})


def test_doccano_may_number_anew_and_annotators_change_what_they_like(tmp_path: Path) -> None:
    url = there(tmp_path, "doccano")
    WRITERS["doccano"](url, [Note.model_validate(NOTE)])
    record = json.loads(Path(url).read_bytes())
    assert record["entities"][0]["label"] == "condition|negated|historical|status=PAST"
    record["id"] = 77
    for entity in record["entities"]:
        entity["id"] += 900
    for relation in record["relations"]:
        relation["from_id"] += 900
        relation["to_id"] += 900
    (same,) = read(put(tmp_path, "b.jsonl", record), "doccano")
    assert same.record() == Note.model_validate(NOTE).record()
    record["entities"][0]["label"] = "condition|affirmed"
    record["entities"][2]["end_offset"] -= 1
    record["entities"].append({"id": 1, "start_offset": 2, "end_offset": 4, "label": "cue"})
    (changed,) = read(put(tmp_path, "c.jsonl", record), "doccano")
    assert (changed.spans[0].id, changed.spans[0].concept) == ("T1", "herpes_zoster")
    assert changed.spans[0].attributes == {"negation": "affirmed", "odd one": "a b|c"}
    assert changed.spans[2].fragments is None
    assert changed.spans[4].label == "cue"


def task(*results: dict[str, Any], where: str = "annotations") -> dict[str, Any]:
    return {"id": 3, "data": {"text": TEXT, "ward": "3"}, where: [{"result": list(results)}]}


def region(name: str, start: int, end: int, label: str = "condition") -> dict[str, Any]:
    value = {"start": start, "end": end, "text": TEXT[start - 1 : end - 1], "labels": [label]}
    return {"id": name, "from_name": "label", "to_name": "text", "type": "labels", "value": value}


@pytest.mark.parametrize("where", ["annotations", "predictions"])
def test_label_studio_counts_in_utf_16(tmp_path: Path, where: str) -> None:
    choice = {"id": "ab", "from_name": "negation", "type": "choices", "value": {"start": 6, "choices": ["negated"]}}
    whole = {"id": "zz", "from_name": "quality", "type": "choices", "value": {"choices": ["good"]}}
    dated = {"type": "relation", "from_id": "cd", "to_id": "ab", "direction": "left", "labels": ["dated"]}
    start, end = at("2015")
    results = [dated, choice, region("ab", 6, 14), region("cd", start + 1, end + 1, "date"), whole]
    (note,) = read(put(tmp_path, "a.json", [task(*results, where=where)]), "label-studio")
    assert [(span.start, span.end, span.text) for span in note.spans] == [(5, 13, "shingles"), (start, end, "2015")]
    assert note.spans[0].attributes == {"negation": "negated"}
    assert [(one.type, one.head, one.tail) for one in note.relations] == [("dated", "ab", "cd")]
    assert (note.doc_id, note.meta, note.labels) == ("3", {"ward": "3"}, {"quality": "good"})
    for form in ("label-studio", "label-studio-predictions"):
        assert [one.record() for one in back(tmp_path, form, [note])] == [note.record()]
        written = json.loads(Path(there(tmp_path, form)).read_bytes())[0]
        key = "predictions" if form.endswith("predictions") else "annotations"
        assert written[key][0]["result"][0]["value"]["start"] == 6


def test_label_studio_keeps_what_it_has_no_place_for_when_a_span_is_moved(tmp_path: Path) -> None:
    url = there(tmp_path, "label-studio")
    WRITERS["label-studio"](url, [Note.model_validate(NOTE)])
    tasks = json.loads(Path(url).read_bytes())
    tasks[0]["annotations"][0]["result"][0]["value"] |= {"start": 3, "text": "No shingles"}
    (note,) = read(put(tmp_path, "b.json", tasks), "label-studio")
    assert (note.spans[0].start, note.spans[0].text, note.spans[0].concept) == (2, "No shingles", "herpes_zoster")


def xmi(*elements: str, head: str = "") -> str:
    spaces = "cas textsem syntax refsem".split()
    declared = " ".join(
        f'xmlns:{name}="http:///{"uima" if name == "cas" else "org/apache/ctakes/typesystem/type"}/{name}.ecore"'
        for name in spaces
    )
    text = TEXT.replace("\r", "&#13;").replace("\n", "&#10;")
    sofa = f'<cas:Sofa xmi:id="1" sofaNum="1" sofaID="_InitialView" sofaString="{text}"/>'
    return f'{head}<xmi:XMI xmlns:xmi="http://www.omg.org/XMI" {declared}>{sofa}{"".join(elements)}</xmi:XMI>'


def test_xmi_reads_ctakes(tmp_path: Path) -> None:
    start, end = at("knee pain")
    content = xmi(
        '<syntax:WordToken xmi:id="4" sofa="1" begin="6" end="14"/>',
        '<textsem:DiseaseDisorderMention xmi:id="9" sofa="1" begin="6" end="14" polarity="-1" uncertainty="1"'
        ' subject="family_member" conditional="false" generic="false" historyOf="1" ontologyConceptArr="12 13 14"/>',
        f'<textsem:SignSymptomMention xmi:id="10" sofa="1" begin="{start + 1}" end="{end + 1}" polarity="1"'
        ' uncertainty="1" subject="donor_other" conditional="true" generic="false" historyOf="0"'
        ' ontologyConceptArr="20"/>',
        '<textsem:SignSymptomMention xmi:id="11" sofa="2" begin="0" end="900"/>',
        '<refsem:UmlsConcept xmi:id="12" cui="C1"/><refsem:UmlsConcept xmi:id="13" cui="C1"/>',
        '<refsem:UmlsConcept xmi:id="14" cui="C2"/><cas:FSArray xmi:id="20" elements="14"/>',
    )
    url = put(tmp_path, "n1.txt.xmi", content)
    (note,) = read(url, "xmi")
    one, two = note.spans
    assert (note.doc_id, note.text) == ("n1", TEXT)
    assert (one.id, one.label, one.text, one.code) == ("9", "DiseaseDisorderMention", "shingles", ["C1", "C2"])
    assert one.attributes == {
        "negation": "negated",
        "certainty": "uncertain",
        "temporality": "historical",
        "experiencer": "family",
    }
    assert (two.text, two.code) == ("knee pain", "C2")
    assert two.attributes == {
        "negation": "affirmed",
        "certainty": "conditional",
        "temporality": "current",
        "experiencer": "other",
    }


def medcat(**more: Any) -> dict[str, Any]:
    return {"id": 7, "start": 5, "end": 13, "cui": "C0019360", "value": "shingles", "correct": True, **more}


def medcat_export(*annotations: dict[str, Any]) -> dict[str, Any]:
    document = {"id": 1, "name": "n1", "text": TEXT, "annotations": list(annotations)}
    return {"projects": [{"name": "p", "documents": [document]}]}


def test_medcattrainer_reads_what_annotators_left(tmp_path: Path) -> None:
    metas = {"Presence": "False", "Subject": "Family", "Time": "Past", "Severity": "mild"}
    export = medcat_export(
        medcat(meta_anns={name: {"name": name, "value": value} for name, value in metas.items()}),
        medcat(id=8, deleted=True),
        medcat(id=9, killed=True),
        medcat(id=10, correct=False),
        medcat(id=11, correct=False, alternative=True, meta_anns=[{"name": "Presence", "value": "Who knows"}]),
    )
    (note,) = read(put(tmp_path, "a.json", export), "medcattrainer")
    assert [(span.id, span.code, span.start, span.text) for span in note.spans] == [
        ("T7", "C0019360", 5, "shingles"),
        ("T11", "C0019360", 5, "shingles"),
    ]
    assert note.spans[0].attributes == {
        "negation": "negated",
        "experiencer": "family",
        "temporality": "historical",
        "Severity": "mild",
    }
    assert note.spans[1].attributes == {"Presence": "Who knows"}
    assert (note.doc_id, note.meta) == ("n1", {"project": "p"})


def doccano(*entities: Any, **more: Any) -> str:
    return json.dumps({"id": 5, "text": TEXT, "entities": list(entities), **more})


def entity(start: Any, end: Any, name: int = 1) -> dict[str, Any]:
    return {"id": name, "start_offset": start, "end_offset": end, "label": "condition"}


RELATED = {"relations": [{"from_id": 1, "to_id": 9, "type": "dated"}]}
BAD = {
    "doccano, cut": ("doccano", "a.jsonl", doccano(entity(5, 13))[:-9], "line 1"),
    "doccano, not UTF-8": ("doccano", "a.jsonl", b'{"text": "\xff"}', "line 1"),
    "doccano, outside": ("doccano", "a.jsonl", doccano(entity(5, 130)), "note 5: span T1: 5 to 130"),
    "doccano, no number": ("doccano", "a.jsonl", doccano(entity("5", 13)), "span T1: start_offset"),
    "doccano, twice": ("doccano", "a.jsonl", doccano(entity(5, 13), entity(5, 13)), "a second one"),
    "doccano, relation": ("doccano", "a.jsonl", doccano(entity(5, 13), **RELATED), "no entity has the id 9"),
    "doccano, no text": ("doccano", "a.jsonl", '{"id": 5}', "text: missing"),
    "doccano, what was kept": ("doccano", "a.jsonl", doccano(meta={"chartlm": [1]}), "is damaged"),
    "label-studio, cut": ("label-studio", "a.json", json.dumps([task(region("a", 6, 14))])[:-9], "line 1, column"),
    "label-studio, not UTF-8": ("label-studio", "a.json", b'[{"data": "\xff"}]', "byte 11 is not UTF-8"),
    "label-studio, half": ("label-studio", "a.json", [{"data": {"text": "\ud83e"}}], "half a character"),
    "label-studio, no list": ("label-studio", "a.json", "{}", "no list of tasks"),
    "label-studio, outside": ("label-studio", "a.json", [task(region("a", 6, 140))], "span a: offset 140"),
    "label-studio, within": ("label-studio", "a.json", [task(region("a", 1, 14))], "within a character"),
    "label-studio, moved": (
        "label-studio",
        "a.json",
        [
            task(
                region("a", 6, 14), region("b", 7, 9) | {"value": {"start": 7, "end": 9, "text": "zz", "labels": ["x"]}}
            )
        ],
        "span b: its text is not what",
    ),
    "label-studio, relation": (
        "label-studio",
        "a.json",
        [task(region("a", 6, 14), {"type": "relation", "from_id": "a", "to_id": "q"})],
        "there is no span q",
    ),
    "label-studio, value": (
        "label-studio",
        "a.json",
        [
            task(
                region("a", 6, 14),
                {"id": "a", "from_name": "negation", "type": "choices", "value": {"choices": ["so"]}},
            )
        ],
        "negation='so'",
    ),
    "xmi, cut": ("xmi", "a.xmi", xmi()[:-9], "not XML at line"),
    "xmi, not UTF-8": ("xmi", "a.xmi", xmi().encode().replace(b"No", b"\xff"), "not XML at line"),
    "xmi, DTD": ("xmi", "a.xmi", xmi(head='<!DOCTYPE x [<!ENTITY a "aaaa">]>'), "DTD"),
    "xmi, outside": ("xmi", "a.xmi", xmi('<textsem:X xmi:id="9" sofa="1" begin="6" end="99"/>'), "span 9: offset 99"),
    "xmi, no text": ("xmi", "a.xmi", "<a/>", "no Sofa"),
    "medcattrainer, cut": ("medcattrainer", "a.json", json.dumps(medcat_export(medcat()))[:-9], "line 1, column"),
    "medcattrainer, not UTF-8": ("medcattrainer", "a.json", b"\xff", "byte 0"),
    "medcattrainer, other": ("medcattrainer", "a.json", "[]", "no list of projects"),
    "medcattrainer, outside": ("medcattrainer", "a.json", medcat_export(medcat(end=99)), "span T7: 5 to 99"),
    "medcattrainer, moved": ("medcattrainer", "a.json", medcat_export(medcat(start=6)), "its text is not what"),
    "jsonl, cut": ("jsonl", "a.jsonl", '{"doc_id"', "line 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_bad_is_named(tmp_path: Path, case: str) -> None:
    form, name, content, expected = BAD[case]
    assert expected in said(put(tmp_path, name, content), form)


@pytest.mark.parametrize(
    ("ann", "expected"),
    [
        ("T1\tcondition 5 130\tshingles", "note n1: span T1: 5 to 130"),
        ("T1\tcondition 5\tshingles", "not two numbers"),
        ("T1\tcondition 6 14\tshingles", "its text is not what stands at 6 to 14"),
        ("T1\tcondition 5 13\tshingles\nT1\tcondition 5 13\tshingles", "line 2: a second T1"),
        ("T1\tcondition 5 13\tshingles\nR1\tdated Arg1:T1 Arg2:T2", "line 2: there is no span T2"),
        ("T1\tcondition 5 13\tshingles\nR1\tdated Arg1:T1", "line 2: R1 does not say"),
        ("T1\tcondition 5 13\tshingles\nA1\tNegation T1 maybe", "span T1: negation='maybe'"),
        ("T1\tcondition 5 13\tshingles\nA1\tNegation T1 negated\nA2\tNegation T1 affirmed", "two values of negation"),
        ("shingles", "line 1: not a line of BRAT's"),
        ("A1", "line 1: A1 names no span"),
        (b"T1\tcondition 5 13\t\xff", "byte 18 is not UTF-8"),
    ],
)
def test_what_is_bad_of_brat_is_named(tmp_path: Path, ann: Any, expected: str) -> None:
    put(tmp_path, "n1.txt", TEXT)
    assert expected in said(put(tmp_path, "n1.ann", ann), "brat")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    put(tmp_path, "lonely.ann", "")
    assert "no .txt" in said(str(tmp_path / "lonely.ann"), "brat")
    for form in ("doccano", "label-studio", "xmi", "medcattrainer"):
        assert "nothing" in said(str(tmp_path / "nothing"), form)
        assert "no file ends with" in said(str(tmp_path), form)
    assert "name one of BRAT's" in said(str(tmp_path / "nothing"), "brat")
    with pytest.raises(DataError, match="there is no format 'word'; the formats are jsonl, brat"):
        list(read("x", "word"))


def test_bad_notes_may_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "n1.txt", TEXT)
    put(tmp_path, "n1.ann", "T1\tcondition 5 130\tshingles")
    put(tmp_path, "n2.txt", b"\xff")
    put(tmp_path, "n3.txt", TEXT)
    put(tmp_path, "a.xmi", xmi()[:-9])
    put(tmp_path, "b.xmi", xmi())
    assert [note.doc_id for note in read(str(tmp_path), "brat", skip_bad=True)] == ["n3"]
    assert "2 bad notes left out" in capsys.readouterr().out
    assert [note.doc_id for note in read(str(tmp_path), "xmi", skip_bad=True)] == ["b"]
    assert "1 bad notes left out" in capsys.readouterr().out


@pytest.mark.parametrize("form", LOSSLESS)
def test_a_note_that_could_not_be_read_again_is_not_written(tmp_path: Path, form: str) -> None:
    note = Note.model_validate({**NOTE, "relations": [{"type": "dated", "head": "T1", "tail": "T77"}]})
    with pytest.raises(DataError, match="no span has the id T77"):
        WRITERS[form](there(tmp_path, form), [note])
    with pytest.raises(DataError, match="half a character"):
        WRITERS[form](there(tmp_path, form), [Note(doc_id="n", text="\ud83e")])


def test_brat_files_of_notes_with_like_names_do_not_meet() -> None:
    notes = [Note(doc_id=name, text=name) for name in ("a/b", "a_b", "A b", "..", "_SUCCESS", "x" * 300, "é")]
    WRITERS["brat"]("memory://formats/like", notes)
    found = {note.doc_id: note.text for note in read("memory://formats/like", "brat")}
    assert found == {note.doc_id: note.text for note in notes}
