"""The promise itself, in the real loop on gloo ranks: killed again and again, on other numbers of workers and other
ZeRO stages, on an object store: the same losses, and no token lost or read twice. For every model of MODELS.
"""

import contextlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import SMALL_MODELS, tiny_corpus
from object_store import object_store
from ranks import run_on_ranks
from wandb_server import wandb_server

from cluster import config, storage, tracking
from pretrain import checkpoint, train
from pretrain.models import MODELS
from pretrain.train import TrainRecipe

STEPS = 90  # about two epochs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), train_notes=16)


def recipe(run: str, corpus: str, **changes: Any) -> TrainRecipe:
    values: dict[str, Any] = {
        "run_dir": run,
        "steps": STEPS,
        "log_every": 1,
        "eval_every": 30,
        "save_every": 7,
        "data": {"corpus": corpus, "lanes": 8, "bptt": 14, "jitter": True, "carry_across": "notes"},
        "optim": {"lr": 1e-3},  # the order of summation is soon seen where much is learned
        "cluster": {"workers": 0},
        "tracking": {"wandb": "disabled"},
    }
    return config.validate(TrainRecipe, values | changes, "test")


def losses(run: str) -> dict[int, float]:
    found = [(line["step"], line["loss"]) for line in tracking.read(run) if "loss" in line]
    assert len(found) == len(dict(found))  # none doubled
    return dict(found)


def train_until_killed(run: str, corpus: str, changes: dict[str, Any], kill: tuple[int, str, int] | None) -> None:
    """`kill`: (rank, where, step) at which this very process sends itself SIGKILL."""
    torch.set_num_threads(1)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if kill is not None and int(os.environ["RANK"]) == kill[0]:
        _, where, at = kill
        if where == "training":
            step = train.Training.step

            def stepped(self: train.Training) -> tuple[bool, bool]:
                done = step(self)
                if self.state.step == at:
                    die()
                return done

            train.Training.step = stepped  # type: ignore[method-assign]
        elif where == "saving":
            written = storage.os.replace  # type: ignore[attr-defined]

            def replaced(source: Any, target: Any) -> None:
                if f"step-{at - at % 7 + 7:08d}" in str(target):
                    die()
                written(source, target)

            storage.os.replace = replaced  # type: ignore[attr-defined]
        else:
            bytes_of = checkpoint._bytes_of

            def half(tensor: torch.Tensor) -> memoryview:
                if len(list(Path(run, "checkpoints").glob("*"))) and random.random() < 0.1:
                    die()
                return bytes_of(tensor)

            checkpoint._bytes_of = half
    train.train(recipe(run, corpus, **changes))


def draws() -> random.Random:
    seed = random.SystemRandom().randrange(1_000_000)
    sys.stdout.write(f"seed {seed}\n")  # so that a failure can be repeated
    return random.Random(seed)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", MODELS)
def test_killed_again_and_again(tmp_path: Path, corpus: str, name: str, kills: int) -> None:
    """SIGKILL of a random rank at random steps of first and later epochs, between steps, while files are written and
    before they stand: every loss and tensor is that of the unbroken run, to the last bit.
    """
    changes = {"model": {"name": name, **SMALL_MODELS[name]}}
    whole, run, draw = str(tmp_path / "whole"), str(tmp_path / "run"), draws()
    run_on_ranks(2, train_until_killed, whole, corpus, changes, None)
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    killed = 0
    for at in sorted(draw.sample(range(8, STEPS - 8), kills)):
        at = max(at, (checkpoint.newest_step(run) or 0) + 1)  # "writing" dies where it likes, perhaps behind this step
        kill = (draw.randrange(2), draw.choice(["training", "saving", "writing"]), at)
        with contextlib.suppress(AssertionError):  # the ranks do not end well
            run_on_ranks(2, train_until_killed, run, corpus, changes, kill)
            break  # past its end already
        killed += 1
    assert killed > kills // 2
    run_on_ranks(2, train_until_killed, run, corpus, changes, None)
    assert losses(run) == losses(whole)
    for part in ("tensors-00000.safetensors", "tensors-00001.safetensors"):
        final = f"checkpoints/step-{STEPS:08d}/{part}"
        assert Path(run, final).read_bytes() == Path(whole, final).read_bytes()


def audited(run: str, corpus: str, changes: dict[str, Any], stop_after: int | None) -> None:
    """Trains, and writes down which positions of which epoch each rank took its inputs from; dies after a step."""
    torch.set_num_threads(1)
    step = train.Training.step

    def stepped(self: train.Training) -> tuple[bool, bool]:
        at = self.state.step
        done = step(self)
        with open(f"{run}-audit-{self.workers.rank}.jsonl", "a") as log:
            log.write(json.dumps([at, self.streams.spans(at, self.lanes)]) + "\n")  # type: ignore[union-attr]
        if stop_after == at + 1:
            self.workers.agree(None)
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    train.Training.step = stepped  # type: ignore[method-assign]
    train.train(recipe(run, corpus, **changes))


def positions(run: str, first: int, last: int) -> list[tuple[int, int]]:
    """(epoch, position) of every input of steps [first, last), and takes the audit away."""
    found = []
    for log in sorted(Path(run).parent.glob(f"{Path(run).name}-audit-*.jsonl")):
        for line in log.read_text().splitlines():
            at, lanes = json.loads(line)
            if first <= at < last:
                found += [(epoch, p) for spans in lanes for epoch, start, stop in spans for p in range(start, stop)]
        log.unlink()
    return found


@pytest.mark.parametrize(
    "then", [[(1, 3), (3, 2)], pytest.param([(1, 0), (4, 2), (2, 1), (4, 0), (1, 3), (8, 1)], marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", MODELS)
def test_other_workers_and_other_stages_go_on(
    tmp_path: Path, corpus: str, name: str, then: list[tuple[int, int]]
) -> None:
    """Begun by 2 workers at ZeRO-1, killed, and gone on with by others: per-step losses within 1e-5 for 100 steps, and
    every position of the epochs read exactly once.
    """
    from pretrain.streams import open_streams
    from sharding.shards import Corpus

    steps, model = 130, {"name": name, **SMALL_MODELS[name]}
    changes: dict[str, Any] = {"steps": steps, "model": model, "keep_best": 0, "save_every": 10}
    whole, run = str(tmp_path / "whole"), str(tmp_path / "run")
    run_on_ranks(2, train_until_killed, whole, corpus, changes, None)
    at, read = 0, []
    for index, (world, stage) in enumerate([(2, 1), *then, (1, 1)]):
        last = index == len(then) + 1
        stop = None if last else 20 + index * 90 // len(then) + 5
        engine = {"engine": {"zero_stage": stage, "whole_below": 0, "accumulation": 8 // world if world < 8 else 1}}
        with contextlib.suppress(AssertionError) if not last else contextlib.nullcontext():
            run_on_ranks(world, audited, run, corpus, changes | engine, stop)
        saved = checkpoint.newest_step(run) or 0
        assert saved == steps if last else (stop or 0) - 15 <= saved < (stop or 0)  # the newest may be on its way
        read += positions(run, at, saved)
        at = saved
    unbroken, broken = losses(whole), losses(run)
    assert broken.keys() == unbroken.keys()
    for step, loss in unbroken.items():
        assert broken[step] == pytest.approx(loss, rel=1e-5), step
    split = Corpus.open(corpus).split("train")
    streams = open_streams([split], recipe(run, corpus, **changes).data, 1, None)
    assert len(read) == len(set(read))  # none twice
    full = int(streams.epoch_of(steps))
    assert full >= 2
    for epoch in range(full):
        assert {p for e, p in read if e == epoch} == set(range(split.n_tokens))  # none lost


def test_an_object_store_gives_the_same_run(tmp_path: Path, corpus: str) -> None:
    """Killed, and gone on with by a process that has nothing but the URL."""
    whole, run, changes = str(tmp_path / "whole"), "s3://runs/run", {"steps": 21, "eval_every": 100}
    run_on_ranks(1, train_until_killed, whole, corpus, changes, None)
    with object_store("runs"):
        with pytest.raises(AssertionError):
            run_on_ranks(1, train_until_killed, run, corpus, changes, (0, "training", 17))
        assert checkpoint.newest_step(run) in (7, 14)
        run_on_ranks(1, train_until_killed, run, corpus, changes, None)
        assert losses(run) == losses(whole)
        final = f"checkpoints/step-{21:08d}/tensors-00000.safetensors"
        assert storage.read_bytes(storage.join(run, final)) == Path(whole, final).read_bytes()
        (resumed,) = [line for line in tracking.read(run) if line.get("event") == "resumed"]
        assert resumed["step"] in (7, 14)


def test_online_wandb_shows_one_curve(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed twice; the server has every step once, under one run id, with the loss of the metrics."""
    run, changes = str(tmp_path / "run"), {"steps": 30, "tracking": {"wandb": "online"}, "save_every": 4}
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        for at in (11, 22):
            with pytest.raises(AssertionError):
                run_on_ranks(1, train_until_killed, run, corpus, changes, (0, "training", at))
        run_on_ranks(1, train_until_killed, run, corpus, changes, None)
        ((_, rows),) = server.history.items()
    logged = [(row["_step"], row["loss"]) for row in rows if "loss" in row]
    assert logged == list(losses(run).items())
    assert all(row["global_step"] == row["_step"] for row in rows)
    assert [step for step, _ in logged] == list(range(1, 31))
