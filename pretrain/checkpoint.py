"""Checkpoints: directories `checkpoints/step-00001200/` that know nothing of workers or ZeRO stages.

    tensors-00000.safetensors …  what each worker holds of parameters and optimizer states; carry by lane
    state.json                   step, counters, a forward check, what the tensors belong to
    manifest.json                sizes and sha256 of the files above; written last

A directory without a manifest that verifies does not exist. Loading never unpickles. Training pays for a copy in
memory; files are written behind its back (`Saver`), and the manifest when all workers' files stand.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import safetensors
import torch
from torch import Tensor

from cluster import storage
from cluster.errors import StorageError, TrainingError
from cluster.logs import say
from pretrain.models import Carry
from pretrain.optim import AVERAGE, PARAMETER
from pretrain.scoring import Scorer
from pretrain.streams import Batch

if TYPE_CHECKING:
    from pretrain.engine import Engine  # a checkpoint is also read where no DeepSpeed is

FORMAT = 2
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
# Other hardware and another precision sum in another order; a wrong or missing weight is far beyond.
_CHECK_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep`, the best `keep_best` of those saved right after a validation, and for
    good those whose step is a multiple of `keep_every`.
    """

    keep: int = 2
    keep_best: int = 1
    keep_every: int | None = None


@dataclass(frozen=True)
class TrainState:
    """Everything beside parameters and optimizer that must survive a restart."""

    step: int = 0  # segments gone through, whether trained on or skipped
    tokens: int = 0  # targets trained on
    pending_nll: float = 0.0  # nats since the last logged step, over all lanes
    pending_targets: int = 0
    smoothed_loss: float | None = None
    recent_losses: tuple[float, ...] = ()  # of the last steps, against which a spike is measured
    bad_in_a_row: int = 0  # steps skipped since the last good one
    skipped: tuple[tuple[int, int], ...] = ()  # [from, to) in steps: data passed over after a rollback
    valid_loss: float | None = None  # where this very step was validated
    valid_losses: tuple[float, ...] = ()  # of all validations; only while NT-ASGD waits for its trigger
    averaging_since: int | None = None  # the step of that trigger
    optimizer_step: int = 0
    carry: Carry | None = None  # of this worker's lanes; None = zeros

    def counters(self) -> dict[str, Any]:
        """All but the carry, as JSON values (floats keep every bit)."""
        return {key: value for key, value in asdict(replace(self, carry=None)).items() if key != "carry"}

    @classmethod
    def of(cls, counters: dict[str, Any]) -> TrainState:
        """The state of `counters`, without a carry."""
        values = dict(counters)
        values["recent_losses"] = tuple(values["recent_losses"])
        values["valid_losses"] = tuple(values.get("valid_losses", ()))
        values["skipped"] = tuple((start, stop) for start, stop in values["skipped"])
        return cls(**values)


def folder_of(run: str, step: int) -> str:
    """URL of the checkpoint of a step."""
    return storage.join(run, FOLDER, f"step-{step:08d}")


def steps_of(run: str) -> list[int]:
    """Steps of which there is a directory, complete or not."""
    return [int(name[5:]) for name in storage.names(storage.join(run, FOLDER)) if name.startswith("step-")]


def forward_check(scorer: Scorer, vocab_size: int) -> float:
    """Nats a token on a few fixed tokens, without dropout or carry: what must come out again after loading. A
    collective.
    """
    draws = np.random.Generator(np.random.Philox(vocab_size)).integers(vocab_size, size=(2, 33))
    batch = Batch(torch.from_numpy(draws[:, :-1].copy()), torch.from_numpy(draws[:, 1:].copy()))
    nll_N, _, _ = scorer.score(batch, scorer.initial_carry(2))
    return float(nll_N.double().mean())


def _write_tensors(stream: BinaryIO, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes tensors in the format of safetensors as a stream; returns (bytes, sha256).

    The library would make one more copy in memory, hold Python's lock meanwhile, and have the file read for its hash.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    written = 0
    head = [memoryview(len(text).to_bytes(8, "little")), memoryview(text)]
    for part in (*head, *(_bytes_of(tensor) for tensor in tensors.values())):
        digest.update(part)
        stream.write(part)
        written += len(part)
    return written, digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class Saver:
    """Saves of one run, one in flight. Every worker makes the same calls at the same steps; `flags` and `tick` go
    through the sum over workers that each step makes anyway, so no thread ever talks to another worker.
    """

    def __init__(self, run: str, engine: Engine, lanes: range, identity: dict[str, Any], retention: Retention):
        self.run, self.engine, self.lanes, self.identity, self.retention = run, engine, lanes, identity, retention
        self.stalled = 0.0  # seconds that training has waited for saves
        self.saved_step: int | None = None  # of the newest save begun
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copies: dict[str, Tensor] = {}
        self._writing: Future[dict[str, Any]] | None = None  # this worker's file of the save in flight
        self._closing: Future[None] | None = None  # the manifest; the first worker's
        self._head: dict[str, Any] = {}  # state.json of the save in flight

    @contextlib.contextmanager
    def _stalling(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.stalled += time.monotonic() - begun

    def begin(self, state: TrainState) -> None:
        """Copies what belongs to `state` and starts writing it. Waits until the save before stands on every worker: the
        first one clears away whatever lies beyond the step it closes. A collective.
        """
        self.finish()
        with self._stalling():
            engine, workers = self.engine, self.engine.workers
            mine: dict[str, Tensor] = {}
            for parameter, key, start, part in engine.parts():
                name = f"{parameter}/{key}@{start:012d}"
                mine[name] = self._copy(name, part)
            for layer, value in (state.carry or {}).items():
                name = f"carry/{layer}/{self.lanes.start:08d}"
                mine[name] = self._copy(name, value.detach())
            if workers.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            self._head = {
                "counters": replace(state, optimizer_step=engine.optimizer_step()).counters(),
                "states": engine.state_names(),
                "shapes": engine.shapes(),
                "check": {
                    "nll": forward_check(engine, engine.vocab_size),
                    "precision": engine.config.precision,
                },
                "identity": self.identity,
            }
            folder = folder_of(self.run, state.step)
            self._writing = self._thread.submit(self._write, folder, f"tensors-{workers.rank:05d}.safetensors", mine)
            self.saved_step = state.step

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            pinned = tensor.is_cuda
            copy = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return copy.copy_(tensor, non_blocking=tensor.is_cuda)

    @staticmethod
    def _write(folder: str, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if sys.platform == "linux":  # there nice is a thread's own: this one gives way to those that compute
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        with storage.atomic_writer(storage.join(folder, name)) as stream:
            size, digest = _write_tensors(stream, tensors)
        return {"name": name, "size": size, "sha256": digest}

    def flags(self) -> tuple[float, float]:
        """(1 where this worker's part of the save in flight is done, 1 where something failed), for the step's sum."""
        done = self._writing is not None and self._writing.done()
        return float(done), float(self._error() is not None)

    def _error(self) -> BaseException | None:
        for future in (self._writing, self._closing):
            if future is not None and future.done() and future.exception() is not None:
                return future.exception()
        return None

    def tick(self, done: float, failed: float) -> None:
        """What the sums of `flags` over all workers ask for: the manifest, or the end of the run (StorageError)."""
        workers = self.engine.workers
        if failed:
            errors = workers.gather(None if (error := self._error()) is None else str(error))
            raise StorageError(
                f"{next(error for error in errors if error)} (a checkpoint could not be saved; the one before it is "
                "good: the same command goes on from there)"
            )
        if self._writing is not None and done == workers.world:
            with self._stalling():
                files = workers.gather(self._writing.result())
                self._writing = None
                if workers.first and self.saved_step is not None:
                    self._closing = self._thread.submit(self._close, self.saved_step, files, self._head)

    def finish(self) -> None:
        """Waits until the save in flight stands. A collective. Raises StorageError where storage stalls or refuses."""
        with self._stalling():
            for future in ("_writing", "_closing"):
                waiting = getattr(self, future)
                if waiting is not None:
                    concurrent.futures.wait([waiting], self.engine.config.timeout_seconds)
                    if not waiting.done():
                        failed: Future[None] = Future()
                        failed.set_exception(
                            StorageError(
                                f"{self.run}: storage took longer than {self.engine.config.timeout_seconds} s to write"
                            )
                        )
                        setattr(self, future, failed)
                self.tick(*self.engine.workers.total(*self.flags()))

    def _close(self, step: int, files: list[dict[str, Any]], head: dict[str, Any]) -> None:
        folder = folder_of(self.run, step)
        text = (json.dumps(head, indent=1, sort_keys=True) + "\n").encode()
        storage.write_bytes(storage.join(folder, STATE), text)
        files = [*files, {"name": STATE, "size": len(text), "sha256": hashlib.sha256(text).hexdigest()}]
        storage.write_json(storage.join(folder, MANIFEST), {"format": FORMAT, "files": files})
        retire(self.run, step, self.retention)

    def close(self) -> None:
        """Ends the thread; what is in flight is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def retire(run: str, newest: int, retention: Retention) -> None:
    """Removes what the retention does not keep of the checkpoints up to step `newest`, which stands, and whatever lies
    beyond it; manifest first, so that a half removed one is no checkpoint.
    """
    whole: list[int] = []
    rest: list[int] = []
    for step in steps_of(run):
        stands = step <= newest and storage.exists(storage.join(folder_of(run, step), MANIFEST))
        (whole if stands else rest).append(step)
    kept = set(whole[-retention.keep :])
    if retention.keep_every:
        kept.update(step for step in whole if step % retention.keep_every == 0)
    if retention.keep_best:
        losses = {step: _valid_loss(run, step) for step in whole}
        best = sorted((loss, step) for step, loss in losses.items() if loss is not None)
        kept.update(step for _, step in best[: retention.keep_best])
    for step in rest + [step for step in whole if step not in kept]:
        folder = folder_of(run, step)
        storage.remove(storage.join(folder, MANIFEST))
        storage.remove(folder)


def _valid_loss(run: str, step: int) -> float | None:
    loss: float | None = storage.read_json(storage.join(folder_of(run, step), STATE))["counters"]["valid_loss"]
    return loss


def newest(run: str, cache: Path | None = None) -> str | None:
    """URL of the newest checkpoint that verifies; damaged ones are named and passed over. None where there is none.

    Remote files are copied into `cache` on the way, for `Reader` to find.
    """
    for step in reversed(steps_of(run)):
        folder = folder_of(run, step)
        if not storage.exists(storage.join(folder, MANIFEST)):
            continue
        damage = verify(folder, cache)
        if damage is None:
            return folder
        say(f"{folder}: passed over, {damage}")
    return None


def last_saved(run: str) -> int:
    """Step of the newest checkpoint that is said to be whole (nothing is read to see whether it is); 0 without one."""
    whole = (step for step in steps_of(run) if storage.exists(storage.join(folder_of(run, step), MANIFEST)))
    return max(whole, default=0)


def newest_step(run: str) -> int | None:
    """Step of the newest checkpoint that verifies, or None."""
    folder = newest(run)
    return None if folder is None else int(folder.rsplit("-", 1)[-1])


def verify(folder: str, cache: Path | None = None) -> str | None:
    """What is wrong with a checkpoint directory, or None."""
    try:
        manifest = storage.read_json(storage.join(folder, MANIFEST))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        for entry in manifest["files"]:
            url = storage.join(folder, entry["name"])
            if storage.size_bytes(url) != entry["size"]:
                return f"{entry['name']} is not what was written"
            if cache is not None:
                url = str(storage.fetch(url, _cached(cache, folder)))
            if storage.sha256(url) != entry["sha256"]:
                return f"{entry['name']} is not what was written"
    except (StorageError, KeyError, TypeError) as exc:
        return f"{type(exc).__name__}: {exc}"
    return None


def _cached(cache: Path, folder: str) -> Path:
    return cache / folder.rsplit("/", 1)[-1]


class Reader:
    """The tensors and counters of one checkpoint, read lazily by name."""

    def __init__(self, folder: str, cache: Path):
        self.folder = folder
        manifest = storage.read_json(storage.join(folder, MANIFEST))
        stored = storage.read_json(storage.join(folder, STATE))
        self.identity: dict[str, Any] = stored["identity"]
        self.states: list[str] = stored["states"]
        self.check: dict[str, Any] = stored["check"]
        self.state = TrainState.of(stored["counters"])
        self._shapes: dict[str, list[int]] = stored["shapes"]
        self._where: dict[str, Any] = {}
        for entry in manifest["files"]:
            if entry["name"].endswith(".safetensors"):
                path = _cached(cache, folder) / entry["name"]
                if not path.exists():
                    path = storage.fetch(storage.join(folder, entry["name"]), _cached(cache, folder))
                opened = safetensors.safe_open(path, framework="pt")
                self._where.update(dict.fromkeys(opened.keys(), opened))

        self._parts: dict[str, list[str]] = {}
        for name in sorted(self._where):
            self._parts.setdefault(name.partition("@")[0], []).append(name)

    def tensor(self, parameter: str, key: str = PARAMETER) -> Tensor:
        """A parameter or an optimizer state of it, whole, fp32, put together from what the workers held."""
        name, shape = f"{parameter}/{key}", self._shapes.get(parameter, [])
        parts = [self._where[part].get_tensor(part) for part in self._parts.get(name, [])]
        if not parts or sum(part.numel() for part in parts) != math.prod(shape):
            raise TrainingError(f"{self.folder}: holds no whole {name}; the recipe's model is not the one of this run")
        return torch.cat(parts).view(shape)

    def weights(self, parameter: str) -> Tensor:
        """A parameter as the run would be used: the average, where one is kept."""
        return self.tensor(parameter, AVERAGE if AVERAGE in self.states else PARAMETER)

    def carry(self, lanes: range) -> Carry | None:
        """The carry of some global lanes, whatever workers wrote it; None where there was none yet."""
        parts: dict[str, list[Tensor]] = {}
        for name in sorted(name for name in self._where if name.startswith("carry/")):
            parts.setdefault(name.split("/")[1], []).append(self._where[name].get_tensor(name))
        return {name: torch.cat(rows)[lanes.start : lanes.stop] for name, rows in parts.items()} or None

    def confirm(self, scorer: Scorer, vocab_size: int, precision: str) -> None:
        """Raises TrainingError unless the forward check that was stored comes out again."""
        found = forward_check(scorer, vocab_size)
        tolerance = max(_CHECK_TOLERANCE[self.check["precision"]], _CHECK_TOLERANCE[precision])
        if not abs(found - self.check["nll"]) <= tolerance * abs(self.check["nll"]):
            raise TrainingError(
                f"{self.folder}: the loaded model gives {found:.6f} nats on the stored check, {self.check['nll']:.6f} "
                "when it was saved; the software that loads it computes something else: use the version that saved it"
            )


def resume(folder: str, engine: Engine, lanes: range, cache: Path) -> TrainState:
    """Puts a checkpoint into the engine; returns the state to go on from. A collective."""
    stored = Reader(folder, cache)
    read: Callable[[str, str], Tensor] = stored.tensor
    engine.restore(stored.states, stored.state.optimizer_step, read)
    stored.confirm(engine, engine.vocab_size, engine.config.precision)
    carry = stored.carry(lanes)
    if carry is not None:
        carry = {name: tensor.to(engine.workers.device) for name, tensor in carry.items()}
    return replace(stored.state, carry=carry)
