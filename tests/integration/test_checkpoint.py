"""Checkpoints with the real engine, in one process and on two gloo ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import tiny_corpus
from ranks import run_on_ranks

from cluster import config, storage, tracking
from cluster.errors import ConfigError
from pretrain import checkpoint, train
from pretrain.run import load_trained
from pretrain.train import TrainRecipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


def recipe(run: Path, corpus: str, **changes: Any) -> TrainRecipe:
    values: dict[str, Any] = {
        "run_dir": str(run),
        "steps": 12,
        "log_every": 1,
        "eval_every": 6,
        "save_every": 4,
        "keep": 3,
        "data": {"corpus": corpus, "lanes": 4, "bptt": 12},
        "model": {"embedding": 12, "hidden": 16, "layers": 2},
        "cluster": {"workers": 0},
        "tracking": {"wandb": "disabled"},
    }
    return config.validate(TrainRecipe, values | changes, "test")


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in tracking.read(str(run)) if "loss" in line}


def forget_after(run: Path, step: int) -> None:
    """What a kill leaves when `step` was the last save: later checkpoints never came to be."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            storage.remove(str(folder))


def train_some(run: str, corpus: str, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    train.train(recipe(Path(run), corpus, **changes))


LONG = [pytest.param(stage, kind, marks=pytest.mark.slow) for stage, kind in ((0, "fp32"), (2, "fp32"), (1, "bf16"))]


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), *LONG])
def test_resume_is_exact_to_the_last_bit(tmp_path: Path, corpus: str, stage: int, precision: str) -> None:
    """Two gloo ranks; the steps after the checkpoint are done twice, by processes that never met."""
    engine = {"engine": {"zero_stage": stage, "precision": precision, "timeout_seconds": 60}}
    run_on_ranks(2, train_some, str(tmp_path), corpus, engine)
    unbroken = losses(tmp_path)
    final = (tmp_path / "checkpoints/step-00000012/tensors-00000.safetensors").read_bytes()
    forget_after(tmp_path, 4)
    run_on_ranks(2, train_some, str(tmp_path), corpus, engine)
    assert losses(tmp_path) == unbroken
    assert len(unbroken) == 12
    assert (tmp_path / "checkpoints/step-00000012/tensors-00000.safetensors").read_bytes() == final


def test_goes_on_with_another_number_of_workers_and_another_stage(tmp_path: Path, corpus: str) -> None:
    run_on_ranks(2, train_some, str(tmp_path), corpus, {})
    unbroken = losses(tmp_path)
    forget_after(tmp_path, 4)
    run_on_ranks(1, train_some, str(tmp_path), corpus, {"engine": {"zero_stage": 0}})
    resumed = losses(tmp_path)
    assert resumed.keys() == unbroken.keys()
    for step, loss in unbroken.items():
        assert resumed[step] == pytest.approx(loss, rel=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    run = tmp_path_factory.mktemp("run")
    run_on_ranks(1, train_some, str(run), corpus, {})
    return run


def copy_of(run: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, target / "copy"))


def test_run_again_changes_nothing(finished: Path, tmp_path: Path, corpus: str) -> None:
    run = copy_of(finished, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    run_on_ranks(1, train_some, str(run), corpus, {})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_alone_leaves_no_trace_in_the_environment(finished: Path, corpus: str) -> None:
    """RANK in the environment would make every later `pretrain` of this process take itself for torchrun's."""
    import os

    with pytest.raises(ConfigError):
        train.train(recipe(finished, corpus, seed=2))
    assert "RANK" not in os.environ
    assert "MASTER_ADDR" not in os.environ


def test_files_of_a_run(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"recipe.toml", "metrics.jsonl", "run.json", "tokenizer.model", "checkpoints"}
    assert storage.names(str(finished / "checkpoints")) == ["step-00000004", "step-00000008", "step-00000012"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    finished: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(finished, tmp_path)
    newest = run / "checkpoints/step-00000012"
    tensors = newest / "tensors-00000.safetensors"
    data = bytearray(tensors.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif damage == "truncate":
        tensors.write_bytes(data[:-1])
    elif damage == "remove":
        tensors.unlink()
    elif damage == "state":
        state = newest / "state.json"
        state.write_text(state.read_text().replace('"step": 12', '"step": 13'))
    else:
        (newest / "manifest.json").unlink()
    assert checkpoint.newest(str(run)) == str(run / "checkpoints/step-00000008")
    assert load_trained(str(run)).step == 8
    if damage != "no manifest":
        assert "step-00000012: passed over" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("lost", ["carry", "exp_avg", "optimizer_step"])
def test_a_loss_of_state_is_seen(finished: Path, corpus: str, tmp_path: Path, lost: str) -> None:
    """The proof of exactness can fail: without one part of the state the next losses differ."""
    import hashlib

    import safetensors.torch

    run = copy_of(finished, tmp_path)
    forget_after(run, 4)
    folder = run / "checkpoints/step-00000004"
    tensors = safetensors.torch.load_file(folder / "tensors-00000.safetensors")
    for name, tensor in tensors.items():
        if (lost == "carry" and name.startswith("carry/")) or (lost == "exp_avg" and name.endswith("/exp_avg")):
            tensor.zero_()
    safetensors.torch.save_file(tensors, folder / "tensors-00000.safetensors")
    if lost == "optimizer_step":
        state = json.loads((folder / "state.json").read_text())
        state["counters"]["optimizer_step"] = 0
        (folder / "state.json").write_text(json.dumps(state))
    files = [
        {"name": path.name, "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in (folder / "tensors-00000.safetensors", folder / "state.json")
    ]
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "files": files}))
    moved = recipe(run, corpus)
    unbroken = losses(finished)
    run_on_ranks(1, train_some, str(run), corpus, {})
    assert moved.steps == 12
    assert losses(run)[12] != unbroken[12]


def test_another_recipe_is_refused_with_the_key(finished: Path, corpus: str) -> None:
    with pytest.raises(ConfigError, match=r"belongs to another run \(recipe.optim.lr: 0.005 → 0.01\)"):
        train.train(recipe(finished, corpus, optim={"lr": 0.01}))


def test_another_corpus_is_refused(finished: Path, tmp_path: Path) -> None:
    other = tiny_corpus(tmp_path / "other", seed=9)
    with pytest.raises(ConfigError, match="belongs to another run"):
        train.train(recipe(finished, other))


def test_a_second_process_cannot_train_in_the_same_directory(tmp_path: Path) -> None:
    from pretrain.run import held

    with held(str(tmp_path)), pytest.raises(ConfigError, match="another process is training in it"):
        with held(str(tmp_path), patience_seconds=0.3):
            pass
