"""Pretraining: build → resume → one loop → save.

`train(recipe)` is what every worker runs; it reads rank and world size from the environment and knows nothing of Ray.
`./launch.sh pretrain RECIPE` starts it on Ray Train workers; `workers=0`, or torchrun, runs it in this process:

    torchrun --nproc-per-node 8 -m pretrain.train recipes/mimic3/awd_lstm.toml

The same command again goes on where the run directory stands.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from cluster import config, logs, storage, tracking
from cluster.errors import TrainingError
from cluster.tracking import TrackingConfig
from pretrain import checkpoint, optim, plot
from pretrain import run as run_directory
from pretrain.checkpoint import TrainState
from pretrain.engine import Engine, EngineConfig, Workers
from pretrain.evaluate import evaluate
from pretrain.models import MODELS
from pretrain.models.awd_lstm import AwdLstmConfig
from pretrain.models.dropout import Masks
from pretrain.optim import OptimConfig, learning_rate
from pretrain.streams import StreamConfig, Streams, lanes_of
from sharding.shards import Corpus


class ClusterConfig(config.Section):
    """Section `cluster` of a training recipe: where the workers run. None of it changes what is learned."""

    workers: int = Field(2, ge=0, description="Ray Train workers; 0 trains in this process, without Ray")
    gpus_per_worker: int = Field(0, ge=0)
    max_failures: int = Field(3, ge=0, description="how often dead workers are replaced")


class TrainRecipe(config.Section):
    """Recipe of `./launch.sh pretrain`."""

    run_dir: str
    seed: int = 1
    epochs: float | None = Field(None, gt=0, description="how often the corpus is read; this or `steps`")
    steps: int | None = Field(None, ge=1)
    data: StreamConfig
    model: AwdLstmConfig = AwdLstmConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    log_every: int = Field(10, ge=1, description="steps")
    eval_every: int = Field(1000, ge=1, description="steps between evaluations on the validation patients")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")

    @model_validator(mode="after")
    def _one_length(self) -> TrainRecipe:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the run in steps."""
        return self.steps or math.ceil((self.epochs or 0) * steps_per_epoch)


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps is to be done after this one."""
    return step % every == 0


def train(recipe: TrainRecipe) -> None:
    """Trains to the end, from wherever the run directory stands. Every worker calls it."""
    workers = Workers(recipe.engine.timeout_seconds)
    try:
        _train(recipe, workers)
    finally:
        workers.close()


def _train(recipe: TrainRecipe, workers: Workers) -> None:
    corpus = Corpus.open(recipe.data.corpus)
    lanes = lanes_of(workers.rank, workers.world, recipe.data.lanes)
    streams = Streams(corpus.split("train"), recipe.data.lanes, recipe.data.bptt, recipe.seed)
    steps = recipe.total_steps(streams.steps_per_epoch)
    valid = corpus.split("valid")
    with contextlib.ExitStack() as stack:
        if workers.first:
            stack.enter_context(run_directory.held(recipe.run_dir))
        about = workers.agree(run_directory.enter(recipe.run_dir, recipe, corpus) if workers.first else None)
        folder = workers.agree(checkpoint.newest(recipe.run_dir) if workers.first else None)
        torch.manual_seed(recipe.seed)  # the initial weights
        model = MODELS[recipe.model.name](recipe.model, corpus.vocab_size)
        engine = Engine(
            model, lambda m: optim.build(m, recipe.optim), recipe.engine, workers, len(lanes), recipe.optim.clip
        )
        state = TrainState()
        if folder is not None:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chartlm-")))
            state = checkpoint.resume(folder, engine, lanes, cache)
            if state.step >= steps:
                return  # finished before; there is nothing to add to its metrics
        if state.carry is None:
            state = replace(state, carry=model.initial_carry(len(lanes)))
        track = None
        if workers.first:
            resumed = state.step if folder is not None else None
            track = stack.enter_context(
                tracking.opened(recipe.run_dir, recipe.tracking, about["wandb_id"], config.dump(recipe), resumed)
            )

        def validate() -> None:
            scores = evaluate(model, valid, recipe.data.lanes, recipe.data.bptt, lanes, workers.total)
            if track is not None:
                track.log(step=state.step, **{f"valid_{key}": value for key, value in asdict(scores).items()})

        if state.step == 0:
            validate()  # what an untrained model scores
        clock, clock_tokens = time.monotonic(), state.tokens
        saved = state.step
        while state.step < steps:
            state, grad_norm, lr = train_step(engine, streams, lanes, state, recipe, steps)
            if due(state.step, recipe.log_every) or state.step == steps:
                if track is not None:
                    now = time.monotonic()
                    track.log(
                        step=state.step,
                        loss=state.pending_nll / state.pending_targets,
                        lr=lr,
                        grad_norm=grad_norm,
                        epoch=state.step / streams.steps_per_epoch,
                        tokens=state.tokens,
                        tokens_per_second=(state.tokens - clock_tokens) / max(now - clock, 1e-9),
                    )
                    clock, clock_tokens = now, state.tokens
                state = replace(state, pending_nll=0.0, pending_targets=0)
            if due(state.step, recipe.eval_every) or state.step == steps:
                validate()
            if (due(state.step, recipe.save_every) or state.step == steps) and saved != state.step:
                checkpoint.save(recipe.run_dir, engine, state, lanes, about["identity"], recipe.keep)
                saved = state.step
                if track is not None:
                    track.flush_remote()


def train_step(
    engine: Engine, streams: Streams, lanes: range, state: TrainState, recipe: TrainRecipe, steps: int
) -> tuple[TrainState, float | None, float]:
    """One segment of every lane and one update. Returns (next state, norm of the gradient, learning rate).

    Raises TrainingError before the update where the loss is not finite: parameters stay as they were.
    """
    assert state.carry is not None
    targets = streams.targets_in(state.step)
    masks = Masks(recipe.seed, state.step, lanes, engine.workers.device)
    batch = streams.batch(state.step, lanes)
    nll, carry = engine.forward_backward(batch, state.carry, masks, engine.workers.world / max(targets, 1))
    (nll_sum,) = engine.workers.total(nll)
    if not math.isfinite(nll_sum):
        raise TrainingError(
            f"{recipe.run_dir}: the loss of step {state.step + 1} is not finite; nothing of it was applied. "
            f"Lower optim.lr (now {recipe.optim.lr}) and start a new run_dir="
        )
    lr = learning_rate(state.step, steps, recipe.optim)
    grad_norm = engine.update(lr)
    after = replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + targets,
        pending_nll=state.pending_nll + nll_sum,
        pending_targets=state.pending_targets + targets,
        carry=carry,
    )
    return after, grad_norm, lr


def entry(values: dict[str, Any]) -> None:
    """What a Ray Train worker runs: the resolved recipe as plain values."""
    train(config.validate(TrainRecipe, values, "recipe"))


def main(args: list[str]) -> None:
    """Verb `pretrain`."""
    recipe = config.load(TrainRecipe, args)
    data = recipe.data.model_copy(update={"corpus": storage.absolute(recipe.data.corpus)})
    recipe = recipe.model_copy(update={"run_dir": storage.absolute(recipe.run_dir), "data": data})
    if "RANK" in os.environ:  # torchrun, Slurm: somebody else started the workers
        train(recipe)
        if os.environ["RANK"] == "0":
            plot.draw_losses(recipe.run_dir)
        return
    # What can be wrong is found here, before workers start.
    corpus = Corpus.open(recipe.data.corpus)
    lanes_of(0, max(recipe.cluster.workers, 1), recipe.data.lanes)
    streams = Streams(corpus.split("train"), recipe.data.lanes, recipe.data.bptt, recipe.seed)
    corpus.split("valid")
    steps = recipe.total_steps(streams.steps_per_epoch)
    run_directory.enter(recipe.run_dir, recipe, corpus)
    done = checkpoint.newest_step(recipe.run_dir)
    if done is not None and done >= steps:
        logs.say(f"pretrain: {recipe.run_dir} is at step {done:,} of {steps:,}; nothing left to do")
    else:
        logs.say(
            f"pretrain: {recipe.model.name}, {streams.split.n_tokens:,} tokens, {steps:,} steps of "
            f"{recipe.data.lanes} × {recipe.data.bptt} tokens, "
            + (f"from step {done:,}" if done else "from the beginning")
        )
        with _watched(recipe, steps):
            _start(recipe)
    plot.draw_losses(recipe.run_dir)


def _start(recipe: TrainRecipe) -> None:
    if recipe.cluster.workers == 0:
        train(recipe)
        return
    from cluster import ray_runtime  # not needed, and perhaps not installed, where there is torchrun

    ray_runtime.start(recipe.cluster.workers)
    try:
        ray_runtime.train_workers(
            entry,
            recipe.model_dump(mode="json", exclude_none=True),
            workers=recipe.cluster.workers,
            gpus_per_worker=recipe.cluster.gpus_per_worker,
            max_failures=recipe.cluster.max_failures,
            name=recipe.run_dir.rstrip("/").rsplit("/", 1)[-1],
            timeout_seconds=recipe.engine.timeout_seconds,
        )
    finally:
        ray_runtime.stop()


@contextlib.contextmanager
def _watched(recipe: TrainRecipe, steps: int) -> Iterator[None]:
    """Shows the run's own metrics while it trains, wherever its workers are."""
    over = threading.Event()

    told = len(_resumes(recipe.run_dir))

    def watch(advance: logs.Advance) -> None:
        nonlocal told
        while not over.wait(1.0):
            for line in _resumes(recipe.run_dir)[told:]:
                logs.say(
                    f"pretrain: interrupted at step {line['interrupted_at']:,}, goes on from step {line['step']:,}"
                )
                told += 1
            _show(recipe.run_dir, advance)

    with logs.progress("pretrain", steps) as advance:
        watcher = threading.Thread(target=watch, args=(advance,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            _show(recipe.run_dir, advance)


def _resumes(run: str) -> list[dict[str, Any]]:
    return [line for line in tracking.read(run) if line.get("event") == "resumed"]


def _show(run: str, advance: logs.Advance) -> None:
    lines = [line for line in tracking.read(run) if "loss" in line]
    if lines:
        last = lines[-1]
        advance(last["step"], f"loss {last['loss']:.3f}  {last['tokens_per_second']:,.0f} tokens/s")


if __name__ == "__main__":
    from cluster import cli

    cli.run_verb("pretrain", sys.argv[1:])
    # All is written. When Python finalizes, threads of torch's that wait for the interpreter can abort the process
    # (seen once in about 100 starts), and torchrun would take the finished run for a failed one.
    sys.stdout.flush()
    os._exit(0)
