"""The verb from labelled CSV and a tiny language model to results.json; and what it refuses."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.errors import ConfigError, DataError
from cluster.tracking import TrackingConfig
from downstream import finetune, predict, report, work
from downstream.folds import Fold
from downstream.metrics import BINARY
from downstream.tasks import TASKS
from downstream.tasks.classify import ClassifyTask
from downstream.tasks.examples import Cohort, Example
from pretrain.models.awd_lstm import AwdLstm, AwdLstmConfig
from pretrain.run import Trained, hashed
from sharding.clean import CleanConfig
from sharding.splits import SplitConfig
from sharding.tokenizer import Tokenizer, TokenizerConfig, train

SECRET = "confidential"
COLOURS = ["red", "green", "blue"]


def write_notes(path: Path, classes: int) -> None:
    """120 notes of 60 patients: each names its colour among many other words."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "patient", "note", "colour"])
        for n in range(120):
            colour = COLOURS[(n * 7 // 3) % classes]
            table.writerow([f"n{n}", f"p{n // 2}", f"{SECRET} note {n} says {colour} and {n % 11} more", colour])


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with notes of two and three classes, and a random language model in place of every run."""
    for classes in (2, 3):
        write_notes(tmp_path / f"notes{classes}.csv", classes)
    words = Counter({"note": 120, "says": 120, "and": 120, "more": 120, SECRET: 120, **dict.fromkeys(COLOURS, 40)})
    words.update({str(n): 1 for n in range(120)})
    tokenizer = Tokenizer(train(words, TokenizerConfig(vocab_size=300, kind="bpe"), []))
    torch.manual_seed(0)
    model = AwdLstm(AwdLstmConfig(embedding=8, hidden=12, layers=2), tokenizer.vocab_size).eval()
    opened = Trained(
        run="run", step=7, model=model, tokenizer=tokenizer, clean=CleanConfig(),
        splits=SplitConfig(valid=0.25, test=0.25),
        recipe={"model": {"name": "awd-lstm", "embedding": 8, "hidden": 12, "layers": 2}, "data": {}},
        corpus_fingerprint="c0", checkpoint_sha256="w0",
    )  # fmt: skip
    monkeypatch.setattr(work, "load_trained", lambda run: opened)
    return tmp_path


def arguments(folder: Path, classes: int, *more: str) -> list[str]:
    return [
        "run=run", f"out={folder}/out{classes}", "seeds=[1, 2]", "bootstrap_draws=20",
        "stages.epochs_head=2", "stages.epochs_top=1", "stages.epochs_all=1", "head.detectors=8",
        "task.name=classify", f"task.url={folder}/notes{classes}.csv", "task.text=note", "task.label=colour",
        "task.id=id", "task.patient=patient", "tracking.wandb=disabled", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("classes", [2, 3])
def test_from_csv_to_metrics(tiny: Path, classes: int, capsys: pytest.CaptureFixture[str]) -> None:
    finetune.main(arguments(tiny, classes))
    out = tiny / f"out{classes}"
    metrics = json.loads((out / "results.json").read_text())
    assert metrics["n_train"] + metrics["n_valid"] + metrics["n_test"] == 120
    names = [*BINARY] if classes == 2 else ["accuracy", "macro_f1"]
    prefixes = ["", "scratch_", "baseline_", "difference_", "difference_scratch_"]
    for prefix in prefixes + ["majority_"] * (classes == 3):
        for name in names:
            value, low, high = (metrics[f"{prefix}{name}{end}"] for end in ("", "_low", "_high"))
            # Where the classes are apart there is no line to calibrate by.
            assert value is None or low <= value <= high
            assert value is not None or name.startswith("calibration_")
    assert metrics[f"baseline_{names[0]}"] > 0.9  # a bag of words sees the colour
    assert (out / "curves.png").exists()
    rows = pq.read_table(out / "predictions.parquet").to_pylist()
    assert len(rows) == metrics["n_test"]
    for row in rows:
        assert row["label"] in COLOURS
        given = np.atleast_1d(row["model_probability"])
        assert ((given >= 0) & (given <= 1)).all()
    assert metrics["lineage"]["model"] == {"step": 7, "weights": "w0", "corpus": "c0"}
    printed = capsys.readouterr().out
    assert SECRET not in printed + "".join(
        path.read_text(errors="replace") for path in out.rglob("*") if path.is_file()
    )
    assert "TF-IDF" in printed

    before = (out / "results.json").stat().st_mtime_ns
    finetune.main(arguments(tiny, classes))
    assert "nothing left to do" in capsys.readouterr().out
    assert (out / "results.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"belongs to other settings \(recipe.stages.lr: .*choose another out="):
        finetune.main(arguments(tiny, classes, "stages.lr=0.5"))


def test_a_table_of_folds_compares_no_scores_of_two_folds(tmp_path: Path) -> None:
    examples = [Example(str(n), f"p{n}", "red", n % 2) for n in range(40)]
    cut = [Fold(name, [], [], tested, [], frozenset()) for name, tested in (("1", examples[:20]), ("2", examples[20:]))]
    sure_N = np.array([(0.6 if n % 2 else 0.5) - 0.3 * (n < 20) for n in range(40)])  # of the first fold less sure
    systems = {"model": {"test": np.stack([1 - sure_N, sure_N], 1)}}
    cohort = Cohort(examples, ("blue", "red"))
    outcome = report.Outcome(cohort, cut, systems, {}, 20, None, TrackingConfig(wandb="disabled"))
    report.write(str(tmp_path), outcome)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["auroc"] == 1.0
    report.write(str(tmp_path), outcome._replace(folds=[cut[0]._replace(test=examples)]))
    assert json.loads((tmp_path / "results.json").read_text())["auroc"] == 0.75


def test_same_recipe_gives_the_same_numbers(tiny: Path) -> None:
    finetune.main(arguments(tiny, 2))
    finetune.main([word.replace("/out2", "/again") for word in arguments(tiny, 2)])
    assert (tiny / "out2/results.json").read_bytes() == (tiny / "again/results.json").read_bytes()
    assert pq.read_table(tiny / "out2/predictions.parquet") == pq.read_table(tiny / "again/predictions.parquet")


def test_interrupted_run_starts_again(tiny: Path) -> None:
    finetune.main(arguments(tiny, 2))
    first = (tiny / "out2/results.json").read_bytes()
    (tiny / "out2/results.json").unlink()
    finetune.main(arguments(tiny, 2))
    assert (tiny / "out2/results.json").read_bytes() == first


def test_foreign_folder_is_not_written_into(tiny: Path) -> None:
    (tiny / "out2").mkdir()
    (tiny / "out2/thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not made by finetune"):
        finetune.main(arguments(tiny, 2))


def test_long_notes_are_cut_and_counted(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune.main(arguments(tiny, 2, "max_tokens=5"))
    assert "only max_tokens=5 tokens of each are read, the last ones" in capsys.readouterr().out


def test_unknown_task_and_key_are_one_line(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="task"):
        finetune.main(arguments(tiny, 2, "task.name=mortality"))
    with pytest.raises(ConfigError, match=r"no key 'stages\.epoch_head'; the nearest is 'stages\.epochs_head'"):
        finetune.main(arguments(tiny, 2, "stages.epoch_head=3"))


def test_patient_in_two_splits_stops_the_run() -> None:
    splits = {
        "train": [Example("1", "p", "", 0), Example("2", "q", "", 1)],
        "test": [Example("3", "q", "", 0), Example("4", "r", "", 1)],
    }
    with pytest.raises(DataError, match="patient q is in train and in test"):
        work.check(splits, Cohort([], ("a", "b")))


@pytest.mark.parametrize("classes", [2, 3])
def test_new_notes_get_what_the_test_notes_got(tiny: Path, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, from the saved weights, to the last digit; a note without a word is counted, not guessed."""
    finetune.main(arguments(tiny, classes))
    opened = work.load_trained("run")
    monkeypatch.setattr(predict, "BLOCK_BYTES", 1500)
    place = tiny / f"notes{classes}.csv"
    place.write_text(place.read_text() + "blank,p0,  ,red\n")
    folder = f"{tiny}/out{classes}"
    predict.main([folder, str(place), "id=id", "text=note"])
    found = {row["id"]: row for row in csv.DictReader((tiny / f"out{classes}/predictions-notes{classes}.csv").open())}
    assert len(found) == 121
    assert (found["blank"]["class"], found["blank"]["probability"]) == ("", "")
    tested = pq.read_table(tiny / f"out{classes}/predictions.parquet").to_pylist()
    assert len(tested) > 10
    for row in tested:
        again = found[row["example_id"]]
        assert float(again["probability"]) == pytest.approx(np.max(row["model_probability"]), abs=2e-6)
        if classes == 3:
            assert again["class"] == row["model"]
    assert SECRET not in (tiny / f"out{classes}/predictions-notes{classes}.csv").read_text()
    (tiny / f"out{classes}/classifier-fold-1-seed-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"classifier-fold-1-seed-2\.safetensors: missing"):
        predict.main([folder, str(place), "id=id", "text=note"])
    monkeypatch.setattr(work, "load_trained", lambda run: replace(opened, step=8))
    with pytest.raises(ConfigError, match="was made from step 7 of run, which is at step 8 now"):
        predict.main([folder, str(place), "id=id", "text=note"])
    with pytest.raises(ConfigError, match="holds no finished classifier"):
        predict.main([str(tiny), str(place)])
    with pytest.raises(ConfigError, match="predict what"):
        predict.main([folder])


def test_a_leak_stops_the_verb(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = work.load_trained("run")
    everyone = frozenset(hashed(f"p{n}") for n in range(60))
    monkeypatch.setattr(work, "load_trained", lambda run: replace(opened, patients={"train": everyone}))
    with pytest.raises(DataError, match="the language model has read"):
        finetune.main(arguments(tiny, 2))
    finetune.main([word.replace("/out2", "/others") for word in arguments(tiny, 2, "others=true")])
    assert (tiny / "others/results.json").exists()


def test_a_copied_note_stops_the_verb(tiny: Path) -> None:
    """The same long text under two patients; it is said by ids, without the text."""
    place = tiny / "notes2.csv"
    text = " ".join(f"{SECRET} word{n}" for n in range(60))
    rows = "".join(f"copy{n},px{n},{text} {n},{COLOURS[n % 2]}\n" for n in range(30))
    place.write_text(place.read_text() + rows)
    with pytest.raises(DataError, match=r"notes are nearly the same as one of another split, such as copy") as stopped:
        finetune.main(arguments(tiny, 2))
    assert SECRET not in str(stopped.value)
    finetune.main([word.replace("/out2", "/copies") for word in arguments(tiny, 2, "copies=true")])


def test_split_without_both_classes_stops_the_run() -> None:
    splits = {"train": [Example("1", "p", "", 0), Example("2", "q", "", 1)], "test": [Example("3", "r", "", 0)]}
    with pytest.raises(DataError, match=r"no test note has the class 'b' \(1 notes in all\)"):
        work.check(splits, Cohort([], ("a", "b")))


def test_run_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    recipe = ["task.name=readmission", f"task.tables={tmp_path}", f"run={tmp_path}"]
    with pytest.raises(ConfigError, match="is not a run directory"):
        finetune.main(recipe)


def test_same_text_counts_once_and_only_with_one_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.csv"
    path.write_text(
        "id,text,kind\n1,knee  pain, ortho \n2,knee pain,ortho\n3,knee pain,LETTER\n"  # one distinct label
        "4,chest pain,cardio\n5,chest pain,lungs\n6,cough,lungs\n7,ankle,ortho\n8,,ortho\n9,rash,skin\n"
    )
    task = ClassifyTask(
        url=str(path), text="text", label="kind", id="id", drop_labels=("LETTER ",), classes=("lungs", "ortho")
    )
    cohort = task.cohort(CleanConfig())
    assert [(e.example_id, e.label) for e in cohort.examples] == [("1", 1), ("6", 0), ("7", 1)]
    assert len({e.patient_id for e in cohort.examples}) == 3
    assert "more than one label" in capsys.readouterr().out
    assert task.model_copy(update={"classes": None, "top": 2}).cohort(CleanConfig()).classes == ("ortho", "lungs")
    with pytest.raises(DataError, match="1 class in column kind is left"):
        task.model_copy(update={"min_count": 2}).cohort(CleanConfig())
    with pytest.raises(DataError, match="no note has the label 'teeth' alone"):
        task.model_copy(update={"classes": ("teeth", "ortho")}).cohort(CleanConfig())
    path.write_text("id,text,kind\n")
    with pytest.raises(DataError):
        task.model_copy(update={"classes": None}).cohort(CleanConfig())


@pytest.mark.parametrize("name", TASKS)
def test_task_is_named_as_in_the_registry(name: str) -> None:
    assert TASKS[name].model_fields["name"].default == name
