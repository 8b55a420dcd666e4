"""The loop: one start of a run on one worker."""

from __future__ import annotations

import contextlib
import math
import resource
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cluster import config, storage, tracking
from cluster.errors import Preempted, TrainingError
from pretrain import checkpoint, faults, optim
from pretrain import run as run_directory
from pretrain.checkpoint import Retention, Saver, TrainState
from pretrain.engine import Engine, Workers
from pretrain.evaluate import evaluate
from pretrain.models import MODELS
from pretrain.models.dropout import Masks
from pretrain.streams import Prefetch, lanes_of, open_streams

if TYPE_CHECKING:
    from pretrain.train import TrainRecipe

SMOOTHING = 0.98  # of the loss, a step
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, by NVIDIA's data sheets


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps is to be done after this one."""
    return step % every == 0


class Training:
    """One start of a run on one worker: what stands is loaded, then one loop. `state` is where the run is."""

    def __init__(self, recipe: TrainRecipe, workers: Workers, notice: faults.Notice, stack: contextlib.ExitStack):
        self.recipe, self.workers, self.notice = recipe, workers, notice
        corpora = run_directory.open_corpora(recipe.data)
        self.lanes = lanes_of(workers.rank, workers.world, recipe.data.lanes)
        splits = [corpus.split("train") for corpus in corpora]
        self.streams = open_streams(splits, recipe.data, recipe.seed, recipe.epochs)
        self.steps = recipe.total_steps(self.streams)
        self.valid, self.begins_word_V = corpora[-1].split("valid"), corpora[-1].tokenizer.begins_word
        first = workers.first
        about = workers.agree(run_directory.enter(recipe.run_dir, recipe, corpora) if first else None)
        self.cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chartlm-")))
        workers.see(storage.join(recipe.run_dir, run_directory.FILE))
        folder = workers.agree(checkpoint.newest(recipe.run_dir, self.cache) if first else None)
        torch.manual_seed(recipe.seed)  # the initial weights
        model = MODELS[recipe.model.name](recipe.model, corpora[0].vocab_size)
        if folder is None and about["init_from"] is not None:
            run_directory.init_weights(model, about["init_from"], corpora[0].tokenizer, self.cache)
        self.engine = Engine(
            model, lambda m: optim.build(m, recipe.optim), recipe.engine, workers, recipe.data.lanes, recipe.optim.clip
        )
        self.state = TrainState()
        if folder is not None:
            self.state = checkpoint.resume(folder, self.engine, self.lanes, self.cache)
        retention = Retention(recipe.keep, recipe.keep_best, recipe.keep_every)
        if folder is not None and first:
            checkpoint.retire(recipe.run_dir, self.state.step, retention)  # what a start cut short has left
        self.track: tracking.Track | None = None
        if self.state.step >= self.steps:
            return  # finished before; there is nothing to add to its metrics
        self._with_carry()
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
        self.knobs = optim.knobs(state.step, self.steps, recipe.optim, state.averaging_since)
        if recipe.data.jitter:  # arXiv:1708.02182 §4.1
            scale = self.streams.length_of(state.step) / recipe.data.bptt
            self.knobs = self.knobs._replace(lr=self.knobs.lr * scale)
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
            self.grad_norm, applied = engine.update(self.knobs)
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
                lr=self.knobs.lr,
                grad_norm=self.grad_norm,
                epoch=self.streams.epoch_of(state.step),
                tokens=state.tokens,
                workers=self.workers.world,
                nodes=self.workers.nodes,
                **self._clock.since_last(),
            )
        self.state = replace(state, pending_nll=0.0, pending_targets=0)

    def validate(self) -> bool:
        """Scores on the validation patients; returns whether a notice to stop cut them short."""

        def told() -> bool:
            return self.workers.total(float(self.notice.stop))[0] > 0

        with self.engine.averaged():
            scores = evaluate(
                self.engine,
                self.valid,
                self.recipe.data,
                self.lanes,
                self.workers.total,
                interrupted=told,
                begins_word_V=self.begins_word_V,
            )
        if scores is None:
            return True
        if self.track is not None:
            numbers = asdict(scores)
            categories = numbers.pop("loss_of_category")
            lines = {f"valid_{key}": value for key, value in numbers.items()}
            lines |= {f"valid_loss/{name}": value for name, value in categories.items()}
            self.track.log(step=self.state.step, **lines)
        self.state = replace(self.state, valid_loss=scores.loss)
        if self.recipe.optim.average == "nt-asgd" and self.state.averaging_since is None:
            history = (*self.state.valid_losses, scores.loss)
            self.state = replace(self.state, valid_losses=history)
            if optim.no_longer_improves(history, self.recipe.optim.patience):
                self.state = replace(self.state, averaging_since=self.state.step)
                self.mark("averages", self.state.step)
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
                flops = self._training.engine.model.flops(self._training.recipe.data.bptt)  # type: ignore[operator]
                numbers["mfu"] = flops * rate / (peak * self._training.workers.world)
        else:
            numbers["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return numbers
