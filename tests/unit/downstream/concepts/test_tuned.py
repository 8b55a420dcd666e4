"""Language models that learn from annotated spans: what they learn, from whom, and how much it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from annotated import model, toy

from downstream.concepts import learning, tuned
from downstream.concepts.attributes import Attribute, Attributes
from downstream.concepts.features import Examples
from downstream.concepts.learning import TuneConfig
from downstream.concepts.schema import Note, Span
from downstream.concepts.states import States
from downstream.concepts.tuned import Tuner

SOON = {"epochs": 8, "lr": 0.01, "lr_head": 0.01}  # for the small random models of these tests


def tuner(
    notes: list[Note], passed: Callable[[], None] = lambda: None, others: Sequence[Note] = (), **changes: Any
) -> Tuner:
    return Tuner([model(), model(True)], notes, TuneConfig(**{**SOON, **changes}), others, passed)


def right(said: dict[str, dict[str, Any]] | Any, notes: list[Note]) -> float:
    """The share of mentions whose negation is the likelier value."""
    truth = [span.attributes["negation"] == "negated" for note in notes for span in note.spans]
    return float(((said["negation"]["negated"] > said["negation"]["affirmed"]) == truth).mean())


def test_learned_on_some_documents_it_reads_others() -> None:
    notes, passes = toy(80, filler=4), []
    learner = tuner(notes, lambda: passes.append(1))
    one = learner.fit([note.patient_id for note in notes[:60] if note.patient_id])
    assert len(passes) == SOON["epochs"]
    said = one.of(notes[60:])
    assert right(said, notes[60:]) > 0.9
    assert np.exp(said["negation"]["negated"]) + np.exp(said["negation"]["affirmed"]) == pytest.approx(1)
    again = learner.fit([note.patient_id for note in notes[:60] if note.patient_id]).of(notes[60:])
    assert (again["negation"]["negated"] == said["negation"]["negated"]).all()


def test_nobody_reads_what_he_has_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values drawn by lot, and another word in each note: who has seen a note can say its value, others cannot."""
    monkeypatch.setattr(learning, "DROP", 0.0)
    monkeypatch.setattr(learning, "NOISE", 0.0)
    notes = toy(40)
    for i, value in enumerate(np.random.default_rng(0).permutation(["negated", "affirmed"] * 20)):
        text = f"w{i} w{i} fever"
        span = Span(id="T1", start=len(text) - 5, end=len(text), text="fever", attributes={"negation": str(value)})
        notes[i] = Note(doc_id=f"n{i}", text=text, spans=[span])
    learner, examples = tuner(notes, epochs=20), Examples.of(notes)
    assert right(learner.fit(examples.documents).of(notes), notes) > 0.95
    assert right(learner.crossed(examples).tuned, notes) < 0.75


def test_each_attribute_is_learned_from_the_spans_that_have_it() -> None:
    notes = toy(80, filler=2)
    for note in notes[::2]:
        note.spans[0].attributes = {"certainty": "certain"}
    for note in notes[1::2]:
        note.spans[0].attributes = {"negation": "negated"}
    notes[0].spans[0].attributes = {"negation": "affirmed"}  # else it would have but one value
    said = tuner(notes).fit([note.patient_id or "" for note in notes]).of(notes)
    assert (said["certainty"]["certain"] == 0).all()  # the one value there is
    assert (said["negation"]["negated"][1::2] > said["negation"]["affirmed"][1::2]).all()


def test_all_begin_from_what_other_notes_say() -> None:
    notes, others = toy(8), toy(480)[80:]
    for note in others[:200]:
        note.spans[0].label = "a label of theirs"
        note.spans[0].attributes["severity"] = "unknown here"
    others[-1].spans[0].attributes = {"negation": "a value of theirs"}
    documents, passes = [note.patient_id or "" for note in notes], list[int]()
    still = {"epochs": 1, "lr": 1e-9, "lr_head": 1e-9}
    alone = tuner(notes, **still)
    assert alone.begun is None
    assert right(alone.fit(documents).of(notes), notes) < 0.75
    learner = tuner(notes, lambda: passes.append(1), others)
    assert learner.begun
    learner.config = TuneConfig(**still)
    fitted = [learner.fit(documents), learner.fit(documents[:4])]
    assert len(passes) == 3  # the others once
    for one in (learner.begun, *fitted):
        assert right(one.of(notes), notes) > 0.9
        assert one.classes == {"negation": ("affirmed", "negated")}
    assert sum(len(note.spans) for note in learner.others) == 399


def test_pieces_side_by_side_are_read_as_notes_are() -> None:
    notes = toy(6, filler=150)
    for note, words in zip(notes, (10, 150, 300, 700, 20, 2), strict=True):
        note.text = " ".join(f"w{i % 37}" for i in range(words)) + " " + note.text
        note.spans[0] = note.spans[0].model_copy(update={"start": len(note.text) - 8, "end": len(note.text) - 3})
    models = [model(), model(True)]
    alone = [States([one])(note.text, [(note.spans[0].start, note.spans[0].end)]) for one in models for note in notes]
    pieces = [tuned._piece(models, note.text, note.spans, {}, [""]) for note in notes]
    for number, trained in enumerate(models):
        tokens, windows = zip(*(piece.read[number] for piece in pieces), strict=True)
        together_NP = tuned._means(trained.model, tokens, windows).detach()  # type: ignore[arg-type]
        np.testing.assert_allclose(together_NP, np.concatenate(alone[6 * number :][:6]), atol=1e-4)


def test_a_long_note_is_learned_from_in_pieces() -> None:
    words = " ".join(f"w{i % 40}" for i in range(5000))
    starts = [100, 150, 6000, len(words) - 40, len(words) - 10]
    spans = [Span(id=f"T{i}", start=at, end=at + 3, text=words[at : at + 3]) for i, at in enumerate(starts)]
    note = Note(doc_id="n", text=words, spans=list(reversed(spans)))
    pieces = list(tuned._cuts(note))
    assert [len(own) for _, own in pieces] == [2, 1, 2]
    for text, own in pieces:
        assert len(text) < tuned.LONGEST + tuned.BEFORE + tuned.AFTER + 20
        assert [text[span.start : span.end] for span in own] == [span.text for span in own]
        assert own[0].start > tuned.BEFORE / 2 or own[0].start == 100


def test_it_counts_as_much_as_it_is_right() -> None:
    notes = toy(80)
    for i, note in enumerate(notes):
        note.text = note.text.replace("zulu", "mike").replace("today", "mike")  # nothing to see but what is tuned
        note.spans[0].attributes["negation"] = "negated" if i % 3 == 0 else "affirmed"
    examples = Examples.of(notes)
    truth = np.array([note.spans[0].attributes["negation"] == "negated" for note in notes])
    knows = {"negated": np.where(truth, -0.1, -3), "affirmed": np.where(truth, -3, -0.1)}
    lots = {"negated": np.full(80, -0.7), "affirmed": np.full(80, -0.7)}
    for says, share in ((knows, True), (lots, False)):
        told = examples._replace(tuned={"negation": says})
        attribute = Attribute.fit(told, "negation")
        assert (attribute.general.share > 0) == share
        said = np.array(attribute.classes)[attribute(told, "negation")[1]] == "negated"
        assert (said == truth).all() or not share
        # Written and read again it says the same.
        kept = Attributes.of(Attributes({"negation": attribute}).arrays()).learned["negation"]
        assert kept.general.share == attribute.general.share
    assert Attribute.fit(examples, "negation").general.share == 0
