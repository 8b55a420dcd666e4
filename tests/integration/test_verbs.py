"""Every verb works for every other model as it does for AWD-LSTM, on which the tests of each verb run."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import SMALL_MODELS, notes, tiny_corpus
from ranks import run_on_ranks
from threadpoolctl import threadpool_limits

from cluster import config
from pretrain import compare, evaluate, find_lr, generate, train
from pretrain.models import MODELS

# What a model can do otherwise with the same weights.
OTHERWISE = {"transformer-xl": ["model.memory=20", "model.same_length=true"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), train_notes=30)


def trained(run: str, corpus: str, name: str, **changes: Any) -> None:
    torch.set_num_threads(1)
    data = {"corpus": corpus, "lanes": 8, "bptt": 14, "backward": changes.pop("backward", False)}
    values = {"run_dir": run, "steps": 60, "data": data, "model": {"name": name, **SMALL_MODELS[name]}}
    values |= {"cluster": {"workers": 0}, "tracking": {"wandb": "disabled"}, **changes}
    train.train(config.validate(train.TrainRecipe, values, "test"))


def searched(run: str, corpus: str, name: str) -> None:
    torch.set_num_threads(1)
    model = ", ".join([f'name = "{name}"', *(f"{key} = {value}" for key, value in SMALL_MODELS[name].items())])
    small = ["data.lanes=8", "data.bptt=14", "cluster.workers=0", "steps=20"]
    find_lr.main([f"run_dir={run}", f"data.corpus={corpus}", f"model={{{model}}}", *small])


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"awd-lstm"}))
def test_every_verb(tmp_path: Path, corpus: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    from downstream import finetune  # not above, where every rank would import it

    run, backward, again, lr = (str(tmp_path / part) for part in ("forward", "backward", "again", "lr"))
    # Each in a process of its own: DeepSpeed enters one process group in its life.
    run_on_ranks(1, functools.partial(trained, run, corpus, name))
    run_on_ranks(1, functools.partial(trained, backward, corpus, name, backward=True))
    run_on_ranks(1, functools.partial(trained, again, corpus, name, steps=3, init_from=run))
    run_on_ranks(1, searched, lr, corpus, name)
    evaluate.main([run])
    evaluate.main([run, "bptt=7", *OTHERWISE[name]])
    evaluate.main([run, again])
    compare.main([run, backward])
    generate.main([run, "prompt=patient denies", "tokens=12", "samples=2"])
    with open(tmp_path / "notes.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "patient", "note", "label"])
        for number, text in enumerate(notes(7, 120)):
            rows.writerow([number, f"p{number}", text, "long" if len(text) > 330 else "short"])
    task = ["task.name=classify", f"task.url={tmp_path}/notes.csv", "task.text=note", "task.label=label", "task.id=id"]
    stages = ["stages.epochs_head=1", "stages.epochs_top=1", "stages.epochs_all=1", "seeds=[1]", "bootstrap_draws=20"]
    task += ["task.patient=patient", "tracking.wandb=disabled"]
    finetune.main([f"run={run}", f"out={tmp_path}/finetuned", f"backward={backward}", *task, *stages])
    # In folds, as Ray tasks and one after the other: the same numbers, by as many threads (a Ray task has one).
    quick = ["mode=frozen", "folds=2", "frozen.topics=5", "bootstrap_draws=20", "others=true", "copies=true"]
    read = ["lm.epochs=1", "lm.lanes=2"]  # the language model reads the notes of the other folds first
    for out, workers in (("ray", 2), ("here", 0)):
        capfd.readouterr()
        with threadpool_limits(1):
            finetune.main([f"run={run}", f"out={tmp_path}/{out}", f"workers={workers}", *task, *quick, *read])
        said = capfd.readouterr().out
        assert "fold-1-scratch-seed-1, reading: done in" in said  # also where it was a task that said so
        assert "fold-1-scratch-seed-1: chosen by cross-validation: C " in said
        assert not workers or "fold 2: LM fine-tuning: done in" in said
    assert (tmp_path / "ray/results.json").read_bytes() == (tmp_path / "here/results.json").read_bytes()
    kept = {path.name: json.loads(path.read_text()) for path in (tmp_path / "forward").glob("evaluation-*.json")}
    otherwise = "-".join(["bptt=7", *(f"{word[6:]}".replace("true", "True") for word in OTHERWISE[name])])
    assert set(kept) == {
        "evaluation-valid.json",
        f"evaluation-valid-{otherwise}.json",
        "evaluation-valid-ensemble.json",
    }
    assert len({scores["tokens"] for scores in kept.values()}) == 1  # cut otherwise, the same tokens
    assert all(0 < scores["bits_per_byte"] < 8 for scores in kept.values())
    assert list((tmp_path / "forward/samples").iterdir())
    assert (tmp_path / "lr/plots/find-lr.png").exists()
    assert "auroc" in json.loads((tmp_path / "finetuned/results.json").read_text())
