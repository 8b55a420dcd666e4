"""Averages of the weights in the real loop: triggered, validated with, resumed to the last bit, and used later."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from corpora import tiny_corpus
from ranks import run_on_ranks

from cluster import config, storage, tracking
from pretrain import evaluate, train
from pretrain.train import TrainRecipe

# A learning rate at which validations soon no longer improve.
NT_ASGD = {"name": "sgd", "lr": 40.0, "schedule": "constant", "warmup": 0, "average": "nt-asgd", "patience": 1}
EMA = {"name": "adamw", "average": "ema", "ema_decay": 0.8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


def train_some(run: str, corpus: str, optim: dict[str, Any], stage: int) -> None:
    torch.set_num_threads(1)
    values: dict[str, Any] = {
        "run_dir": run,
        "steps": 16,
        "log_every": 1,
        "eval_every": 2,
        "save_every": 4,
        "keep": 5,
        "data": {"corpus": corpus, "lanes": 4, "bptt": 12},
        "model": {"embedding": 12, "hidden": 16, "layers": 2},
        "optim": optim,
        "engine": {"zero_stage": stage, "whole_below": 0},
        "cluster": {"workers": 0},
        "tracking": {"wandb": "disabled"},
    }
    train.train(config.validate(TrainRecipe, values, "test"))


def numbers(run: Path) -> list[tuple[Any, ...]]:
    """What a run has measured and what has happened to it, without times."""
    keys = ("step", "event", "loss", "valid_loss", "lr", "grad_norm")
    return [tuple(line.get(key) for key in keys) for line in tracking.read(str(run)) if line.get("event") != "resumed"]


def go_on_from(run: Path, step: int) -> None:
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            storage.remove(str(folder))


def state_of(run: Path, step: int) -> dict[str, Any]:
    counters: dict[str, Any] = json.loads((run / f"checkpoints/step-{step:08d}/state.json").read_text())["counters"]
    return counters


@pytest.fixture(scope="module", params=[("nt-asgd", NT_ASGD, 3), ("ema", EMA, 1)], ids=lambda param: param[0])
def finished(request: Any, tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[Path, dict[str, Any], int]:
    _, optim, stage = request.param
    run = tmp_path_factory.mktemp("run")
    run_on_ranks(2, train_some, str(run), corpus, optim, stage)
    return run, optim, stage


def test_a_resume_is_exact_and_a_lost_average_is_seen(
    finished: tuple[Path, dict[str, Any], int], corpus: str, tmp_path: Path
) -> None:
    run, optim, stage = finished
    nt_asgd = optim is NT_ASGD
    if nt_asgd:
        (line,) = [line for line in tracking.read(str(run)) if line.get("event") == "averages"]
        since = state_of(run, 16)["averaging_since"]
        assert line["step"] == since
        assert since < 12
        assert state_of(run, 4)["valid_losses"]
    at = 12 if nt_asgd else 8
    for lost in ("nothing", "average"):
        copy = Path(shutil.copytree(run, tmp_path / lost))
        go_on_from(copy, at)
        if lost == "average":
            forget_averages(copy / f"checkpoints/step-{at:08d}")
        run_on_ranks(2, train_some, str(copy), corpus, optim, stage)
        assert (numbers(copy) == numbers(run)) is (lost == "nothing")
    # What NT-ASGD has seen decides when it averages.
    if nt_asgd:
        copy = Path(shutil.copytree(run, tmp_path / "history"))
        go_on_from(copy, 4)
        edit(copy / "checkpoints/step-00000004", lambda state: state["counters"].update(valid_losses=[]))
        run_on_ranks(2, train_some, str(copy), corpus, optim, stage)
        assert state_of(copy, 16)["averaging_since"] != since


def edit(folder: Path, change: Any = lambda state: None) -> None:
    """Changes state.json, and the manifest with whatever else was changed."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    files = [
        {"name": path.name, "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    ]
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "files": files}))


def forget_averages(folder: Path) -> None:
    """Puts the newest weights in the place of their averages."""
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        for name in tensors:
            if "/average@" in name:
                tensors[name] = tensors[name.replace("/average@", "/parameter@")].clone()
        safetensors.torch.save_file(tensors, path)
    edit(folder)


def test_what_is_used_later_is_the_average(
    finished: tuple[Path, dict[str, Any], int], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, _ = finished
    evaluate.main([str(run)])
    scores = json.loads((run / "evaluation-valid.json").read_text())
    last = [line["valid_loss"] for line in tracking.read(str(run)) if "valid_loss" in line][-1]
    assert scores["loss"] == pytest.approx(last, rel=1e-6)
    capsys.readouterr()
