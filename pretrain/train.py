"""Pretraining: build → resume → one loop → save.

`train(recipe)` is what every worker runs; it reads rank and world size from the environment and knows nothing of Ray.
`./launch.sh pretrain RECIPE` starts it on Ray Train workers; `workers=0`, or torchrun, runs it in this process:

    torchrun --nproc-per-node 8 -m pretrain.train recipes/mimic3/awd_lstm.toml

The same command again goes on where the run directory stands.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster import config, logs, storage, tracking
from cluster.config import Place
from cluster.errors import ConfigError, Preempted
from cluster.placement import ClusterConfig
from cluster.tracking import TrackingConfig
from pretrain import checkpoint, faults, plot
from pretrain import run as run_directory
from pretrain.engine import EngineConfig, Workers
from pretrain.loop import Training
from pretrain.models.awd_lstm import AwdLstmConfig
from pretrain.models.transformer_xl import TransformerXlConfig
from pretrain.optim import OptimConfig
from pretrain.streams import Mixture, StreamConfig, Streams, lanes_of, open_streams

REMOTE_LOOKS_SECONDS = 10.0  # between looks at the metrics of a run in an object store


class TrainRecipe(config.Section):
    """Recipe of `./launch.sh pretrain`."""

    run_dir: Place
    seed: int = 1
    epochs: float | None = Field(None, gt=0, description="how often the corpus is read; this or `steps`")
    steps: int | None = Field(None, ge=1)
    data: StreamConfig
    model: Annotated[AwdLstmConfig | TransformerXlConfig, Field(discriminator="name")] = AwdLstmConfig()
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
    init_from: Place | None = Field(None, description="run directory whose newest weights a new run begins with")
    spikes: Literal["report", "skip"] = Field("report", description="losses 6 σ above the last 128")

    @model_validator(mode="before")
    @classmethod
    def _short_for(cls, values: dict[str, Any]) -> dict[str, Any]:
        if isinstance(values.get("model"), dict):
            values = values | {"model": {"name": "awd-lstm"} | values["model"]}
        if "workers" in values and isinstance(values.get("cluster", {}), dict):
            values = values | {"cluster": {**values.get("cluster", {}), "workers": values["workers"]}}
            del values["workers"]
        return values

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
            notice = stack.enter_context(faults.Notice(recipe.run_dir, workers.first, warned).listening())
            Training(recipe, workers, notice, stack).run()
    finally:
        workers.close()


def entry(values: dict[str, Any]) -> None:
    """What a Ray Train worker runs: the resolved recipe as plain values."""
    from cluster import ray_runtime

    with contextlib.suppress(Preempted):  # Ray would start the workers again; the driver knows
        train(config.validate(TrainRecipe, values, "recipe"), ray_runtime.machine_goes)


def main(args: list[str]) -> None:
    """Verb `pretrain`."""
    recipe = config.absolute(config.load(TrainRecipe, args))
    if "RANK" in os.environ:  # torchrun, Slurm: somebody else started the workers
        if os.environ["RANK"] == "0":
            faults.forget_stop(recipe.run_dir)
        train(recipe)
        if os.environ["RANK"] == "0":
            plot.draw_losses([recipe.run_dir])
        return
    # What can be wrong is found here, before workers start.
    corpora = run_directory.open_corpora(recipe.data)
    lanes = lanes_of(0, max(recipe.cluster.most, 1), recipe.data.lanes)
    if len(lanes) < recipe.engine.accumulation:
        raise ConfigError(
            f"engine.accumulation={recipe.engine.accumulation} is more than the {len(lanes)} lanes of a worker; lower "
            "it, or take fewer workers"
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
    # Here and not in the workers: the wish to stop may come while they start.
    faults.forget_stop(recipe.run_dir)
    if recipe.cluster.most == 0:
        train(recipe)
        return
    from cluster import ray_runtime  # not needed, and perhaps not installed, where there is torchrun

    ray_runtime.start(recipe.cluster.most)
    before = signal.signal(signal.SIGTERM, lambda *_: faults.ask_to_stop(recipe.run_dir))  # workers get no signals
    try:
        ray_runtime.train_workers(
            entry,
            recipe.model_dump(mode="json", exclude_none=True),
            cluster=recipe.cluster,
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
        every = 1.0 if storage.is_local(recipe.run_dir) else REMOTE_LOOKS_SECONDS
        while not over.wait(every):
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
    """Where the run stands; `./launch.sh status` reads these words in the log of a job."""
    lines = [line for line in tracking.read(run) if "loss" in line]
    if lines:
        last = lines[-1]
        advance(
            last["step"],
            f"step {last['step']:,}  loss {last['loss']:.3f}  {last['tokens_per_second']:,.0f} tokens/s  "
            f"checkpoint {checkpoint.last_saved(run):,}  nodes {last.get('nodes', 1)}",
        )


if __name__ == "__main__":
    from cluster import cli

    cli.run_verb("pretrain", sys.argv[1:])
    # All is written. When Python finalizes, threads of torch's that wait for the interpreter can abort the process
    # (seen once in about 100 starts), and torchrun would take the finished run for a failed one.
    sys.stdout.flush()
    os._exit(0)
