"""Fine-tuning in stages: the head alone, then the top layer with it, then everything (ULMFiT §3.3).

    head   every note is read once by the frozen language model; the head learns on the stored pooled states
    top    the language model's top layer learns too
    all    all of it

Within a stage the learning rate is a slanted triangle (eq. 3); a group of layers learns `lr_decay` times slower than
the one above (§3.2). After every epoch the validation score is taken; the best epoch of all stages is what remains, so a
late stage that does harm costs time and nothing else. Masks and the order of notes derive from (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cluster.config import Section
from cluster.errors import TrainingError
from downstream.classifier import NoteClassifier, Notes, batches, padded
from downstream.metrics import Floats, Ints, selection
from pretrain.models.dropout import Masks


class StagesConfig(Section):
    """How long and how fast each stage learns."""

    epochs_head: int = Field(20, ge=1)
    epochs_top: int = Field(1, ge=0)
    epochs_all: int = Field(3, ge=0)
    lr_head: float = Field(1e-2, gt=0, description="peak learning rate while only the head learns")
    lr: float = Field(3e-3, gt=0, description="peak learning rate of the head in the later stages")
    lr_decay: float = Field(
        2.6, ge=1, description="each group below learns this many times slower (ULMFiT §3.2)"
    )
    weight_decay: float = Field(0.01, ge=0)
    batch: int = Field(32, ge=2, description="notes a step")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    drop_scale: float = Field(
        0.5, ge=0, description="multiplies the language model's dropouts (fastai's drop_mult)"
    )


class Labelled(NamedTuple):
    """The notes of a split as tokens, their labels [N], and their pooled states [N, 3E] of the frozen model."""

    notes: Notes
    labels: Ints
    pooled: Tensor


class Epoch(NamedTuple):
    """What one epoch came to; `validation` is AUROC or macro-F1."""

    stage: str
    epoch: int
    loss: float
    validation: float


def slanted_triangle(step: int, steps: int, cut: float = 0.1, ratio: float = 32) -> float:
    """Share of the peak learning rate at `step` of `steps` (ULMFiT eq. 3): up over `cut` of the way, then down."""
    peak = max(1, int(steps * cut))
    p = step / peak if step < peak else 1 - (step - peak) / max(1, steps - peak)
    return (1 + p * (ratio - 1)) / ratio


def class_weights(labels_N: Ints, classes: int) -> Tensor:
    """Weights [K] with which every class counts the same in the loss: N / (K · N_k)."""
    return torch.tensor(
        len(labels_N) / (classes * np.bincount(labels_N, minlength=classes)), dtype=torch.float32
    )


@torch.no_grad()
def pooled_states(
    classifier: NoteClassifier, notes: Notes, batch: int, advance: Callable[[int], None]
) -> Tensor:
    """Pooled states [N, 3E] of every note, without dropout; `advance` hears of the tokens read."""
    classifier.eval()
    device = next(classifier.parameters()).device
    rows: list[Tensor] = [torch.empty(0)] * len(notes)
    for indices in batches([len(note) for note in notes], batch, None):
        tokens_BT, lengths_B = padded([notes[i] for i in indices], device)
        for i, row in zip(indices, classifier.read(tokens_BT, lengths_B, None), strict=True):
            rows[i] = row
        advance(int(lengths_B.sum()))
    return torch.stack(rows)


@torch.no_grad()
def probabilities(classifier: NoteClassifier, pooled_NP: Tensor) -> Floats:
    """Class probabilities [N, K] from pooled states."""
    classifier.eval()
    return np.asarray(torch.softmax(classifier.head(pooled_NP, None).double(), 1).cpu().numpy())


def fine_tune(
    classifier: NoteClassifier,
    train: Labelled,
    valid: Labelled,
    config: StagesConfig,
    seed: int,
    advance: Callable[[int, str], None],
) -> list[Epoch]:
    """Trains `classifier` in place through the stages and leaves it at its best epoch; returns every epoch.

    `advance` hears of the tokens read and the last validation score. Raises TrainingError for a loss that is not finite.
    """
    groups = classifier.parameter_groups()
    device = train.pooled.device
    labels_N = torch.from_numpy(train.labels).to(device)
    weight_K = class_weights(train.labels, classifier.classes).to(device)
    history: list[Epoch] = []
    best: dict[str, Tensor] = {}
    for stage, depth, epochs, lr in (
        ("head", 1, config.epochs_head, config.lr_head),
        ("top", 2, config.epochs_top, config.lr),
        ("all", len(groups), config.epochs_all, config.lr),
    ):
        # Pooled states are stored in the first stage, so that nothing is padded and a batch may be of any notes.
        lengths = [1 if stage == "head" else len(note) for note in train.notes]
        steps_per_epoch = -(-len(lengths) // config.batch)
        optimizer = torch.optim.AdamW(
            _unfreeze(groups, depth, lr, config.lr_decay), betas=(0.8, 0.99), weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step, steps=epochs * steps_per_epoch: slanted_triangle(step, steps)
        )
        for epoch in range(epochs):
            classifier.train()
            losses = []
            for step, indices in enumerate(
                batches(lengths, config.batch, np.random.default_rng([seed, len(history)]))
            ):
                drawn = (
                    len(history) * steps_per_epoch + step
                )  # no step of any stage draws the masks of another
                masks = Masks(seed, drawn, indices.tolist(), device, config.drop_scale)
                if stage == "head":
                    logits_BK = classifier.head(train.pooled[indices], masks)
                else:
                    logits_BK = classifier(*padded([train.notes[i] for i in indices], device), masks)
                    advance(sum(lengths[i] for i in indices), "")
                loss = functional.cross_entropy(logits_BK, labels_N[indices], weight_K)
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"the loss of stage {stage}, epoch {epoch + 1} is not finite; lower stages.lr"
                    )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(classifier.parameters(), config.clip)
                optimizer.step()
                schedule.step()
                losses.append(float(loss))
            pooled_NP = valid.pooled
            if stage != "head":
                pooled_NP = pooled_states(
                    classifier, valid.notes, config.batch, lambda read: advance(read, "")
                )
            score = selection(valid.labels, probabilities(classifier, pooled_NP))
            if not history or score > max(one.validation for one in history):
                best = {name: value.clone() for name, value in classifier.state_dict().items()}
            history.append(Epoch(stage, epoch, float(np.mean(losses)), score))
            advance(0, f"{stage} {epoch + 1}/{epochs}, validation {score:.3f}")
    classifier.load_state_dict(best)
    return history


def _unfreeze(groups: list[list[nn.Parameter]], depth: int, lr: float, decay: float) -> list[dict[str, Any]]:
    """Lets the top `depth` groups learn and no other; the optimizer's groups with their peak learning rates."""
    for group in groups:
        for parameter in group:
            parameter.requires_grad_(False)
    learning = []
    for height, group in enumerate(reversed(groups[len(groups) - depth :])):
        for parameter in group:
            parameter.requires_grad_(True)
        learning.append({"params": group, "lr": lr / decay**height})
    return learning
