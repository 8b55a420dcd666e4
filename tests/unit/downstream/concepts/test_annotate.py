"""Mentions, rules, the learned reader and the score, from notes to numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, DataError
from downstream.concepts import annotate, formats, schema, score, train
from downstream.concepts.attributes import Attributes
from downstream.concepts.cues import Cues, decide
from downstream.concepts.features import mentions_of
from downstream.concepts.mentions import Concept, Finder, load
from downstream.concepts.reader import Reader
from downstream.concepts.schema import Note, Span
from downstream.concepts.words import Phrases, Text

ROOT = Path(__file__).resolve().parents[4]
ZOSTER = str(ROOT / "recipes/concepts/zoster.toml")


def said(text: str, mention: str) -> dict[str, str]:
    """What the rules say of a mention, without what is usual."""
    words = Text(text)
    start = text.index(mention)
    found = decide(Cues(words).of(*words.span_of(start, start + len(mention))))
    return {axis: value for axis, value in found.items() if value not in ("affirmed", "certain", "current", "patient")}


@pytest.mark.parametrize(
    ("text", "mention", "expected"),
    [
        ("Patient has shingles.", "shingles", {}),
        ("No evidence of shingles.", "shingles", {"negation": "negated"}),
        ("She denies fever, chills, or rash.", "rash", {"negation": "negated"}),
        ("Denies fever but has rash.", "rash", {}),
        ("Denies fever. Rash on the left.", "Rash", {}),
        ("Patient in no acute distress.", "acute distress", {"negation": "negated"}),
        ("Fever: none", "Fever", {"negation": "negated"}),
        ("There is no change in the rash.", "rash", {}),
        ("R/o MI.", "MI", {"certainty": "uncertain"}),
        ("Possible shingles on the flank.", "shingles", {"certainty": "uncertain"}),
        ("Return if zoster spreads.", "zoster", {"certainty": "hypothetical"}),
        ("History of shingles.", "shingles", {"temporality": "historical"}),
        ("Shingles ten years ago.", "Shingles", {"temporality": "historical"}),
        ("History of asthma presents with rash.", "rash", {}),
        ("His father had zoster.", "zoster", {"experiencer": "family"}),
        ("no history of\nshingles", "shingles", {"negation": "negated", "temporality": "historical"}),
    ],
)
def test_rules(text: str, mention: str, expected: dict[str, str]) -> None:
    assert said(text, mention) == expected


def names(text: str, *concepts: Concept) -> list[tuple[str, str | None]]:
    return [(span.text, span.concept) for span in Finder(concepts)(Text(text))]


def test_mentions_are_the_longest_at_word_boundaries() -> None:
    zoster = Concept(name="zoster", names=("zoster", "herpes zoster"))
    eye = Concept(name="eye", names=("herpes zoster ophthalmicus",))
    assert names("Herpes  zoster\nophthalmicus, then zoster; zosteriform", zoster, eye) == [
        ("Herpes  zoster\nophthalmicus", "eye"),
        ("zoster", "zoster"),
    ]


def test_capitals_and_misspelt_words() -> None:
    mi = Concept(name="mi", names=("MI",))
    assert names("MI, mi, Mi", mi) == [("MI", "mi")]
    shingles = Concept(name="shingles", names=("shingles",))
    found = names("shinglse shingels shingle shinglees single hingles shinxxes", shingles)
    assert [text for text, _ in found] == ["shinglse", "shingels", "shingle", "shinglees", "hingles"]
    assert names("shinglse", shingles.model_copy(update={"fuzzy": False})) == []


def test_one_name_of_two_concepts_gives_both() -> None:
    found = names("RA since 2010", Concept(name="arthritis", names=("RA",)), Concept(name="atrium", names=("RA",)))
    assert found == [("RA", "arthritis"), ("RA", "atrium")]


def test_offsets_are_of_the_text_as_it_stands() -> None:
    text = "İİ 😀 Ǆ\tSHINGLES\r\n"
    [span] = Finder([Concept(name="z", names=("shingles",))])(Text(text))
    assert text[span.start : span.end] == "SHINGLES"


def test_no_phrases_find_nothing() -> None:
    assert Phrases[int]([]).find(Text("a b")) == []
    assert Phrases([("a", 1, False)]).find(Text("")) == []


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Three notes in a table, and a file of names."""
    (tmp_path / "notes.csv").write_text(
        "id,text,when\n1,No shingles.,2015-08-02 10:00\n2,,2015-08-03\n3,Zoster in 2010. Father had shingles.,\n"
    )
    return tmp_path


def test_annotate_rules_and_score(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{notes}/out.jsonl"
    annotate.main(["rules", f"{notes}/notes.csv", f"concepts={ZOSTER}", f"out={out}", "date=when"])
    found = list(schema.read(out))
    assert [note.doc_id for note in found] == ["1", "2", "3"]
    assert found[0].note_date == "2015-08-02"
    assert found[2].note_date is None
    [span] = found[0].spans
    assert (span.text, span.attributes["negation"], span.cues) == ("shingles", "negated", {"negation": (0, 2)})
    assert [span.attributes["experiencer"] for span in found[2].spans if span.concept] == ["patient", "family"]
    score.main([out, out, f"out={notes}/score.json", "kappa=true"])
    scored = json.loads((notes / "score.json").read_text())
    assert scored["values"]["negation:negated"]["f1"] == 1.0
    assert scored["kappa"] == {"experiencer": 1.0, "negation": 1.0}
    shown = capsys.readouterr()
    assert "Father" not in shown.out + shown.err


def test_sections_dates_and_values(notes: Path) -> None:
    text = (
        "PAST MEDICAL HISTORY: Shingles. ASSESSMENT: Shingles in 2010. VZV IgG 2.31 high. Father had zoster last "
        "summer. Shingrix on 9/1/2015."
    )
    (notes / "notes.csv").write_text(f'id,when,text\n1,2015-08-02,"{text}"\n')
    out = f"{notes}/out.jsonl"
    annotate.main(["rules", f"{notes}/notes.csv", f"concepts={ZOSTER}", f"out={out}", "date=when"])
    [note] = schema.read(out)
    assert note.text == text
    by_id = {span.id: span for span in note.spans}
    first, second, test, zoster, vaccine = note.spans[:5]
    assert [one.section for one in (first, second)] == ["past_medical_history", "assessment"]
    # One by its section, one by the year beside it, the vaccine by a day that is still to come.
    assert [one.attributes["temporality"] for one in (first, second, test, vaccine)] == [
        "historical", "historical", "current", "future",
    ]  # fmt: skip
    assert zoster.attributes["experiencer"] == "family"
    linked = {(one.type, one.head): by_id[one.tail] for one in note.relations}
    assert linked["dated", second.id].value == {"from": "2010-01-01", "to": "2010-12-31", "granularity": "year"}
    assert linked["dated", zoster.id].value == {"from": "2014-06-01", "to": "2014-08-31", "granularity": "season"}
    values = [by_id[head].value for (type_, head), tail in linked.items() if type_ == "value_of" and tail is test]
    assert {"number": 2.31} in [{"number": (one or {}).get("number")} for one in values]


@pytest.mark.parametrize("name", ["brat", "doccano", "label-studio"])
def test_prelabels_go_to_a_tool_and_come_back_as_gold(notes: Path, name: str) -> None:
    (notes / "notes.csv").write_text("id,text\n" + "".join(f"{i},No fever. Zoster.\n" for i in range(8)))
    place = f"{notes}/out" if name == "brat" else f"{notes}/out.json"
    annotate.main(["rules", f"{notes}/notes.csv", f"concepts={ZOSTER}", f"out={notes}/native.jsonl"])
    annotate.main(["rules", f"{notes}/notes.csv", f"concepts={ZOSTER}", f"out={place}", f"to={name}"])
    assert list(formats.read(place, name)) == list(schema.read(f"{notes}/native.jsonl"))
    with pytest.raises(DataError, match="no attribute has two values"):
        train.main([f"corpus={place}", f"format={name}", f"out={notes}/reader"])


def test_a_thousand_names_from_a_table(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("concept,name\nzoster,shingles\nzoster,zona\nmi,MI\n")
    assert [(one.name, one.names) for one in load(f"{tmp_path}/names.csv")] == [
        ("zoster", ("shingles", "zona")),
        ("mi", ("MI",)),
    ]


def test_a_reader_learns_from_sections_as_it_reads_them() -> None:
    heading = "FAMILY HISTORY: "
    [learned] = mentions_of(Note(doc_id="n", text=heading + "fever", spans=[Span(id="T1", start=16, end=21)]))
    read = annotate.Annotator(Finder([Concept(name="f", names=("fever",))]), Reader(Attributes({})))
    [span] = read(Note(doc_id="n", text=heading + "fever")).spans
    assert learned.section == span.section == "family_history"
    assert learned.rules == span.attributes


def gold(**changes: Any) -> dict[str, Any]:
    span = {"id": "T1", "start": 0, "end": 5, "text": "fever", "attributes": {"negation": "negated"}}
    return {"doc_id": "n1", "text": "fever no", "spans": [span | changes]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (gold(end=99), "note n1: span T1: 0 to 99 of 8 characters"),
        (gold(start=1, end=1), "span T1: 1 to 1"),
        (gold(start=1), "span T1: its text is not what stands at 1 to 5"),
        (gold(attributes={"negation": "perhaps"}), "span T1: negation='perhaps'; the values are affirmed, negated"),
        (gold() | {"relations": [{"type": "dated", "head": "T1", "tail": "T9"}]}, "no span has the id T9"),
        (gold() | {"spans": gold()["spans"] * 2}, "span T1: a second one of this id"),
        (
            gold() | {"spans": [*gold()["spans"], gold(id="T2", attributes={"negation": "affirmed"})["spans"][0]]},
            "spans T1 and T2 are at one place and do not agree on negation",
        ),
        (
            gold() | {"spans": [gold(id=f"T{i}", attributes={"": str(i)})["spans"][0] for i in (1, 2)]},
            "spans T1 and T2 are at one place and do not agree on ''",
        ),
        (
            gold() | {"spans": [*gold()["spans"], {"id": "T2", "start": 3, "end": 8}]},
            "spans T1 and T2 of one label overlap, and neither lies within the other",
        ),
        (gold(start="x"), "spans.0.start"),
    ],
)
def test_bad_annotations_are_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "gold.jsonl"
    file.write_text(json.dumps(record) + "\n" + json.dumps(gold() | {"doc_id": "n2"}) + "\n")
    with pytest.raises(DataError) as error:
        list(schema.read(str(file)))
    assert message in str(error.value)
    assert "fever" not in str(error.value)
    assert [note.doc_id for note in schema.read(str(file), skip_bad=True)] == ["n2"]


def test_offsets_of_utf16_are_recognized(tmp_path: Path) -> None:
    record = gold(start=3, end=8) | {"text": "😀 fever no"}
    (tmp_path / "gold.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match="are the offsets of UTF-16"):
        list(schema.read(f"{tmp_path}/gold.jsonl"))


def test_users_mistakes(notes: Path) -> None:
    table = f"{notes}/notes.csv"
    (notes / "empty.toml").write_text("")
    (notes / "twice.toml").write_text('[[concept]]\nname="a"\nnames=["a"]\n' * 2)
    for args, message in [
        ([], "annotate what"),
        (["rules", table], "key 'concepts' is needed"),
        (["rules", table, f"concepts={notes}/empty.toml"], "has no concept"),
        (["rules", table, f"concepts={notes}/twice.toml"], "two concepts are named a"),
        (["rules"], "annotate what"),
    ]:
        with pytest.raises(ConfigError, match=message):
            annotate.main(args)
    with pytest.raises(DataError, match=r"has no reader; \./launch\.sh finetune"):
        annotate.main([table, table, f"concepts={ZOSTER}"])
    (notes / "damaged.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="is no reader, or damaged"):
        annotate.main([f"{notes}/damaged.npz", table, f"concepts={ZOSTER}"])
    with pytest.raises(DataError, match="row 1: id is not YYYY-MM-DD"):
        annotate.main(["rules", table, f"concepts={ZOSTER}", f"out={notes}/o", "date=id"])
    assert not (notes / "o").exists()


def test_spans_within_others_or_of_another_label_are_good() -> None:
    within = [Span(id=f"T{n}", start=start, end=end) for n, (start, end) in enumerate([(0, 8), (0, 5), (1, 4), (6, 8)])]
    other = Span(id="T9", start=3, end=7, label="other")
    apart = Span(id="T8", start=2, end=7, fragments=[(2, 3), (6, 7)])
    assert schema.problem(Note(doc_id="n", text="fever no", spans=[*within, other, apart])) == ""


def test_scores_by_hand(tmp_path: Path) -> None:
    text = "no fever, rash. cough"
    spans = [("T1", "fever", "negated"), ("T2", "rash", "affirmed"), ("T3", "cough", "negated")]

    def note(changed: dict[str, str], left_out: str = "") -> Note:
        made = [
            Span(id=i, start=text.index(w), end=text.index(w) + len(w), attributes={"negation": changed.get(i, v)})
            for i, w, v in spans
            if i != left_out
        ]
        return Note(doc_id="n", text=text, spans=made)

    schema.write(f"{tmp_path}/gold.jsonl", [note({})])
    schema.write(f"{tmp_path}/said.jsonl", [note({"T2": "negated"}, "T3")])
    score.main([f"{tmp_path}/gold.jsonl", f"{tmp_path}/said.jsonl", f"out={tmp_path}/score.json"])
    found = json.loads((tmp_path / "score.json").read_text())
    negated = found["values"]["negation:negated"]
    assert (negated["precision"], negated["recall"], negated["f1"], negated["n"]) == (0.5, 0.5, 0.5, 2)
    assert (found["spans"], found["found"], found["mixed_accuracy"], found["mixed_mentions"]) == (3, 2, 0.5, 2)
    schema.write(f"{tmp_path}/other.jsonl", [note({}).model_copy(update={"text": text + " "})])
    with pytest.raises(DataError, match="note n has another text"):
        score.main([f"{tmp_path}/gold.jsonl", f"{tmp_path}/other.jsonl"])


def test_ten_thousand_mentions_in_one_note() -> None:
    text = "No fever today, rash on the left leg and cough that came back. " * 4_000
    finder = Finder([Concept(name=name, names=(name,)) for name in ("fever", "rash", "cough")])
    note = annotate.Annotator(finder, Reader(Attributes({})))(Note(doc_id="n", text=text))
    assert len(note.spans) == 12_000
    assert not schema.problem(note)
    pairs = score.paired({"n": note}, {"n": note}, "gold", "said")  # finds its own among thousands, quickly
    assert all(pair.gold == pair.said for pair in pairs)
    assert {span.attributes["negation"] for span in note.spans if span.concept == "fever"} == {"negated"}


@pytest.mark.parametrize("name", ["concepts/negex", "concepts/maccrobat2020", "mtsamples/mention_status"])
def test_real_annotations_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    folder = os.environ.get("CHARTLM_DATA")
    if not folder:
        pytest.skip("CHARTLM_DATA is not set")
    source = f"{folder}/{name}.jsonl"
    schema.write(f"{tmp_path}/again.jsonl", schema.read(source))
    again = [json.loads(one) for one in (tmp_path / "again.jsonl").read_text().split("\n") if one]
    assert again == [json.loads(one) for one in Path(source).read_text().split("\n") if one]
