"""The status task finds what is asked about, says so to the model, and its page shows where the model looks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.errors import ConfigError, DataError
from downstream import explain, finetune, lm, parts, predict, work
from downstream.frozen import Frozen
from downstream.reading import PLAIN, TellConfig, encode, places_of_tokens, words_of
from downstream.tasks.examples import Example
from downstream.tasks.status import StatusTask
from pretrain.models.awd_lstm import AwdLstm, AwdLstmConfig
from pretrain.run import Trained
from sharding.clean import CleanConfig, cleaned_around
from sharding.splits import SplitConfig
from sharding.tokenizer import Tokenizer, TokenizerConfig, train

LOWER = CleanConfig(case="lower")
PAST, NOW = "years ago he had", "today there is new"


def tokenizer() -> Tokenizer:
    words = "years ago he had today there is new shingles zoster note of patient with cough and pain [ ] : , .".split()
    counts = dict.fromkeys([*words, *map(str, range(200))], 10)
    return Tokenizer(train(counts, TokenizerConfig(vocab_size=330, kind="bpe"), []))


def write(path: Path) -> None:
    """100 notes of 100 patients that mention shingles or zoster, and some that do not."""
    with path.open("w") as file:
        for n in range(110):
            said, label = ((PAST, "past"), (NOW, "current"))[n % 2]
            what = ("Shingles", "herpes zoster")[n % 3 == 0] if n < 100 else "cough"
            text = f"Note {n} of patient {n}. With cough {said} {what}, and pain with cough {n % 7}."
            file.write(json.dumps({"id": f"n{n}", "patient": f"p{n}", "text": text, "label": label}) + "\n")


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Notes, and a random language model in place of every run."""
    write(tmp_path / "notes.jsonl")
    torch.manual_seed(0)
    known = tokenizer()
    settings = {"embedding": 16, "hidden": 24, "layers": 2}
    opened = Trained(
        run=str(tmp_path / "run"), step=7, tokenizer=known, clean=LOWER, splits=SplitConfig(valid=0.25, test=0.25),
        model=AwdLstm(AwdLstmConfig(**settings), known.vocab_size).eval(),
        recipe={"model": {"name": "awd-lstm", **settings}, "data": {}}, corpus_fingerprint="c", checkpoint_sha256="w",
    )  # fmt: skip
    monkeypatch.setattr(work, "load_trained", lambda run: opened)
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "run=run", f"out={folder}/out", "seeds=[1]", "bootstrap_draws=20", "tracking.wandb=disabled",
        "task.name=status", f"task.url={folder}/notes.jsonl", "task.patient=patient", "task.concept=herpes zoster",
        'task.synonyms=["shingles", "zoster"]', *more,
    ]  # fmt: skip


STAGES = (
    'head.pooling=["attention", "max", "last"]', "stages.epochs_head=25", "stages.epochs_top=0", "stages.epochs_all=6",
    "stages.lr=1e-2", "stages.weight_decay=0.01", "head.dropout=0.1", "tell.window=8",
)  # fmt: skip


def task(**keys: object) -> StatusTask:
    return StatusTask.model_validate({"url": "x", "concept": "herpes zoster", "synonyms": ("shingles",), **keys})


def test_mentions_by_name_or_by_pattern() -> None:
    found = task().ask("n", "no shingles-like rash . herpes zoster in 2015 , postherpes zoster")
    assert found is not None
    assert [found.text[a:b] for a, b in found.mentions] == ["shingles", "herpes zoster"]
    assert found.query == "herpes zoster , shingles"
    assert task().ask("n", "cough") is None
    found = task(patterns=(r"vzv\w*",)).ask("n", "shingles, VZV-IgG")
    assert found is not None
    assert found.mentions == ((10, 13),)
    with pytest.raises(ConfigError, match=r"task.patterns: .* in '\('"):
        task(patterns=("(",)).ask("n", "x")
    with pytest.raises(ConfigError, match=r"task\.concept: is empty"):
        task(concept="", synonyms=()).ask("n", "x")


def test_spans_follow_the_cleaned_text() -> None:
    raw = "He  had\n(Asthma), then  ASTHMA again"
    spans = [(raw.index("Asthma"), raw.index("Asthma") + 6), (raw.index("ASTHMA"), raw.index("ASTHMA") + 6)]
    cleaned, places = cleaned_around(raw, spans, LOWER)
    assert cleaned == "he had\n(asthma), then asthma again"
    assert [cleaned[a:b] for a, b in places] == ["asthma", "asthma"]


def annotated(path: Path, spans: list[dict[str, object]]) -> StatusTask:
    path.write_text(json.dumps({"doc_id": "d", "text": "confidential asthma", "spans": spans}) + "\n")
    return StatusTask(url=str(path), attribute="status")


def test_bad_spans_are_named_without_the_text(tmp_path: Path) -> None:
    outside = [{"id": "T1", "start": 13, "end": 99, "attributes": {"status": "PAST"}}]
    with pytest.raises(DataError, match="note d, span T1: 13 to 99 of 19 characters") as stopped:
        annotated(tmp_path / "a.jsonl", outside).cohort(LOWER)
    assert "confidential" not in str(stopped.value)
    twice = [{"id": f"T{n}", "start": 13, "end": 19 - n, "attributes": {"status": "PAST"}} for n in range(2)]
    with pytest.raises(DataError, match="span T0 overlaps the one before it"):
        annotated(tmp_path / "b.jsonl", twice).cohort(LOWER)


def test_what_the_model_is_told() -> None:
    """The question, marks round the mention, its window; and every token knows its word."""
    known = tokenizer()
    text = "he had (shingles), years ago\nwith pain"
    example = Example("n", "p", text, 0, ((8, 16),), "zoster , shingles")
    [note] = encode(known, [example], 100, TellConfig(window=2))
    start, end = note.mentions[0]
    assert known.decode(note.tokens[start:end].tolist()).replace(" ", "") == "(shingles),"
    assert known.decode(note.tokens[:start].tolist()).strip().endswith("[")
    assert known.decode(note.tokens[end:].tolist()).strip().startswith("]")
    assert note.near == ((start - 2, end + 2),)
    assert known.decode(note.tokens[:start].tolist()).replace(" ", "").startswith("zoster,shingles:hehad")
    places = places_of_tokens(known, example, note, TellConfig(window=2))
    assert {text[a:b] for a, b in places if a >= 0} == {text[a:b] for a, b in words_of(text)}
    assert places[start] == (7, 18)
    [plain] = encode(known, [example], 100, PLAIN)
    assert plain.tokens.tolist() == known.encode([text])[0].tolist()
    back = note.reversed()
    assert back.tokens[back.mentions[0][0] : back.mentions[0][1]].tolist() == note.tokens[start:end][::-1].tolist()


def test_a_long_note_is_read_from_the_window_of_its_mention_on() -> None:
    known = tokenizer()
    text = "cough " * 50 + "shingles " + "pain " * 50
    example = Example("n", "p", text.strip(), 0, ((300, 308),), "shingles")
    [note] = encode(known, [example], 20, TellConfig(query=False, markers=False, window=5))
    start, end = note.mentions[0]
    assert known.decode(note.tokens[start:end].tolist()).strip() == "shingles"
    assert len(note.tokens) == 20
    assert note.near[0][0] == 0


def test_told_where_to_look_it_learns_and_shows_where(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune.main(arguments(notes, *STAGES))
    results = json.loads((notes / "out/results.json").read_text())
    assert results["auroc"] > 0.9
    assert {"baseline_auroc", "untold_auroc", "scratch_auroc"} <= results.keys()
    assert "no mention" in capsys.readouterr().out
    note = notes / "new.txt"
    note.write_text("A patient with cough. Years ago he had SHINGLES and pain. <script>x</script>")
    explain.main([f"{notes}/out", str(note)])
    said = capsys.readouterr().out
    assert "of the attention lies on 1 mentions" in said
    page = (notes / "out/explanation-new.html").read_text()
    assert "shingles" in page
    assert "<script>x" not in page
    predictor = predict.Predictor(f"{notes}/out")
    example = predictor.example("n", note.read_text())
    assert example is not None
    found = explain.explanation(predictor, example)
    assert sum(weight for *_, weight in found.attention) == pytest.approx(1)
    [(first, last)] = found.mentions
    on = sum(weight for start, end, weight in found.attention if start < last and end > first)
    assert on > 3 / len(words_of(found.text))  # it looks there, three times more than evenly
    note.write_text("cough")
    with pytest.raises(DataError, match="has no mention of what is asked"):
        explain.main([f"{notes}/out", str(note)])
    with pytest.raises(ConfigError, match="explain what"):
        explain.main([f"{notes}/out"])


def test_frozen_features_in_folds_and_on_new_notes(notes: Path) -> None:
    """Every note is tested once, by a model that has not seen it; predict without a mention says nothing."""
    more = ["mode=frozen", "folds=4", "frozen.topics=10", "conformal=0.2"]
    finetune.main(arguments(notes, *more))
    rows = pq.read_table(notes / "out/predictions.parquet").to_pylist()
    assert sorted(row["patient_id"] for row in rows) == sorted(f"p{n}" for n in range(100))
    assert {row["fold"] for row in rows} == {"1", "2", "3", "4"}
    results = json.loads((notes / "out/results.json").read_text())
    assert results["auroc"] > 0.9
    assert results["conformal"]["overall"] >= 0.7
    table = notes / "new.csv"
    table.write_text(f"ROW_ID,TEXT\n1,{PAST} shingles and pain\n2,{NOW} shingles and pain\n3,cough\n")
    predict.main([f"{notes}/out", str(table)])
    lines = (notes / "out/predictions-new.csv").read_text().splitlines()[1:]
    assert [line.split(",")[1] for line in lines] == ["past", "current", ""]
    with pytest.raises(ConfigError, match='mode="frozen" has no attention'):
        predict.Predictor(f"{notes}/out").classifier(predict.Predictor(f"{notes}/out").parts[0])


def test_of_repeats_the_first_one_s_classifiers_are_kept(notes: Path) -> None:
    finetune.main(arguments(notes, "mode=frozen", "folds=2", "repeats=2", "scratch=false", "frozen.topics=5"))
    assert {path.name for path in (notes / "out").glob("classifier-*")} == {
        "classifier-fold-1-seed-1.npz", "classifier-fold-2-seed-1.npz",
    }  # fmt: skip
    predictor = predict.Predictor(f"{notes}/out")
    example = predictor.example("n", f"{PAST} shingles and pain")
    assert example is not None
    assert predictor.classes[predictor([example])[0].argmax()] == "past"
    rows = pq.read_table(notes / "out/predictions.parquet").to_pylist()
    assert len(rows) == 200
    assert len({row["fold"] for row in rows if row["patient_id"] == "p0"}) == 2


def test_a_language_model_reads_new_notes_once_and_only_where_its_states_count(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three folds on one model; with a model of their own each reads. What is said does not depend on it."""
    finetune.main(arguments(notes, "mode=frozen", "folds=3", "scratch=false", "frozen.topics=5"))
    read, real = [], predict.pooled_states
    monkeypatch.setattr(predict, "pooled_states", lambda *args: (read.append(len(args[1])), real(*args))[1])
    predictor = predict.Predictor(f"{notes}/out")
    asked = [one for one in (predictor.example("n", f"{said} shingles and pain") for said in (PAST, NOW)) if one]
    for counts, models in (([True, True, True], 1), ([False, True, False], 1), ([False] * 3, 0)):
        for (_, frozen), count in zip(predictor._made.values(), counts, strict=True):
            assert frozen is not None
            frozen.arrays["scale"] = np.array(float(count))
        read.clear()
        found = predictor(asked)
        assert read == [2] * models
        monkeypatch.setattr(Frozen, "reads", True)
        predictor._tuned = {part: part.name for part in predictor.parts}
        np.testing.assert_array_equal(predictor(asked), found)
        assert len(read) == models + 3
        monkeypatch.undo()
        monkeypatch.setattr(predict, "pooled_states", lambda *args: (read.append(len(args[1])), real(*args))[1])
        predictor._tuned = dict.fromkeys(predictor.parts)


def test_what_was_done_is_not_done_again(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after two parts, the same command trains the others only and gives the same numbers."""
    args = arguments(notes, "mode=frozen", "folds=3", "frozen.topics=10")
    finetune.main([word.replace("/out", "/whole") for word in args])
    real, done = parts.train_part, []

    def interrupted(whole: work.Work, part: work.Part) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(part.name)
        real(whole, part)

    monkeypatch.setattr(parts, "train_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(args)
    again: list[str] = []
    monkeypatch.setattr(parts, "train_part", lambda whole, part: (again.append(part.name), real(whole, part)))
    finetune.main(args)
    assert not set(done) & set(again)
    assert len(done) + len(again) == 6
    assert (notes / "out/results.json").read_bytes() == (notes / "whole/results.json").read_bytes()


def test_the_language_model_reads_the_target_text_but_not_what_is_tested(notes: Path) -> None:
    """Its weights are kept by what it has read; no text of a held-out patient is among it."""
    lm = ["lm.epochs=1", "lm.lanes=2", "lm.bptt=8", f"lm.notes={notes}/notes.jsonl"]
    finetune.main(arguments(notes, "mode=frozen", "folds=3", "scratch=false", "frozen.topics=5", *lm, "copies=true"))
    kept = list((notes / "run/finetune/lm").iterdir())
    assert len(kept) == 3
    whole = work.Work(
        SimpleNamespace(), "", [], SimpleNamespace(examples=[]), [], [("p1", "one"), ("p2", "two"), ("p3", "one")]
    )  # type: ignore[arg-type]
    fold = SimpleNamespace(held_out={"p2"})
    assert work.lm_notes(whole, fold) == [("p3", "one")]  # type: ignore[arg-type]
    predictor = predict.Predictor(f"{notes}/out")
    moved = predictor._made[predictor.parts[0]][0].state_dict()["encoder.embedding.weight"]
    assert not np.allclose(moved, predictor.models[0].model.state_dict()["embedding.weight"])


def test_a_reading_that_is_interrupted_goes_on_as_if_it_had_not_been(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of two passes, within it; the weights are the same to the last bit."""
    (model,) = work.open_models(f"{notes}/run", None)
    texts = [f"{PAST} shingles and pain"] * 9 + ["no cough and no fever today"] * 8
    settings = lm.LmConfig(epochs=2, lanes=2, bptt=8)
    name = lm.tuned(replace(model, run=f"{tmp_path}/whole"), settings, texts, 1)
    monkeypatch.setattr(lm, "SAVE_SECONDS", 0.0)
    seen, steps = 0, []

    def killed(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 13:
            raise KeyboardInterrupt

    real = lm.Masks
    monkeypatch.setattr(lm, "Masks", lambda *args: (steps.append(args[1]), killed(), real(*args))[2])
    cut = replace(model, run=f"{tmp_path}/cut")
    with pytest.raises(KeyboardInterrupt):
        lm.tuned(cut, settings, texts, 1)
    assert steps == list(range(13))
    assert lm.tuned(cut, settings, texts, 1) == name
    assert steps[13:] == list(range(12, len(steps) - 1))
    whole, again = (Path(lm.place_of(one, name)).read_bytes() for one in (replace(model, run=f"{tmp_path}/whole"), cut))
    assert whole == again
    assert [path.name for path in Path(lm.place_of(cut, name)).parent.iterdir()] == [name]


def test_keys_that_contradict_each_other(notes: Path) -> None:
    for more, said in (
        (["folds=1"], "folds: give 2 or more"),
        (["labels=50"], "labels: needs folds=5"),
        (["repeats=2"], "repeats: needs folds=5"),
        (["folds=3", "labels=900"], "labels=900: fold 1 has only"),
        (["folds=3", "conformal=0.001"], "conformal"),
    ):
        with pytest.raises(ConfigError, match=said):
            finetune.main([*arguments(notes, *more), f"out={notes}/{len(said)}{more[0][-1]}"])
