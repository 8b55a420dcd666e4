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
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from cluster import config, logs, storage, tracking
from cluster.errors import ConfigError, Preempted, TrainingError
from cluster.tracking import TrackingConfig
from pretrain import checkpoint, faults, optim, plot
from pretrain import run as run_directory
from pretrain.checkpoint import Retention, Saver, TrainState
from pretrain.engine import Engine, EngineConfig, Workers
from pretrain.evaluate import evaluate
from pretrain.models import MODELS
from pretrain.models.awd_lstm import AwdLstmConfig
from pretrain.models.dropout import Masks
from pretrain.optim import OptimConfig, learning_rate
from pretrain.streams import Mixture, Prefetch, StreamConfig, Streams, lanes_of, open_streams

SMOOTHING = 0.98  # of the loss, a step
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, by NVIDIA's data sheets


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
    keep_best: int = Field(1, ge=0, description="best checkpoints that stay, of those saved right after a validation")
    keep_every: int | None = Field(None, ge=1, description="steps; checkpoints at their multiples stay for good")
    init_from: str | None = Field(None, description="run directory whose newest weights a new run begins with")
    spikes: Literal["report", "skip"] = Field("report", description="losses 6 σ above the last 128")

    @model_validator(mode="after")
    def _one_length(self) -> TrainRecipe:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    def total_steps(self, streams: Streams | Mixture) -> int:
        """Length of the run in steps."""
        steps = self.steps or streams.steps
        assert steps is not None
        return steps


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps is to be done after this one."""
    return step % every == 0


def train(recipe: TrainRecipe, warned: Callable[[], bool] | None = None) -> None:
    """Trains to the end, from wherever the run directory stands. Every worker calls it. `warned` says whether the
    cluster will take this machine away.

    Raises Preempted when told to stop: all is saved then.
    """
    workers = Workers(recipe.engine.timeout_seconds)
    try:
        with contextlib.ExitStack() as stack:
            if workers.first:
                stack.enter_context(run_directory.held(recipe.run_dir))
                faults.forget_stop(recipe.run_dir)
            notice = stack.enter_context(faults.Notice(recipe.run_dir, workers.first, warned).listening())
            Training(recipe, workers, notice, stack).run()
    finally:
        workers.close()


class Training:
    """One start of a run on one worker: what stands is loaded, then one loop. `state` is where the run is."""

    def __init__(self, recipe: TrainRecipe, workers: Workers, notice: faults.Notice, stack: contextlib.ExitStack):
        self.recipe, self.workers, self.notice = recipe, workers, notice
        corpora = run_directory.open_corpora(recipe.data)
        self.lanes = lanes_of(workers.rank, workers.world, recipe.data.lanes)
        splits = [corpus.split("train") for corpus in corpora]
        self.streams = open_streams(splits, recipe.data, recipe.seed, recipe.epochs)
        self.steps = recipe.total_steps(self.streams)
        self.valid = corpora[-1].split("valid")
        first = workers.first
        about = workers.agree(run_directory.enter(recipe.run_dir, recipe, corpora) if first else None)
        self.cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chartlm-")))
        folder = workers.agree(checkpoint.newest(recipe.run_dir, self.cache) if first else None)
        torch.manual_seed(recipe.seed)  # the initial weights
        model = MODELS[recipe.model.name](recipe.model, corpora[0].vocab_size)
        if folder is None and about["init_from"] is not None:
            run_directory.init_weights(model, about["init_from"], corpora[0].tokenizer, self.cache)
        self.engine = Engine(
            model, lambda m: optim.build(m, recipe.optim), recipe.engine, workers, len(self.lanes), recipe.optim.clip
        )
        self.state = TrainState()
        if folder is not None:
            self.state = checkpoint.resume(folder, self.engine, self.lanes, self.cache)
        self.track: tracking.Track | None = None
        if self.state.step >= self.steps:
            return  # finished before; there is nothing to add to its metrics
        self._with_carry()
        retention = Retention(recipe.keep, recipe.keep_best, recipe.keep_every)
        self.saver = Saver(recipe.run_dir, self.engine, self.lanes, about["identity"], retention)
        stack.callback(self.saver.close)
        self.batches = stack.enter_context(contextlib.closing(Prefetch(self.streams, self.lanes, workers.device)))
        if first:
            resumed = self.state.step if folder is not None else None
            self.track = stack.enter_context(
                tracking.opened(recipe.run_dir, recipe.tracking, about["wandb_id"], config.dump(recipe), resumed)
            )
        self._clock = _Clock(workers.device, self)

    def _with_carry(self) -> None:
        if self.state.carry is None:
            self.state = replace(self.state, carry=self.engine.initial_carry(len(self.lanes)))

    def run(self) -> None:
        """Trains until the last step, or until told to stop (Preempted)."""
        recipe = self.recipe
        while self.state.step < self.steps:
            if self.state.valid_loss is None and due(self.state.step, recipe.eval_every):
                self.validate()  # what an untrained model scores, or what a stop cut short
            stop, save = self.step()
            if self.state.bad_in_a_row >= faults.BAD_IN_A_ROW:
                self.roll_back()
            step, last = self.state.step, self.state.step == self.steps
            if due(step, recipe.log_every) or last:
                self.log()
            if not stop and (due(step, recipe.eval_every) or last):
                stop = self.validate()
            if due(step, recipe.save_every) or last or stop or save:
                self.save(wait=last or stop or save)
            if stop and not last:
                raise Preempted(f"{recipe.run_dir}: told to stop; step {step:,} is saved: the same command goes on")

    def step(self) -> tuple[bool, bool]:
        """One segment of every lane and one update. Returns whether any worker was told to stop, or to save.

        A step whose loss or gradient is not finite changes nothing: no parameter, no optimizer state, no carry.
        """
        recipe, state, engine = self.recipe, self.state, self.engine
        assert state.carry is not None
        targets = self.streams.targets_in(state.step)
        batch = self.batches.get(state.step)
        masks = Masks(recipe.seed, state.step, self.lanes, self.workers.device)
        nll, carry = engine.forward_backward(batch, state.carry, masks, targets)
        nll_sum, done, failed, stop, ask = self.workers.total(
            nll, *self.saver.flags(), float(self.notice.stop), float(self.workers.first and self.notice.due())
        )
        self.saver.tick(done, failed)
        save = ask > 0 and self.notice.warned()
        loss = nll_sum / max(targets, 1)
        self.lr = learning_rate(state.step, self.steps, recipe.optim)
        if recipe.data.jitter:
            self.lr *= self.streams.length_of(state.step) / recipe.data.bptt  # arXiv:1708.02182 §4.1
        sigmas = faults.sigmas_above(loss, state.recent_losses)
        reason = None
        if not math.isfinite(loss):
            reason = "the loss is not finite"
        elif sigmas > faults.SIGMAS:
            self.mark("spike", state.step + 1, loss_of_step=loss, sigmas=min(sigmas, 1e9))
            reason = f"the loss is {sigmas:.1f} σ above the last" if recipe.spikes == "skip" else None
        if reason is not None:
            engine.discard()
        else:
            self.grad_norm, applied = engine.update(self.lr)
            reason = None if applied else "the gradient is not finite"
        if math.isfinite(loss):
            state = replace(state, recent_losses=(*state.recent_losses, loss)[-faults.WINDOW :])
        if reason is not None:
            self.mark("skipped", state.step + 1, reason=reason)
            bad = 0 if sigmas > faults.SIGMAS and math.isfinite(loss) else state.bad_in_a_row + 1
            self.state = replace(state, step=state.step + 1, bad_in_a_row=bad, valid_loss=None)
            return stop > 0, save
        smoothed = loss if state.smoothed_loss is None else SMOOTHING * state.smoothed_loss + (1 - SMOOTHING) * loss
        self.state = replace(
            state,
            step=state.step + 1,
            tokens=state.tokens + targets,
            pending_nll=state.pending_nll + nll_sum,
            pending_targets=state.pending_targets + targets,
            smoothed_loss=smoothed,
            bad_in_a_row=0,
            valid_loss=None,
            carry=carry,
        )
        return stop > 0, save

    def mark(self, event: str, step: int, **about: Any) -> None:
        """Adds a line on something out of the ordinary to the metrics, and says it."""
        if self.track is not None:
            self.track.log(step=step, event=event, epoch=self.streams.epoch_of(step - 1), **about)

    def roll_back(self) -> None:
        """Goes back to the last good checkpoint and on behind the data read since: what came of them cannot be used.

        Raises TrainingError where that was done before and no checkpoint was saved since.
        """
        self.saver.finish()
        reached, run = self.state.step, self.recipe.run_dir
        what = f"{run}: {faults.BAD_IN_A_ROW} steps up to step {reached:,} gave no finite loss or gradient"
        advice = f"lower optim.lr (now {self.recipe.optim.lr}) and start a new run_dir="
        folder = self.workers.agree(checkpoint.newest(run) if self.workers.first else None)
        if folder is None:
            raise TrainingError(f"{what}, and there is no checkpoint to go back to; {advice}")
        good = checkpoint.resume(folder, self.engine, self.lanes, self.cache)
        if good.skipped and good.skipped[-1][1] == good.step:
            raise TrainingError(f"{what}, again after going back to step {good.skipped[-1][0]:,}; {advice}")
        self.state = replace(
            good,
            step=reached,
            skipped=(*good.skipped, (good.step, reached)),
            bad_in_a_row=0,
            carry=None,  # of text that does not go on
            valid_loss=None,
        )
        self._with_carry()
        self.mark("rolled back", reached, back_to=good.step)
        self.saver.begin(self.state)

    def log(self) -> None:
        """A line of numbers of the steps since the last."""
        state = self.state
        if self.track is not None and state.pending_targets:
            self.track.log(
                step=state.step,
                loss=state.pending_nll / state.pending_targets,
                smoothed_loss=state.smoothed_loss,
                lr=self.lr,
                grad_norm=self.grad_norm,
                epoch=self.streams.epoch_of(state.step),
                tokens=state.tokens,
                **self._clock.since_last(),
            )
        self.state = replace(state, pending_nll=0.0, pending_targets=0)

    def validate(self) -> bool:
        """Scores on the validation patients; returns whether a notice to stop cut them short."""

        def told() -> bool:
            return self.workers.total(float(self.notice.stop))[0] > 0

        scores = evaluate(self.engine, self.valid, self.recipe.data, self.lanes, self.workers.total, interrupted=told)
        if scores is None:
            return True
        if self.track is not None:
            numbers = asdict(scores)
            categories = numbers.pop("loss_of_category")
            lines = {f"valid_{key}": value for key, value in numbers.items()}
            lines |= {f"valid_loss/{name}": value for name, value in categories.items()}
            self.track.log(step=self.state.step, **lines)
        self.state = replace(self.state, valid_loss=scores.loss)
        return False

    def save(self, wait: bool) -> None:
        """Begins the checkpoint of this step; with `wait` it stands on return."""
        if self.saver.saved_step != self.state.step:
            self.saver.begin(self.state)
        if wait:
            self.saver.finish()
        if self.track is not None:
            self.track.flush_remote()


class _Clock:
    """Times and sizes between two lines of metrics."""

    def __init__(self, device: torch.device, training: Training):
        self._device, self._training = device, training
        self._before = self._now()

    def _now(self) -> tuple[float, int, float, float]:
        training = self._training
        return time.monotonic(), training.state.tokens, training.batches.waited, training.saver.stalled

    def since_last(self) -> dict[str, float]:
        """tokens/s, waits as shares of the time, peak memory (GiB), and on a known GPU the share of its peak FLOP/s."""
        before, now = self._before, self._now()
        self._before = now
        seconds = max(now[0] - before[0], 1e-9)
        rate = (now[1] - before[1]) / seconds
        numbers = {
            "tokens_per_second": rate,
            "data_wait": (now[2] - before[2]) / seconds,
            "save_stall": (now[3] - before[3]) / seconds,
        }
        if self._device.type == "cuda":
            numbers["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            name = torch.cuda.get_device_name(self._device)
            peak = next((flops for kind, flops in PEAK_FLOPS.items() if kind in name), None)
            if peak is not None:
                parameters = sum(parameter.numel() for parameter in self._training.engine.model.parameters())
                # Two operations a weight forward, four backward; the tied embedding counts once, as softmax.
                numbers["mfu"] = 6 * parameters * rate / (peak * self._training.workers.world)
        else:
            numbers["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return numbers


def entry(values: dict[str, Any]) -> None:
    """What a Ray Train worker runs: the resolved recipe as plain values."""
    from cluster import ray_runtime

    with contextlib.suppress(Preempted):  # Ray would start the workers again; the driver knows
        train(config.validate(TrainRecipe, values, "recipe"), ray_runtime.machine_goes)


def main(args: list[str]) -> None:
    """Verb `pretrain`."""
    recipe = config.load(TrainRecipe, args)
    recipe = recipe.model_copy(
        update={
            "run_dir": storage.absolute(recipe.run_dir),
            "init_from": recipe.init_from and storage.absolute(recipe.init_from),
            "data": recipe.data.absolute(),
        }
    )
    if "RANK" in os.environ:  # torchrun, Slurm: somebody else started the workers
        train(recipe)
        if os.environ["RANK"] == "0":
            plot.draw_losses([recipe.run_dir])
        return
    # What can be wrong is found here, before workers start.
    corpora = run_directory.open_corpora(recipe.data)
    lanes = lanes_of(0, max(recipe.cluster.workers, 1), recipe.data.lanes)
    if len(lanes) % recipe.engine.accumulation:
        raise ConfigError(
            f"engine.accumulation={recipe.engine.accumulation} does not divide the {len(lanes)} lanes of a worker"
        )
    streams = open_streams([corpus.split("train") for corpus in corpora], recipe.data, recipe.seed, recipe.epochs)
    corpora[-1].split("valid")
    steps = recipe.total_steps(streams)
    run_directory.enter(recipe.run_dir, recipe, corpora)
    done = checkpoint.newest_step(recipe.run_dir)
    if done is not None and done >= steps:
        logs.say(f"pretrain: {recipe.run_dir} is at step {done:,} of {steps:,}; nothing left to do")
    else:
        tokens = sum(corpus.split("train").n_tokens for corpus in corpora)
        logs.say(
            f"pretrain: {recipe.model.name}, {tokens:,} tokens, {steps:,} steps of "
            f"{recipe.data.lanes} × {recipe.data.bptt} tokens, "
            + (f"from step {done:,}" if done else "from the beginning")
        )
        with _watched(recipe, steps):
            _start(recipe)
    plot.draw_losses([recipe.run_dir])


def _start(recipe: TrainRecipe) -> None:
    if recipe.cluster.workers == 0:
        train(recipe)
        return
    from cluster import ray_runtime  # not needed, and perhaps not installed, where there is torchrun

    faults.forget_stop(recipe.run_dir)
    ray_runtime.start(recipe.cluster.workers)
    before = signal.signal(signal.SIGTERM, lambda *_: faults.ask_to_stop(recipe.run_dir))  # workers get no signals
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
        signal.signal(signal.SIGTERM, before)
        ray_runtime.stop()
    if storage.exists(storage.join(recipe.run_dir, faults.STOP)):
        raise Preempted(f"{recipe.run_dir}: told to stop; all is saved: the same command goes on")


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
