"""Storage that fails or dies at every point of a save, losses that are not finite, and spikes; in the real loop."""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import tiny_corpus
from ranks import run_on_ranks

from cluster import config, storage, tracking
from cluster.errors import StorageError, TrainingError
from pretrain import checkpoint, train
from pretrain.train import TrainRecipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


def recipe(run: str, corpus: str, **changes: Any) -> TrainRecipe:
    values: dict[str, Any] = {
        "run_dir": run,
        "steps": 12,
        "log_every": 1,
        "eval_every": 100,
        "save_every": 4,
        "keep": 2,
        "data": {"corpus": corpus, "lanes": 4, "bptt": 12},
        "model": {"embedding": 12, "hidden": 16, "layers": 2},
        "cluster": {"workers": 0},
        "tracking": {"wandb": "disabled"},
    }
    return config.validate(TrainRecipe, values | changes, "test")


def lines(run: str, kind: str) -> list[dict[str, Any]]:
    return [line for line in tracking.read(run) if line.get("event") == kind]


def losses(run: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in tracking.read(run) if "loss" in line}


class Points:
    """Counts what touches the disk from the second save on, and does something at the n-th."""

    def __init__(self, run: str, at: int, happen: Callable[[], None]):
        self.run, self.at, self.happen, self.passed = run, at, happen, 0
        self._real = {name: getattr(os, name) for name in ("replace", "fsync")}
        self._open = open

    def point(self) -> None:
        if Path(self.run, "checkpoints", "step-00000004", "manifest.json").exists():
            self.passed += 1
            if self.passed == self.at:
                self.happen()

    def __enter__(self) -> "Points":
        import builtins

        points = self

        def wrapped(name: str) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                points.point()
                return points._real[name](*args, **more)

            return call

        def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            stream = points._open(file, mode, *args, **more)
            if "w" in mode and "checkpoints" in str(file):
                points.point()
                write = stream.write

                class Writing:
                    def __getattr__(self, name: str) -> Any:
                        return getattr(stream, name)

                    def __enter__(self) -> "Writing":
                        return self

                    def __exit__(self, *error: object) -> None:
                        stream.close()

                    def write(self, data: Any) -> int:
                        points.point()
                        return int(write(data))

                return Writing()
            return stream

        for name in self._real:
            setattr(os, name, wrapped(name))
        builtins.open = opened  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        import builtins

        builtins.open = self._open
        for name, real in self._real.items():
            setattr(os, name, real)


def full() -> None:
    raise OSError(28, "No space left on device")


def apart(action: Callable[[], int]) -> int:
    """Exit code of a fork that returns what `action` does; only there are process groups made."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def every_point(folder: str, corpus: str, kill: bool, stride: int) -> None:
    """For points of the second and third save: the disk is full there, or the process dies there."""
    torch.set_num_threads(1)

    def train_whole(run: str) -> int:
        train.train(recipe(run, corpus))
        return 0

    def train_broken(run: str, at: int) -> int:
        with Points(run, at, (lambda: os._exit(9)) if kill else full) as points:
            try:
                train.train(recipe(run, corpus))
            except StorageError as exc:
                return 9 if "o space left" in str(exc) else 98
            return 0 if points.passed < at else 97

    whole = str(Path(folder, "whole"))
    assert apart(lambda: train_whole(whole)) == 0
    wanted, tensors = losses(whole), Path(whole, "checkpoints/step-00000012/tensors-00000.safetensors").read_bytes()
    at, code = random.SystemRandom().randrange(stride) + 1, 9
    while code == 9:
        run = str(Path(folder, f"run-{at}"))
        code = apart(lambda run=run, at=at: train_broken(run, at))  # type: ignore[misc]
        assert code in (0, 9), f"point {at}: {code}"
        reached, good = max(losses(run)), checkpoint.newest_step(run)
        assert good is not None
        assert good >= reached - 8, f"point {at}: at step {reached} only {good} was left"  # one save was in flight
        assert apart(lambda run=run: train_whole(run)) == 0  # type: ignore[misc]
        assert losses(run) == wanted, f"point {at}"
        assert Path(run, "checkpoints/step-00000012/tensors-00000.safetensors").read_bytes() == tensors
        left = storage.names(str(Path(run, "checkpoints")))
        assert left == ["step-00000008", "step-00000012"], f"point {at}: {left}"
        shutil.rmtree(run)
        at += stride
    assert at > 20  # of each save: open, writes, fsync and rename of tensors, state and manifest


@pytest.mark.parametrize("kill", [False, True], ids=["disk full", "killed"])
@pytest.mark.parametrize("stride", [40, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])])
def test_a_fault_at_every_point_of_a_save(tmp_path: Path, corpus: str, kill: bool, stride: int) -> None:
    run_on_ranks(1, every_point, str(tmp_path), corpus, kill, stride, timeout_seconds=2400)


def with_nan(
    run: str, corpus: str, bad_steps: tuple[int, ...], times: int, changes: dict[str, Any], factor: float = math.nan
) -> None:
    """Trains while the logits of some steps are NaN (or `factor` times what they are), `times` times each."""
    torch.set_num_threads(1)
    from pretrain.models.awd_lstm import AwdLstm
    from pretrain.models.dropout import Masks
    from pretrain.models.output import Level

    at = {"step": -1}
    left = dict.fromkeys(bad_steps, times)
    made, wanted = Masks.__init__, AwdLstm.softmax

    def init(self: Masks, seed: int, step: int, *more: Any) -> None:
        at["step"] = step
        made(self, seed, step, *more)

    def softmax(self: AwdLstm) -> Any:
        broken = self.training and left.get(at["step"], 0) > 0
        if broken:
            left[at["step"]] -= 1
        by = factor if broken else 1.0
        return [Level(weight * by, bias * by) for weight, bias, _ in wanted(self)]

    Masks.__init__ = init  # type: ignore[method-assign,assignment]
    AwdLstm.softmax = softmax  # type: ignore[method-assign]
    train.train(recipe(run, corpus, **changes))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path, corpus: str, stage: int) -> None:
    run = str(tmp_path)
    run_on_ranks(1, with_nan, run, corpus, (5,), 1, {"engine": {"zero_stage": stage}})
    assert sorted(losses(run)) == [step for step in range(1, 13) if step != 6]
    (line,) = lines(run, "skipped")
    assert (line["step"], line["reason"]) == (6, "the loss is not finite")
    state = json.loads((tmp_path / "checkpoints/step-00000012/state.json").read_text())["counters"]
    assert state["optimizer_step"] == 11


@pytest.mark.parametrize("stage", [1, 3])
def test_three_in_a_row_go_back_and_pass_over_the_data(tmp_path: Path, corpus: str, stage: int) -> None:
    run = str(tmp_path)
    engine = {"zero_stage": stage, "whole_below": 0}
    run_on_ranks(1, with_nan, run, corpus, (5, 6, 7), 1, {"engine": engine})
    (line,) = lines(run, "rolled back")
    assert (line["step"], line["back_to"]) == (8, 4)
    state = json.loads((tmp_path / "checkpoints/step-00000012/state.json").read_text())["counters"]
    assert state["skipped"] == [[4, 8]]
    assert state["optimizer_step"] == 8
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 9, 10, 11, 12]


def stopping(run: str, corpus: str, bad_steps: tuple[int, ...], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        with_nan(run, corpus, bad_steps, 9, {})


def test_then_the_run_stops_with_a_message(tmp_path: Path, corpus: str) -> None:
    run, message = str(tmp_path / "run"), r"again after going back to step 4; lower optim\.lr"
    run_on_ranks(1, stopping, run, corpus, tuple(range(5, 12)), message)
    assert checkpoint.newest_step(run) == 8
    run_on_ranks(1, stopping, f"{run}-new", corpus, (0, 1, 2), "there is no checkpoint to go back to")


@pytest.mark.parametrize("spikes", ["report", "skip"])
def test_a_spike_is_reported_and_skipped_by_recipe(tmp_path: Path, corpus: str, spikes: str) -> None:
    run = str(tmp_path)
    changes = {"steps": 64, "save_every": 100, "spikes": spikes, "optim": {"lr": 1e-6}}
    run_on_ranks(1, with_nan, run, corpus, (60,), 1, changes, 40.0)
    (line,) = lines(run, "spike")
    assert line["step"] == 61
    assert line["sigmas"] > 6
    assert len(lines(run, "skipped")) == (spikes == "skip")
    state = json.loads((tmp_path / "checkpoints/step-00000064/state.json").read_text())["counters"]
    assert state["optimizer_step"] == 64 - (spikes == "skip")


def every_upload(folder: str, corpus: str) -> None:
    """Every upload of the second save is refused once; runs live on a store that is no file system."""
    import fsspec

    from pretrain.engine import Workers

    torch.set_num_threads(1)
    Workers(60)  # the process group of all runs
    whole = str(Path(folder, "whole"))
    train.train(recipe(whole, corpus))
    store = fsspec.filesystem("memory")
    upload, refused = type(store).put_file, 0
    for at in range(3):
        run, seen = f"memory://run-{at}", []

        def put_file(self: Any, local: str, remote: str, *args: Any, at: int = at, seen: list[str] = seen) -> None:
            if "step-00000008" in remote:
                seen.append(remote)
                if len(seen) == at + 1:
                    raise OSError("503 Slow Down")
            upload(self, local, remote, *args)

        type(store).put_file = put_file
        try:
            train.train(recipe(run, corpus))
        except StorageError as exc:
            refused += 1
            assert "503 Slow Down" in str(exc)  # noqa: PT017
            assert "the one before it is good" in str(exc)  # noqa: PT017
        type(store).put_file = upload
        assert checkpoint.newest_step(run) == 4
        train.train(recipe(run, corpus))
        assert losses(run) == losses(whole)
    assert refused == 3  # tensors, state, manifest


def test_an_upload_that_is_refused(tmp_path: Path, corpus: str) -> None:
    run_on_ranks(1, every_upload, str(tmp_path), corpus)
