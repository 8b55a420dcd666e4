"""Checkpoints with the real engine, in one process and on two gloo ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import tiny_corpus
from ranks import run_on_ranks

from cluster import config, storage, tracking
from cluster.errors import ConfigError, StorageError, TrainingError
from pretrain import checkpoint, faults, train
from pretrain.run import hashed, known_patients, load_trained
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


LONG = ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16"))


@pytest.mark.parametrize(
    ("stage", "precision"), [(2, "bf16"), *(pytest.param(*long, marks=pytest.mark.slow) for long in LONG)]
)
def test_resume_is_exact_to_the_last_bit(tmp_path: Path, corpus: str, stage: int, precision: str) -> None:
    """Two gloo ranks; the steps after the checkpoint are done twice, by processes that never met."""
    engine = {"engine": {"zero_stage": stage, "precision": precision, "whole_below": 0}}
    run_on_ranks(2, train_some, str(tmp_path), corpus, engine)
    unbroken = losses(tmp_path)
    final = (tmp_path / "checkpoints/step-00000012/tensors-00000.safetensors").read_bytes()
    forget_after(tmp_path, 4)
    run_on_ranks(2, train_some, str(tmp_path), corpus, engine)
    assert losses(tmp_path) == unbroken
    assert len(unbroken) == 12
    assert (tmp_path / "checkpoints/step-00000012/tensors-00000.safetensors").read_bytes() == final


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
    assert names >= {"recipe.toml", "metrics.jsonl", "run.json", "patients.json", "tokenizer.model", "checkpoints"}
    read = known_patients(str(finished))
    assert {split: len(patients) for split, patients in read.items()} == {"train": 60, "valid": 12}
    assert hashed("train-0-0") in read["train"]
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
        if (lost == "carry" and name.startswith("carry/")) or (lost == "exp_avg" and "/exp_avg@" in name):
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


def steps_left(run: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").iterdir())


def test_the_newest_the_best_and_the_permanent_stay(tmp_path: Path, corpus: str) -> None:
    changes = {"steps": 30, "save_every": 2, "eval_every": 4, "keep": 2, "keep_best": 2, "keep_every": 10}
    run_on_ranks(1, train_some, str(tmp_path), corpus, changes | {"optim": {"lr": 0.3, "clip": 100}})
    valid = {line["step"]: line["valid_loss"] for line in tracking.read(str(tmp_path)) if "valid_loss" in line}
    best = sorted((loss, step) for step, loss in valid.items() if step % 2 == 0 and step > 0)[:2]
    assert steps_left(tmp_path) == sorted({28, 30, 10, 20, *(step for _, step in best)})
    assert {line["step"] for line in tracking.read(str(tmp_path)) if "valid_loss/Nursing" in line} == set(valid)


def test_weights_of_another_run_with_another_vocabulary(finished: Path, tmp_path: Path) -> None:
    """init_from: rows of tokens that both vocabularies have are taken over, others get the mean row."""
    other = tiny_corpus(tmp_path / "other", seed=5, vocab_size=323)
    run = tmp_path / "run"
    run_on_ranks(1, train_some, str(run), other, {"init_from": str(finished), "steps": 1, "optim": {"lr": 1e-12}})
    before, after = load_trained(str(finished)), load_trained(str(run))
    for name, parameter in after.model.named_parameters():
        old = dict(before.model.named_parameters())[name]
        if name not in after.model.BY_TOKEN:  # type: ignore[operator]
            torch.testing.assert_close(parameter, old, atol=1e-6, rtol=1e-6)
    place_of = {piece: place for place, piece in enumerate(before.tokenizer.pieces())}
    old_rows, new_rows = before.model.embedding.weight, after.model.embedding.weight  # type: ignore[union-attr]
    shared = [(place_of[piece], row) for row, piece in enumerate(after.tokenizer.pieces()) if piece in place_of]
    fresh = [row for row, piece in enumerate(after.tokenizer.pieces()) if piece not in place_of]
    assert len(shared) > 50
    assert fresh
    assert any(old != new for old, new in shared)
    old, new = (torch.tensor(places) for places in zip(*shared, strict=True))
    torch.testing.assert_close(new_rows[new], old_rows[old], atol=1e-6, rtol=1e-6)  # type: ignore[index]
    mean = old_rows.mean(0).expand(len(fresh), -1)  # type: ignore[operator]
    torch.testing.assert_close(new_rows[torch.tensor(fresh)], mean, atol=1e-6, rtol=1e-6)  # type: ignore[index]
    (first,) = [line["valid_loss"] for line in tracking.read(str(run)) if line["step"] == 0 and "valid_loss" in line]
    assert first < 5.75  # an untrained model of 323 tokens scores 5.78


def refused(run: str, corpus: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, StorageError, TrainingError), match=message):
        train_some(run, corpus, changes)


def test_init_from_what_does_not_fit(finished: Path, tmp_path: Path, corpus: str) -> None:
    larger = {"model": {"embedding": 12, "hidden": 20, "layers": 2}, "init_from": str(finished)}
    message = r"layers\.0\.weight_ih has shape \(64, 12\), here it is \(80, 12\)"
    run_on_ranks(1, refused, str(tmp_path / "a"), corpus, larger, message)
    run_on_ranks(1, refused, str(tmp_path / "b"), corpus, {"init_from": str(tmp_path)}, "has no checkpoint; give the")


def test_the_forward_check_must_come_out_again(tmp_path: Path, corpus: str) -> None:
    run_on_ranks(1, train_some, str(tmp_path), corpus, {})
    forget_after(tmp_path, 8)
    run_on_ranks(1, with_another_forward, str(tmp_path), corpus)


def with_another_forward(run: str, corpus: str) -> None:
    """Software that loads the same weights and computes something else."""
    from pretrain.models.awd_lstm import AwdLstm
    from pretrain.models.output import Level

    wanted = AwdLstm.softmax
    AwdLstm.softmax = lambda self: [Level(w * 1.5, b * 1.5) for w, b, _ in wanted(self)]  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="on the stored check"):
        load_trained(run)
    refused(run, corpus, {}, "on the stored check")


def with_stalled_storage(run: str, corpus: str) -> None:
    import time

    written = storage.write_json

    def stalls(url: str, value: Any) -> None:
        if url.endswith("step-00000008/manifest.json"):
            time.sleep(3600)
        written(url, value)

    storage.write_json = stalls
    refused(
        run, corpus, {"engine": {"timeout_seconds": 10}}, "storage took longer than 10 s .*the one before it is good"
    )


def test_storage_that_stalls_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path: Path, corpus: str) -> None:
    run_on_ranks(1, with_stalled_storage, str(tmp_path), corpus)
    assert checkpoint.newest_step(str(tmp_path)) == 4


def with_slow_retirement(run: str, corpus: str) -> None:
    import time

    retire = checkpoint.retire

    def late(*args: Any) -> None:
        time.sleep(1)
        retire(*args)

    checkpoint.retire = late
    train_some(run, corpus, {})


def test_a_save_waits_until_the_one_before_has_cleared_away(tmp_path: Path, corpus: str) -> None:
    """Or the first worker, late in closing step 4, would take what the second has written of step 8 for a leftover."""
    run_on_ranks(2, with_slow_retirement, str(tmp_path), corpus)
    assert [checkpoint.verify(checkpoint.folder_of(str(tmp_path), step)) for step in (4, 8, 12)] == [None] * 3


def as_ray_starts_it(run: str, corpus: str) -> None:
    from cluster import ray_runtime

    torch.set_num_threads(1)
    ray_runtime.machine_goes = lambda: False  # a slow machine asks within the first step; there is no Ray to answer
    train.entry(recipe(Path(run), corpus).model_dump(mode="json", exclude_none=True))


def test_a_wish_to_stop_that_comes_while_workers_start_is_heard(tmp_path: Path, corpus: str) -> None:
    """The driver takes back an old wish before it starts workers; they must not take back a new one."""
    faults.ask_to_stop(str(tmp_path))
    run_on_ranks(1, as_ray_starts_it, str(tmp_path), corpus)
    assert checkpoint.newest_step(str(tmp_path)) == 1
    place = tmp_path / "recipe.toml"
    run_on_ranks(1, train.main, [str(place)])
    assert checkpoint.newest_step(str(tmp_path)) == 12


def test_two_corpora_side_by_side(tmp_path: Path, corpus: str) -> None:
    """A mixture goes on with another number of workers; its corpora must share a tokenizer."""
    import shutil

    shutil.copytree(corpus, tmp_path / "second")
    data = {"lanes": 4, "bptt": 12, "order": "patients", "backward": True, "carry_across": "patients"}
    data["corpus"] = {corpus: 1.0, str(tmp_path / "second"): 3.0}
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_on_ranks(2, train_some, str(whole), corpus, {"data": data})
    run_on_ranks(2, train_some, str(run), corpus, {"data": data})
    forget_after(run, 8)
    run_on_ranks(1, train_some, str(run), corpus, {"data": data})
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    data["corpus"] = {corpus: 1.0, tiny_corpus(tmp_path / "third", seed=3): 1.0}
    run_on_ranks(1, refused, str(tmp_path / "other"), corpus, {"data": data}, "was tokenized by another tokenizer")
