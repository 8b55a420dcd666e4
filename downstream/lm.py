"""LM fine-tuning on the target text (ULMFiT §3.2): the pretrained model reads the notes of the task before it is asked
anything, all but those it will be tested on; labels play no part.

The notes are those of the recipe's `lm.notes`, else the cohort's. What was learned is kept under
RUN/finetune/lm/FINGERPRINT.safetensors, by checkpoint, settings and the very texts, so recipes that differ in labels or
head share it, and a run that goes on does not learn it again. A reading that is interrupted goes on from where it stood
up to five minutes before, with the same result.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from cluster import config, logs, storage
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError, TrainingError
from downstream.tasks.table import rows
from downstream.unfreezing import slanted_triangle
from pretrain.heads import HEADS, nll
from pretrain.models.dropout import Masks
from pretrain.run import Trained

SAVE_SECONDS = 300.0  # between two states that an interrupted reading goes on from


class LmConfig(Section):
    """Section [lm]."""

    epochs: int = Field(0, ge=0, description="passes over the notes; 0: the language model is taken as it is")
    notes: Place | None = Field(None, description="unlabelled notes: CSV, JSON lines or Parquet; else the cohort's own")
    text: str = Field("text", description="its column of the note")
    patient: str = Field("patient", description="its column of the patient, with ids as in the task")
    lr: float = Field(4e-3, gt=0, description="peak learning rate of the top layer")
    lr_decay: float = Field(2.6, ge=1, description="each layer below learns so much slower (ULMFiT §3.2)")
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(0.25, gt=0)
    lanes: int = Field(32, ge=1)
    bptt: int = Field(70, ge=1, description="tokens")
    drop_scale: float = Field(1.0, ge=0, description="multiplies the language model's dropouts (drop_mult)")


def unlabelled(settings: LmConfig, trained: Trained) -> list[tuple[str, str]]:
    """(patient, cleaned text) of the notes of `lm.notes`, those without a word left out."""
    assert settings.notes is not None
    found = [
        (patient, trained.clean_text(text)) for text, patient in rows(settings.notes, [settings.text, settings.patient])
    ]
    return [(patient, text) for patient, text in found if text.strip()]


def tuned(trained: Trained, settings: LmConfig, texts: Sequence[str], seed: int) -> str:
    """Lets the language model read `texts`, unless it has before; returns the name of its weights.

    Raises DataError for too little text, TrainingError for a loss that is not finite.
    """
    name = f"{_fingerprint(trained, settings, texts, seed)}.safetensors"
    place = place_of(trained, name)
    if not storage.exists(place):
        weights = _tune(trained, settings, texts, seed, f"{place}.partial")
        storage.write_bytes(place, safetensors.torch.save({k: v.contiguous().clone() for k, v in weights.items()}))
        storage.remove(f"{place}.partial")
    return name


def place_of(trained: Trained, name: str) -> str:
    """Where weights of that name are."""
    return storage.join(trained.run, "finetune", "lm", name)


def with_weights(trained: Trained, name: str) -> Trained:
    """The model with the weights that `tuned` has left. Raises ConfigError where they are gone."""
    place = place_of(trained, name)
    if not storage.exists(place):
        raise ConfigError(f"{place}: missing; fine-tune again in another out=")
    model = copy.deepcopy(trained.model)
    weights: dict[str, Tensor] = safetensors.torch.load(storage.read_bytes(place))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights[parameter_name])
    return trained.with_model(model.eval())


def _fingerprint(trained: Trained, settings: LmConfig, texts: Sequence[str], seed: int) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    about: dict[str, Any] = config.dump(settings) | {"notes": digest.hexdigest()}
    return config.fingerprint([about, trained.step, trained.checkpoint_sha256, seed])[:16]


def _lanes(notes: Sequence[np.ndarray], lanes: int, order: np.random.Generator, backward: bool) -> Tensor:
    """All tokens in a random order of notes, as `lanes` rows side by side."""
    joined = np.concatenate([notes[i][::-1] if backward else notes[i] for i in order.permutation(len(notes))])
    length = len(joined) // lanes
    return torch.from_numpy(joined[: length * lanes].astype(np.int64)).view(lanes, length)


def _tune(trained: Trained, settings: LmConfig, texts: Sequence[str], seed: int, partial: str) -> dict[str, Tensor]:
    """The weights after reading `texts`. Interrupted, it goes on from `partial` as if it had not been."""
    notes = trained.tokenizer.encode(texts)
    tokens = sum(map(len, notes))
    if tokens < 2 * settings.lanes:
        raise DataError(f"[lm]: {tokens} tokens in {len(notes)} notes are too few for lm.lanes={settings.lanes}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = copy.deepcopy(trained.model).to(device).train()
    groups = model.layer_groups()
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "lr": settings.lr / settings.lr_decay**height, "weight_decay": settings.weight_decay}
            for height, group in enumerate(reversed(groups))
        ],
        betas=(0.8, 0.99),
    )
    in_epoch = -(-(tokens // settings.lanes - 1) // settings.bptt)
    steps = settings.epochs * in_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(slanted_triangle, steps=steps))
    carry, recent, first = model.initial_carry(settings.lanes), 0.0, 0
    if storage.exists(partial):
        found = torch.load(io.BytesIO(storage.read_bytes(partial)), "cpu", weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        schedule.load_state_dict(found["schedule"])
        carry = {name: value.to(device) for name, value in found["carry"].items()}
        recent, first = found["recent"], found["step"]
    began = saved = time.monotonic()
    with logs.progress("LM fine-tuning", steps) as show:
        for step in range(first, steps):
            epoch, at = divmod(step, in_epoch)
            if step == first or not at:
                order = np.random.default_rng([seed, epoch])
                all_BT = _lanes(notes, settings.lanes, order, trained.backward).to(device)
            if not at:
                carry = model.initial_carry(settings.lanes)
            start = at * settings.bptt
            targets_BT = all_BT[:, start + 1 : start + 1 + settings.bptt]
            tokens_BT = all_BT[:, start : start + targets_BT.shape[1]]
            masks = Masks(seed, step, range(settings.lanes), device, settings.drop_scale)
            hidden, carry = model(tokens_BT, carry, masks)
            output_NE = hidden.output_BTE.flatten(0, 1)
            loss = nll(HEADS["chunked"], output_NE, model.softmax(), targets_BT.flatten()) / targets_BT.numel()
            if not torch.isfinite(loss):
                raise TrainingError(f"[lm], epoch {epoch + 1}: loss not finite; lower lm.lr")
            optimizer.zero_grad()
            (loss + model.penalty(hidden)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            recent = 0.95 * recent + 0.05 * loss.item() if step else loss.item()
            rate = (step + 1 - first) * settings.lanes * settings.bptt / (time.monotonic() - began)
            show(step + 1, f"epoch {epoch + 1}/{settings.epochs}, loss {recent:.3f}, {rate:,.0f} tokens/s")
            if time.monotonic() - saved >= SAVE_SECONDS:
                parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
                states = {name: part.state_dict() for name, part in parts.items()}
                kept = io.BytesIO()
                torch.save({**states, "carry": carry, "recent": recent, "step": step + 1}, kept)
                storage.write_bytes(partial, kept.getvalue())
                saved = time.monotonic()
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
