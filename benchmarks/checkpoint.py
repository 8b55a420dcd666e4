"""What a checkpoint costs a training run, beside DeepSpeed's own, in one run.

    .venv/bin/python benchmarks/checkpoint.py work=NEW_DIR [rounds=3] [key=value…]

An AWD-LSTM (150 million parameters by default) trains on random tokens with AdamW at ZeRO-1. In each round it takes
some steps undisturbed, then saves by chartlm and goes on until the checkpoint stands, then saves by
`DeepSpeedEngine.save_checkpoint`; after the rounds both are loaded again, chartlm's with its sha256 verified. "Stall"
is all that a save costs: the time training stands still, and what the steps take longer than the undisturbed ones
until the checkpoint stands. Its share is that of one save every `every_minutes`. Both write to `work` and synchronize
as they do of themselves; files are read back from the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from cluster.cli import settle_threads  # noqa: E402

settle_threads()  # as every verb does

import torch  # noqa: E402

from pretrain import checkpoint, optim  # noqa: E402
from pretrain.checkpoint import Retention, Saver, TrainState  # noqa: E402
from pretrain.engine import Engine, EngineConfig, Workers  # noqa: E402
from pretrain.models import MODELS  # noqa: E402
from pretrain.models.dropout import Masks  # noqa: E402
from pretrain.streams import Batch, lanes_of  # noqa: E402

DEFAULTS = {
    "work": "",
    "rounds": 3,
    "steps": 6,
    "vocab": 60_000,
    "embedding": 1024,
    "hidden": 2304,
    "lanes": 8,
    "bptt": 35,
    "every_minutes": 5,
}


class Trained:
    """A model that takes steps on random tokens."""

    def __init__(self, given: dict[str, int]):
        self.workers = Workers(600)
        self.lanes = lanes_of(self.workers.rank, self.workers.world, given["lanes"])
        kind = MODELS["awd-lstm"]
        torch.manual_seed(1)
        model = kind(kind.Config(embedding=given["embedding"], hidden=given["hidden"]), given["vocab"])
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        config = EngineConfig(zero_stage=1, timeout_seconds=600)
        self.engine = Engine(
            model, lambda m: optim.build(m, optim.OptimConfig()), config, self.workers, given["lanes"], clip=0.25
        )
        self.given = given
        self.state = TrainState(carry=self.engine.initial_carry(len(self.lanes)))

    def step(self, saver: Saver | None = None) -> float:
        """Seconds of a step, as `Training.step` goes."""
        begun = time.monotonic()
        shape = (len(self.lanes), self.given["bptt"] + 1)
        tokens = torch.randint(self.given["vocab"], shape, generator=torch.Generator().manual_seed(self.state.step))
        batch = Batch(tokens[:, :-1], tokens[:, 1:])
        masks = Masks(1, self.state.step, self.lanes, self.workers.device)
        assert self.state.carry is not None
        targets = self.given["lanes"] * self.given["bptt"]
        nll, carry = self.engine.forward_backward(batch, self.state.carry, masks, targets)
        flags = saver.flags() if saver is not None else (0.0, 0.0)
        _, done, failed = self.workers.total(nll, *flags)
        if saver is not None:
            saver.tick(done, failed)
        self.engine.update(optim.Knobs(1e-4))
        self.state = TrainState(step=self.state.step + 1, carry=carry)
        return time.monotonic() - begun


def timed(action: Callable[[], object]) -> float:
    begun = time.monotonic()
    action()
    return time.monotonic() - begun


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    given: dict[str, int] = dict(DEFAULTS)  # type: ignore[arg-type]
    work = ""
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key not in DEFAULTS or not value:
            sys.exit(f"checkpoint: no key {key!r}; the keys are {', '.join(DEFAULTS)}")
        if key == "work":
            work = value
        else:
            given[key] = int(value)
    if not work or Path(work).exists():
        sys.exit("checkpoint: give work=NEW_DIR, a directory that does not exist yet")
    ours, theirs = Path(work, "chartlm"), Path(work, "deepspeed")
    theirs.mkdir(parents=True)
    trained = Trained(given)
    saver = Saver(str(ours), trained.engine, trained.lanes, {}, Retention(keep=1, keep_best=0))
    print(
        f"{trained.parameters:,} parameters, {given['lanes']} × {given['bptt']} tokens, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        flush=True,
    )
    for _ in range(2):
        trained.step()  # the optimizer makes its states
    undisturbed: list[float] = []
    blocked: list[float] = []
    stalled: list[float] = []
    whole: list[float] = []
    own: list[float] = []
    for round_ in range(given["rounds"]):
        steps = [trained.step(saver) for _ in range(given["steps"])]
        undisturbed += steps
        usual = statistics.median(steps)
        begun = time.monotonic()
        blocked.append(timed(lambda: saver.begin(trained.state)))
        extra = blocked[-1]
        step_of_save = trained.state.step
        while not Path(checkpoint.folder_of(str(ours), step_of_save), "manifest.json").exists():
            extra += trained.step(saver) - usual
        stalled.append(max(extra, blocked[-1]))
        whole.append(time.monotonic() - begun)
        own.append(timed(lambda: trained.engine._deepspeed.save_checkpoint(str(theirs), tag="saved")))
        print(
            f"round {round_ + 1}: step {usual:.2f} s; chartlm stands still {blocked[-1]:.2f} s, costs "
            f"{stalled[-1]:.2f} s, stands after {whole[-1]:.1f} s; DeepSpeed {own[-1]:.2f} s",
            flush=True,
        )
    saver.finish()
    step = checkpoint.steps_of(str(ours))[-1]
    sizes = {"chartlm": size_of(Path(checkpoint.folder_of(str(ours), step))), "deepspeed": size_of(theirs)}
    resumed, loaded = [], []
    for _ in range(given["rounds"]):

        def resume() -> None:
            folder = checkpoint.newest(str(ours))
            assert folder is not None
            checkpoint.resume(folder, trained.engine, trained.lanes, Path(work))

        resumed.append(timed(resume))
        loaded.append(timed(lambda: trained.engine._deepspeed.load_checkpoint(str(theirs), tag="saved")))
    saver.close()
    trained.workers.close()
    shutil.rmtree(work)
    seconds = 60 * given["every_minutes"]
    stall, save = statistics.median(stalled), statistics.median(own)
    print(
        json.dumps(
            {
                "stall_share": round(stall / seconds, 5),
                "resume_seconds": round(statistics.median(resumed), 2),
                "bytes_per_parameter": round(sizes["chartlm"] / trained.parameters, 3),
                "stall_seconds": round(stall, 2),
                "blocked_seconds": round(statistics.median(blocked), 2),
                "step_seconds": round(statistics.median(undisturbed), 2),
                "deepspeed_stall_share": round(save / seconds, 5),
                "deepspeed_stall_seconds": round(save, 2),
                "deepspeed_resume_seconds": round(statistics.median(loaded), 2),
                "deepspeed_bytes_per_parameter": round(sizes["deepspeed"] / trained.parameters, 3),
                "parameters": trained.parameters,
            }
        )
    )


if __name__ == "__main__":
    main()
