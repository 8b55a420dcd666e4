"""Checkpoints: directories `checkpoints/step-00001200/` that know nothing of workers or ZeRO stages.

    tensors-00000.safetensors …  parameters and optimizer states by name, carry by global lane; one file a writer
    state.json                   step, counters, what the tensors belong to
    manifest.json                sizes and sha256 of the files above; written last

A directory without a manifest that verifies does not exist. Loading never unpickles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cluster import storage
from cluster.errors import StorageError, TrainingError
from cluster.logs import say
from pretrain.engine import PARAMETER, Engine
from pretrain.models.awd_lstm import Carry

FORMAT = 1
FOLDER = "checkpoints"


@dataclass(frozen=True)
class TrainState:
    """Everything beside parameters and optimizer that must survive a restart."""

    step: int = 0  # steps done
    tokens: int = 0  # targets trained on
    pending_nll: float = 0.0  # nats since the last logged step, over all lanes
    pending_targets: int = 0
    optimizer_step: int = 0
    carry: Carry | None = None  # of this worker's lanes; None = zeros

    def counters(self) -> dict[str, Any]:
        """All but the carry, as JSON values (floats keep every bit)."""
        return {key: value for key, value in asdict(replace(self, carry=None)).items() if key != "carry"}


def _folder(run: str, step: int) -> str:
    return storage.join(run, FOLDER, f"step-{step:08d}")


def save(run: str, engine: Engine, state: TrainState, lanes: range, identity: dict[str, Any], keep: int) -> None:
    """Writes the checkpoint of `state.step` and keeps the newest `keep`. Every worker must call it.

    `identity` says what the checkpoint belongs to (corpus, tokenizer, recipe).
    """
    workers = engine.workers
    folder = _folder(run, state.step)
    mine: dict[str, Tensor] = {}
    states = engine.state_names()
    for index, (parameter, key, tensor) in enumerate(engine.tensors()):
        if index % workers.world == workers.rank:
            mine[f"{parameter}/{key}"] = tensor.contiguous()
    for name, tensor in (state.carry or {}).items():
        mine[f"carry/{name}/{lanes.start:08d}"] = tensor.detach().cpu().contiguous()
    name = f"tensors-{workers.rank:05d}.safetensors"
    data = safetensors.torch.save(mine)
    storage.write_bytes(storage.join(folder, name), data)
    files = workers.gather({"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    if workers.first:
        counters = replace(state, optimizer_step=engine.optimizer_step()).counters()
        storage.write_json(
            storage.join(folder, "state.json"), {"counters": counters, "states": states, "identity": identity}
        )
        written = storage.read_bytes(storage.join(folder, "state.json"))
        files.append({"name": "state.json", "size": len(written), "sha256": hashlib.sha256(written).hexdigest()})
        storage.write_json(storage.join(folder, "manifest.json"), {"format": FORMAT, "files": files})
        _retire(run, keep)
    workers.agree(None)  # nobody goes on (and may die) before the manifest stands


def _retire(run: str, keep: int) -> None:
    """Removes the oldest directories, manifest first, so that a half removed one is no checkpoint."""
    steps = [name for name in storage.names(storage.join(run, FOLDER)) if name.startswith("step-")]
    for name in steps[:-keep]:
        folder = storage.join(run, FOLDER, name)
        storage.remove(storage.join(folder, "manifest.json"))
        storage.remove(folder)


def newest(run: str) -> str | None:
    """URL of the newest checkpoint that verifies; damaged ones are named and passed over. None where there is none."""
    for name in reversed(storage.names(storage.join(run, FOLDER))):
        folder = storage.join(run, FOLDER, name)
        if not name.startswith("step-") or not storage.exists(storage.join(folder, "manifest.json")):
            continue
        damage = verify(folder)
        if damage is None:
            return folder
        say(f"{folder}: passed over, {damage}")
    return None


def newest_step(run: str) -> int | None:
    """Step of the newest checkpoint that verifies, or None."""
    folder = newest(run)
    return None if folder is None else int(folder.rsplit("-", 1)[-1])


def verify(folder: str) -> str | None:
    """What is wrong with a checkpoint directory, or None."""
    try:
        manifest = storage.read_json(storage.join(folder, "manifest.json"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        for entry in manifest["files"]:
            url = storage.join(folder, entry["name"])
            if storage.size_bytes(url) != entry["size"] or storage.sha256(url) != entry["sha256"]:
                return f"{entry['name']} is not what was written"
    except (StorageError, KeyError, TypeError) as exc:
        return f"{type(exc).__name__}: {exc}"
    return None


class Reader:
    """The tensors and counters of one checkpoint, read lazily by name."""

    def __init__(self, folder: str, cache: Path):
        self.folder = folder
        manifest = storage.read_json(storage.join(folder, "manifest.json"))
        stored = storage.read_json(storage.join(folder, "state.json"))
        self.identity: dict[str, Any] = stored["identity"]
        self.states: list[str] = stored["states"]
        self.state = TrainState(**stored["counters"])
        self._where: dict[str, Any] = {}
        for entry in manifest["files"]:
            if entry["name"].endswith(".safetensors"):
                path = storage.fetch(storage.join(folder, entry["name"]), cache)
                opened = safetensors.safe_open(path, framework="pt")
                self._where.update(dict.fromkeys(opened.keys(), opened))

    def tensor(self, parameter: str, key: str = PARAMETER) -> Tensor:
        """A parameter or an optimizer state of it, whole, fp32."""
        name = f"{parameter}/{key}"
        if name not in self._where:
            raise TrainingError(f"{self.folder}: holds no {name}; the recipe's model is not the one of this run")
        return self._where[name].get_tensor(name)  # type: ignore[no-any-return]

    def carry(self, lanes: range) -> Carry | None:
        """The carry of some global lanes, whatever workers wrote it; None where there was none yet."""
        parts: dict[str, list[Tensor]] = {}
        for name in sorted(name for name in self._where if name.startswith("carry/")):
            parts.setdefault(name.split("/")[1], []).append(self._where[name].get_tensor(name))
        return {name: torch.cat(rows)[lanes.start : lanes.stop] for name, rows in parts.items()} or None

    def load_model(self, model: torch.nn.Module) -> None:
        """Sets the parameters of a plain module (evaluation, generation, fine-tuning)."""
        for name, parameter in model.named_parameters():
            parameter.data.copy_(self.tensor(name))


def resume(folder: str, engine: Engine, lanes: range, cache: Path) -> TrainState:
    """Puts a checkpoint into the engine; returns the state to go on from."""
    stored = Reader(folder, cache)
    read: Callable[[str, str], Tensor] = stored.tensor
    engine.restore(stored.states, stored.state.optimizer_step, read)
    carry = stored.carry(lanes)
    if carry is not None:
        carry = {name: tensor.to(engine.workers.device) for name, tensor in carry.items()}
    return replace(stored.state, carry=carry)
