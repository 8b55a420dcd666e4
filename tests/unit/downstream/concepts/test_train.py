"""A reader learned from annotated notes, with and without a language model, and its states."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from annotated import model, toy

from cluster import config, logs
from cluster.errors import ConfigError, DataError, StorageError
from downstream import finetune, work
from downstream.concepts import annotate, reader, regression, schema, train
from downstream.concepts.attributes import Attribute, Attributes
from downstream.concepts.evaluate import folded, out_of_fold
from downstream.concepts.features import Examples
from downstream.concepts.schema import Note
from downstream.concepts.states import SEGMENT, WIDTHS, States
from downstream.reading import words_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Annotated notes, new ones, and random language models in place of every run."""
    models = {"run": model(), "back": replace(model(True), run="back")}
    for module in (work, reader):
        monkeypatch.setattr(module, "load_trained", lambda run: models[run])
    schema.write(f"{tmp_path}/gold-1.jsonl", toy(60)[:30])
    schema.write(f"{tmp_path}/gold-2.jsonl", toy(60)[30:])
    (tmp_path / "new.csv").write_text("id,text\na,zulu fever\nb,today fever\n")
    (tmp_path / "fever.csv").write_text("concept,name\nfever,fever\n")
    return tmp_path


def learned(folder: Path, *more: str) -> dict[str, object]:
    out = folder / "reader"
    given = [
        "task.name=concepts",
        f"corpus={folder}/gold-*.jsonl",
        f"out={out}",
        "folds=2",
        "tracking.wandb=disabled",
        *more,
    ]
    finetune.main(given)
    found: dict[str, object] = json.loads((out / "results.json").read_text())
    return found


@pytest.mark.parametrize("more", [(), ("run=run",), ("run=run", "backward=back")])
def test_a_reader_learns_what_rules_do_not_know(folder: Path, more: tuple[str, ...]) -> None:
    values = learned(folder, *more)["values"]["negation:negated"]  # type: ignore[index]
    assert values["reader"]["f1"] == values["words"]["f1"] == 1
    assert values["rules"]["f1"] == 0
    assert values["rules"]["reader_gain"] == [1, 1, 1]
    assert ("plain" in values) == bool(more)
    assert "untuned" not in values
    annotate.main([f"{folder}/reader", f"{folder}/new.csv", f"concepts={folder}/fever.csv", f"out={folder}/new.jsonl"])
    found = list(schema.read(f"{folder}/new.jsonl"))
    assert [note.spans[0].attributes["negation"] for note in found] == ["negated", "affirmed"]
    assert all(note.spans[0].scores["negation"] > 0.5 for note in found)
    # What no label says is left to the rules.
    assert found[0].spans[0].attributes["experiencer"] == "patient"
    assert "zulu" not in (folder / "reader/reader.npz").read_bytes().decode("latin-1")


def test_a_date_decides_where_a_reader_says_current(folder: Path) -> None:
    notes = toy(60)
    for i, note in enumerate(notes):
        note.text = note.text.replace("today", "mikes")  # "today" is a date
        note.spans[0].attributes["temporality"] = "historical" if i % 2 else "current"
    schema.write(f"{folder}/gold-1.jsonl", notes)
    learned(folder, f"corpus={folder}/gold-1.jsonl")
    (folder / "new.csv").write_text("id,text,day\na,mikes fever in 2010,2015-08-02\nb,mikes fever,2015-08-02\n")
    reads = [f"{folder}/reader", f"{folder}/new.csv", f"concepts={folder}/fever.csv", f"out={folder}/new.jsonl"]
    annotate.main([*reads, "date=day"])
    dated, now = (next(span for span in note.spans if span.concept) for note in schema.read(f"{folder}/new.jsonl"))
    assert (dated.attributes["temporality"], now.attributes["temporality"]) == ("historical", "current")
    assert "temporality" in now.scores
    assert "temporality" not in dated.scores


def test_a_language_model_tells_what_stands_far_away() -> None:
    examples = Examples.of(toy(80, filler=25), States([model()]))
    said = out_of_fold(folded(examples, examples.documents, 3, 0), "negation")
    truth = np.array([span.attributes["negation"] for span in examples.spans])
    assert (said["reader"] == truth).mean() > 0.9 > 0.7 > (said["plain"] == truth).mean()


def test_the_verb_tunes_and_its_reader_is_read_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run=run", "backward=back", "tune.epochs=3", "tune.lr=0.01")
    learned(folder, *words)
    said = capsys.readouterr().out
    assert "tuning the models: done" in said
    assert "the tuned models add nothing" in said  # the words say it all
    assert not reader.Reader.load(f"{folder}/reader").tuned
    monkeypatch.setattr(regression, "SHARES", (1.0,))  # nothing else is heard
    shutil.rmtree(folder / "reader")
    values = learned(folder, *words)["values"]["negation:negated"]  # type: ignore[index]
    assert values["reader"]["f1"] == 1
    assert values.keys() == {"reader", "untuned", "plain", "rules", "words"}
    again = reader.Reader.load(f"{folder}/reader")
    assert again.tuned
    note = toy(2)[1]
    told = again.tuned(note.text, [(note.spans[0].start, note.spans[0].end)])
    assert told["negation"]["negated"] > told["negation"]["affirmed"]
    weights = [one.state_dict() for trained in again.tuned.states.models for one in (trained.model,)]
    others = [trained.model.state_dict() for trained in (model(), model(True))]
    for a, b in zip(weights, others, strict=True):  # both
        assert any((a[name] != b[name]).any() for name in a)
    annotate.main([f"{folder}/reader", f"{folder}/new.csv", f"concepts={folder}/fever.csv", f"out={folder}/new.jsonl"])
    found = list(schema.read(f"{folder}/new.jsonl"))
    assert [note.spans[0].attributes["negation"] for note in found] == ["negated", "affirmed"]
    kept = (folder / "reader/reader.npz").read_bytes()
    assert "zulu" not in kept.decode("latin-1")
    arrays = dict(np.load(folder / "reader/reader.npz"))
    del arrays["tuned.head.norm.weight"]
    (folder / "reader/reader.npz").write_bytes(reader.npz(arrays))
    with pytest.raises(DataError, match="is no reader, or damaged"):
        reader.Reader.load(f"{folder}/reader")


def test_models_learn_first_from_what_stands_beside_and_under_headings(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, others = toy(24), toy(90)[60:]
    for number, note in enumerate(notes):
        note.spans[0].attributes = {"temporality": "historical" if number % 2 else "current"}
    schema.write(f"{folder}/gold-1.jsonl", notes)
    schema.write(f"{folder}/gold-2.jsonl", [])
    others[0].spans[0].attributes = {"temporality": "current"}
    schema.write(f"{folder}/others.jsonl", others)
    (folder / "headed.csv").write_text("id,text\na,PAST MEDICAL HISTORY: zulu; fever; now zulu. ALLERGIES: none.\n")
    more = (f"beside={folder}/others.jsonl", f"sections={folder}/headed.csv")
    learned(folder, "run=run", "tune.epochs=1", *more)
    assert "the models learn first from 4 mentions and clauses of other notes" in capsys.readouterr().out


def test_it_needs_a_model_to_tune(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.epochs: needs run"):
        learned(folder, "tune.epochs=3")


def test_a_label_tells_how_something_is_denied(folder: Path) -> None:
    """ "mike" denies a drug and affirms a symptom; where a label is the value itself it is not told."""
    notes = toy(120)
    for i, note in enumerate(notes):
        span = note.spans[0]
        note.text = note.text.replace("today", "mike").replace("zulu", "mike")
        span.label = "drug" if i % 2 else "symptom"
        span.attributes["certainty"] = "certain"
    examples = Examples.of(notes)
    learned = Attributes.fit(examples).learned["negation"]
    assert not learned.told  # all drugs are denied
    said_of_one = notes[1].spans[0].attributes
    said_of_one["negation"] = "affirmed"
    assert not Attributes.fit(Examples.of(notes)).learned["negation"].told  # but one, wrongly
    said_of_one["negation"] = "negated"
    for i, note in enumerate(notes):
        if i % 4 > 1:
            note.text = note.text.replace("mike", "lima")
            note.spans[0].attributes["negation"] = "affirmed" if i % 2 else "negated"
    examples = Examples.of(notes)
    truth = np.array([span.attributes["negation"] for span in examples.spans])
    said = out_of_fold(folded(examples, examples.documents, 3, 0), "negation")
    assert (said["reader"] == truth).all()
    fitted = Attributes.fit(examples)
    assert fitted.learned["negation"].labels == {"drug", "symptom"}
    again = Attributes.of(fitted.arrays())
    assert again(examples) == fitted(examples)
    for note in notes:
        note.spans[0].label = "drug"
    without = Attributes.fit(Examples.of(notes))
    assert not without.learned["negation"].told  # one label says nothing
    for note in notes:
        note.spans[0].label = "organ"  # a label that nothing was learned of
    strange = Examples.of(notes)
    assert again(strange) == without(strange)


def test_what_was_stopped_is_learned_from_other_words_and_decided_by_no_rule() -> None:
    notes = toy(120)
    for i, note in enumerate(notes):
        note.text = (
            f"fever {i} was {('discontinued', 'refused')[i // 2 % 2] if i % 2 else ('given', 'found')[i // 2 % 2]}."
        )
        note.spans[0].start, note.spans[0].end = 0, 5
    learned = Attributes.fit(Examples.of(notes))
    new = [notes[0].model_copy(update={"text": f"fever was {word}."}) for word in ("withheld", "measured")]
    asked = Examples.of(new)
    assert [values["negation"] for values, _ in learned(asked)] == ["negated", "affirmed"]
    assert [mention.rules["negation"] for mention in asked.mentions] == ["affirmed", "affirmed"]
    assert not any(mention.cues for mention in asked.mentions)


def test_a_value_in_one_note_only_is_scored_without_a_word_of_sklearn(folder: Path) -> None:
    notes = toy(60)
    notes[0].spans[0].attributes["experiencer"] = "family"
    for note in notes[1:]:
        note.spans[0].attributes["experiencer"] = "patient"
    schema.write(f"{folder}/rare.jsonl", notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = learned(folder, f"corpus={folder}/rare.jsonl")["values"]
    assert values["experiencer:family"]["reader"]["recall"] == 0  # type: ignore[index]


def test_the_same_again_is_done_and_another_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = learned(folder)
    assert learned(folder) == first
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="belongs to other settings"):
        learned(folder, "folds=3")
    schema.write(f"{folder}/gold-2.jsonl", toy(80)[30:])
    with pytest.raises(ConfigError, match="belongs to other settings"):
        learned(folder)


def test_another_checkpoint_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned(folder, "run=run")
    monkeypatch.setattr(reader, "load_trained", lambda run: replace(model(), checkpoint_sha256="later"))
    with pytest.raises(DataError, match="was learned with another checkpoint of run"):
        annotate.main([f"{folder}/reader", f"{folder}/new.csv", f"concepts={folder}/fever.csv", f"out={folder}/o"])


def test_what_cannot_be_learned_is_refused(folder: Path) -> None:
    for more, message in [
        (["backward=back"], "backward: needs run"),
        (["out="], "out: is needed"),
        (["run=back", "backward=run"], "run= must read forwards"),
        ([f"corpus={folder}/no-*.jsonl"], "no-"),
    ]:
        with pytest.raises((ConfigError, StorageError), match=message):
            learned(folder, *more)
    notes = [note.model_copy(update={"patient_id": "read"}) for note in toy(40)]
    schema.write(f"{folder}/known.jsonl", notes)
    with pytest.raises(DataError, match=r"has read 1 of the patients .* such as read"):
        learned(folder, f"corpus={folder}/known.jsonl", "run=run")
    with pytest.raises(DataError, match="negation: only 1 documents have it"):
        learned(folder, f"corpus={folder}/known.jsonl", "run=run", "others=true", f"out={folder}/other")


def puzzling(count: int, name: str) -> list[Note]:
    """Notes of sixty words, each of which denies or affirms: each by itself tells nothing of another word."""
    made = []
    for i, note in enumerate(toy(count)):
        word = f"{'kilo' if i % 2 else 'lima'}{i % 60}x"
        begin = note.text.index("fever")
        note.text, moved = f"{word} {note.text[begin:]}", len(word) + 1 - begin
        span = note.spans[0]
        span.start, span.end = span.start + moved, span.end + moved
        note.doc_id, note.patient_id = f"{name}{i}", f"{name}{i}"
        made.append(note)
    return made


def test_learning_says_how_far_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_plain_every", 0.0)
    learned(folder)
    said = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("learning what")]
    # Two folds and the reader itself; of the first step no rate is known.
    assert said[:-1] == [f"learning what is said: {share}% negation" for share in (67, 100)]


def test_other_corpora_are_learned_from_as_far_as_they_help(folder: Path) -> None:
    """Each word stands in one annotated note only, so that what it says is known from the other notes, if at all."""
    schema.write(f"{folder}/puzzle.jsonl", puzzling(60, "n"))
    schema.write(f"{folder}/beside.jsonl", puzzling(1200, "b"))
    corpus = f"corpus={folder}/puzzle.jsonl"
    without = learned(folder, corpus)["values"]["negation:negated"]  # type: ignore[index]
    shutil.rmtree(folder / "reader")
    found = learned(folder, corpus, f"beside={folder}/beside.jsonl")
    values = found["values"]["negation:negated"]  # type: ignore[index]
    assert values["reader"]["f1"] == 1 > 0.8 > values["alone"]["f1"]
    assert "alone" not in without
    assert without["reader"]["f1"] == values["alone"]["f1"]
    assert values["reader"]["n"] == 30  # negated; nothing else is tested
    assert found["beside"] == config.fingerprint([note.record() for note in puzzling(1200, "b")])
    schema.write(f"{folder}/beside.jsonl", puzzling(1260, "b"))
    with pytest.raises(ConfigError, match="belongs to other settings"):
        learned(folder, corpus, f"beside={folder}/beside.jsonl")


def test_what_was_said_of_documents_left_out_serves_again() -> None:
    examples, others = Examples.of(puzzling(60, "n")), Examples.of(puzzling(600, "b"))
    left_out: regression.LeftOut = {}
    both = [Attribute.fit(examples, "negation", one, left_out) for one in (others, None)]
    assert set(left_out) == {(False, 0.0, weight) for weight in (0.0, *regression.WEIGHTS)}
    anew = [Attribute.fit(examples, "negation", one) for one in (others, None)]
    for one, again in zip(both, anew, strict=True):
        assert (one.general.weights_BK == again.general.weights_BK).all()
        assert (one.general.offsets_K == again.general.offsets_K).all()
    assert (both[0].general.weights_BK != both[1].general.weights_BK).any()


def test_what_other_corpora_say_wrongly_is_not_heard() -> None:
    notes = Examples.of(toy(80))
    wrong = [note.model_copy(deep=True) for note in toy(400)]
    for i, note in enumerate(wrong):
        note.spans[0].attributes["negation"] = ("negated", "affirmed", "possible")[i % 3]
    one = Attribute.fit(notes, "negation")
    for others in (Examples.of(wrong), Examples.of(wrong).rows(np.arange(0))):
        other = Attribute.fit(notes, "negation", others)
        assert one.classes == other.classes
        assert (one.general.weights_BK == other.general.weights_BK).all()


def test_what_would_tell_of_the_tested_notes_is_refused_beside_them(folder: Path) -> None:
    beside = f"beside={folder}/beside.jsonl"
    bare = [note.model_copy(update={"spans": []}) for note in puzzling(4, "b")]
    schema.write(f"{folder}/beside.jsonl", bare)
    with pytest.raises(DataError, match=r"beside\.jsonl: no mention has an attribute .* \(negation\)"):
        learned(folder, beside)
    schema.write(f"{folder}/beside.jsonl", [*puzzling(4, "b"), *toy(2)])
    with pytest.raises(DataError, match=r"2 notes are of patients of the annotated notes, such as p0"):
        learned(folder, beside)
    text = " ".join(f"word{i}" for i in range(100))
    one = Note(doc_id="a", text=text)
    copy = [*puzzling(4, "b"), Note(doc_id="copy", text=f"{text} more")]
    schema.write(f"{folder}/gold-1.jsonl", [*toy(30), one])
    schema.write(f"{folder}/beside.jsonl", copy)
    with pytest.raises(DataError, match=r"1 notes are nearly the same as an annotated one, such as copy"):
        learned(folder, beside)


def test_notes_that_are_nearly_the_same_are_not_parted() -> None:
    long = " ".join(f"word{i}" for i in range(200))
    notes = [
        Note(doc_id="a", text=long), Note(doc_id="b", text=f"{long} more"), Note(doc_id="c", text="another"),
        Note(doc_id="d", patient_id="b", text="a third"),
    ]  # fmt: skip
    groups = train._groups(notes)
    assert groups["a"] == groups["b"] != groups["c"]


def test_a_missing_attribute_is_not_learned_as_its_default() -> None:
    asked = Examples.of(toy(2))
    without = [note.model_copy(deep=True) for note in toy(80)[40:]]
    for note in without:
        del note.spans[0].attributes["negation"]
    fitted = [Attributes.fit(Examples.of(notes)) for notes in (toy(40), [*toy(40), *without])]
    assert fitted[0](asked) == fitted[1](asked)


def test_states_are_those_of_the_whole_note_wherever_it_is_cut() -> None:
    """Against one reading of all tokens; mentions at the ends, one in another, beyond several segments."""
    words = "".join(f"w{n * 17 % 40} " for n in range(3 * SEGMENT))
    text = f"Fever, {words}no (fever) of ICD {words}fever"
    spans = [(0, 5), (text.index("(fever") + 1, text.index("(fever") + 6), (len(text) - 5, len(text)), (0, 10)]
    for trained in (model(), model(backward=True)):
        found = States([trained])(text, spans)
        cleaned = trained.clean_text(text)
        tokens, first_T = trained.tokenizer.encode_words([cleaned[a:b] for a, b in words_of(cleaned)])
        start, end = (len(tokens) - first_T[[1, 0]]) if trained.backward else first_T[[-2, -1]]
        read_T = torch.from_numpy((tokens[::-1] if trained.backward else tokens).astype(np.int64))
        with torch.no_grad():
            hidden, _ = trained.model(read_T[None], trained.model.initial_carry(1), None)  # type: ignore[operator]
        states_TE = hidden.raw_BTE[0].double()
        width = states_TE.shape[1]
        read_last = found[0 if trained.backward else 2]
        assert np.allclose(read_last[:width], states_TE[end - 1], atol=1e-6)
        before = states_TE[start - WIDTHS[0] : start].mean(0)
        assert np.allclose(read_last[3 * width : 4 * width], before, atol=1e-6)
    assert found.shape == (4, 7 * width)
    assert States([model(), model(True)])(text, spans).shape == (4, 14 * width)
    assert States([model()])("fever", [(0, 5)]).shape == (1, 7 * width)


def test_states_of_passages_are_those_of_each_alone() -> None:
    """Short and long ones, together and one after the other, against one reading of all tokens."""
    long = "".join(f"w{n * 17 % 40} " for n in range(SEGMENT + 40))
    texts = ["fever now", long, "", *(f"no fever w{n}" for n in range(20))]
    for trained in (model(), model(backward=True)):
        found = States([trained]).of_passages(texts)
        for text, row in zip(texts, found, strict=True):
            tokens = trained.tokenizer.encode([trained.clean_text(text)])[0]
            if not len(tokens):
                assert not row.any()
                continue
            read_T = torch.from_numpy((tokens[::-1] if trained.backward else tokens).astype(np.int64))
            with torch.no_grad():
                hidden, _ = trained.model(read_T[None], trained.model.initial_carry(1), None)  # type: ignore[operator]
            states_TE = hidden.raw_BTE[0].numpy()
            np.testing.assert_allclose(row, [*states_TE.mean(0), *states_TE.max(0)], atol=1e-5)
    assert States([model(), model(True)]).of_passages(texts).shape == (23, 2 * found.shape[1])


@pytest.mark.parametrize(
    "more", [(), ("run=run", "backward=back"), ("run=run", "backward=back", "tune.epochs=5", "tune.lr=0.003")]
)
def test_sections_are_learned_from_what_stands_under_headings(folder: Path, more: tuple[str, ...]) -> None:
    said = {"SOCIAL HISTORY": "He smokes a pack a day and drinks wine.", "ALLERGIES": "Penicillin gives him a rash."}
    rows = [f'{i},"{" ".join(f"{head}: {body} {i}." for head, body in said.items())}"' for i in range(120)]
    (folder / "headed.csv").write_text("id,text\n" + "\n".join(rows))
    learned(folder, f"sections={folder}/headed.csv", *more)
    text = "She smokes and drinks wine, a pack a day. " * 6 + "Fever."
    (folder / "new.csv").write_text(f"id,text\na,{json.dumps(text)}\n")
    annotate.main([f"{folder}/reader", f"{folder}/new.csv", f"concepts={folder}/fever.csv", f"out={folder}/new.jsonl"])
    [note] = schema.read(f"{folder}/new.jsonl")
    assert note.spans[0].section == note.sections[0].label == "social_history"
    assert note.sections[0].source == "learned"
    tagger = reader.Reader.load(f"{folder}/reader").tagger
    assert tagger
    assert bool(tagger.tuned) == (len(more) > 2)


def test_where_the_annotated_notes_say_enough_of_sections_the_others_count_little(folder: Path) -> None:
    smokes, rash = "He smokes a pack a day", "Penicillin gives him a rash"
    here = f"SOCIAL HISTORY: {smokes} {{0}}. ALLERGIES: {rash} {{0}}."
    there = f"ALLERGIES: {smokes} {{0}}. SOCIAL HISTORY: {rash} {{0}}."
    recipe = config.load(train.ConceptsRecipe, ["recipes/concepts/train.toml", "corpus=unread", f"out={folder}/reader"])
    headed = [there.format(i) for i in range(300)]
    for count, label in ((110, "social_history"), (20, "allergies")):
        notes = [Note(doc_id=str(i), text=here.format(i)) for i in range(count)]
        tagger = train._tagger(recipe, notes, headed, None)
        assert tagger
        assert tagger.predict([smokes])[0][0] == label
