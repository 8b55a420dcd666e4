"""Fine-tuning in stages: the head alone, then the top layer with it, then everything (ULMFiT §3.3).

    head   every note is read once by the frozen language model; the head learns on the kept states
    top    the language model's top layer learns too
    all    all of it

Within a stage the learning rate is a slanted triangle (eq. 3); a group of layers learns `lr_decay` times
slower than the one above (§3.2). Validation then chooses among the ends of the stages, where the rate has come
down: a late stage that does harm costs time and nothing else. Not among all epochs: with a few hundred notes the
best of twenty noisy scores is a worse guide than the end of the schedule. Masks and the order of notes derive
from (seed, epoch).
"""

from __future__ import annotations

import functools
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

    epochs_head: int = Field(15, ge=1)
    epochs_top: int = Field(1, ge=0)
    epochs_all: int = Field(2, ge=0)
    lr_head: float = Field(1e-2, gt=0, description="peak learning rate while only the head learns")
    lr: float = Field(3e-3, gt=0, description="peak learning rate of the head in the later stages")
    lr_decay: float = Field(2.6, ge=1, description="each group below learns so much slower (ULMFiT §3.2)")
    weight_decay: float = Field(1.0, ge=0, description="of the head, decoupled (AdamW)")
    weight_decay_lm: float = Field(0.01, ge=0, description="of the language model")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    batch: int = Field(32, ge=1, description="notes a step")
    drop_scale: float = Field(0.5, ge=0, description="multiplies the language model's dropouts (drop_mult)")
    cache_mb: int = Field(2000, ge=0, description="states of the frozen model are kept if they are smaller")


class Labelled(NamedTuple):
    """The notes of a split as tokens, labels [N], and the frozen model's states [T, E] of each, if kept."""

    notes: Notes
    labels: Ints
    states: list[Tensor] | None


class Epoch(NamedTuple):
    """What one epoch came to; `validation` is AUROC or macro-F1."""

    stage: str
    epoch: int
    loss: float
    validation: float
    kept: bool = False


def slanted_triangle(step: int, steps: int, cut: float = 0.1, ratio: float = 32) -> float:
    """Share of the peak learning rate at `step` of `steps` (ULMFiT eq. 3): up over `cut`, then down."""
    peak = max(1, int(steps * cut))
    p = step / peak if step < peak else 1 - (step - peak) / max(1, steps - peak)
    return (1 + p * (ratio - 1)) / ratio


def class_weights(labels_N: Ints, classes: int) -> Tensor:
    """Weights [K] with which every class counts the same in the loss: N / (K · N_k)."""
    return torch.tensor(len(labels_N) / (classes * np.bincount(labels_N, minlength=classes)), dtype=torch.float32)


@torch.no_grad()
def read_states(
    classifier: NoteClassifier, notes: Notes, config: StagesConfig, advance: Callable[[int, str], None]
) -> list[Tensor]:
    """States [T, E] of every note by the language model as it is, without dropout."""
    classifier.eval()
    device = next(classifier.parameters()).device
    states: list[Tensor] = [torch.empty(0)] * len(notes)
    for indices in batches([len(note) for note in notes], config.batch, None):
        tokens_BT, lengths_B = padded([notes[i] for i in indices], device)
        states_BTE = torch.cat(list(classifier.states(tokens_BT, lengths_B, None)), 1)
        for i, states_TE in zip(indices, states_BTE, strict=True):
            states[i] = states_TE[: len(notes[i])].clone()
        advance(int(lengths_B.sum()), "")
    return states


@torch.no_grad()
def probabilities(
    classifier: NoteClassifier, data: Labelled, frozen: bool, config: StagesConfig, advance: Callable[[int, str], None]
) -> Floats:
    """Class probabilities [N, K] without dropout."""
    classifier.eval()
    found = np.empty((len(data.notes), classifier.classes))
    for indices in batches([len(note) for note in data.notes], config.batch, None):
        logits_BK = _logits(classifier, data, indices, frozen, None)
        found[indices] = torch.softmax(logits_BK.double(), 1).cpu().numpy()
        advance(_cost(data, indices, frozen), "")
    return found


def _logits(classifier: NoteClassifier, data: Labelled, indices: Ints, frozen: bool, masks: Masks | None) -> Tensor:
    """Logits [B, K]; a frozen language model reads without dropout, from kept states if there are any."""
    device = next(classifier.parameters()).device
    if frozen and data.states is not None:
        lengths_B = torch.tensor([len(data.notes[i]) for i in indices], device=device)
        states_BTE = nn.utils.rnn.pad_sequence([data.states[i] for i in indices], batch_first=True)
        return classifier.score([states_BTE], lengths_B, masks)
    tokens_BT, lengths_B = padded([data.notes[i] for i in indices], device)
    segments = classifier.states(tokens_BT, lengths_B, None if frozen else masks)
    return classifier.score(segments, lengths_B, masks)


def _cost(data: Labelled, indices: Ints, frozen: bool) -> int:
    """What is added to the progress: tokens read; kept states cost about a tenth."""
    tokens = sum(len(data.notes[i]) for i in indices)
    return tokens // 10 if frozen and data.states is not None else tokens


def fine_tune(
    classifier: NoteClassifier,
    train: Labelled,
    valid: Labelled,
    config: StagesConfig,
    seed: int,
    advance: Callable[[int, str], None],
) -> list[Epoch]:
    """Trains `classifier` in place through the stages and leaves it at the end of the best stage.

    Returns every epoch; `kept` marks the one whose weights remain.

    `advance` hears of the tokens read and the last validation score. Raises TrainingError for a loss that is
    not finite.
    """
    groups = classifier.parameter_groups()
    device = next(classifier.parameters()).device
    labels_N = torch.from_numpy(train.labels).to(device)
    weight_K = class_weights(train.labels, classifier.classes).to(device)
    lengths = [len(note) for note in train.notes]
    steps_per_epoch = -(-len(lengths) // config.batch)
    history: list[Epoch] = []
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for stage, depth, epochs, lr in (
        ("head", 1, config.epochs_head, config.lr_head),
        ("top", 2, config.epochs_top, config.lr),
        ("all", len(groups), config.epochs_all, config.lr),
    ):
        optimizer = torch.optim.AdamW(_unfreeze(groups, depth, lr, config), betas=(0.8, 0.99))
        triangle = functools.partial(slanted_triangle, steps=epochs * steps_per_epoch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, triangle)
        frozen = stage == "head"
        for epoch in range(epochs):
            classifier.train()
            losses = []
            order = np.random.default_rng([seed, len(history)])
            for step, indices in enumerate(batches(lengths, config.batch, order)):
                drawn = len(history) * steps_per_epoch + step  # no step draws the masks of another
                masks = Masks(seed, drawn, indices.tolist(), device, config.drop_scale)
                logits_BK = _logits(classifier, train, indices, frozen, masks)
                loss = functional.cross_entropy(logits_BK, labels_N[indices], weight_K)
                if not torch.isfinite(loss):
                    raise TrainingError(f"stage {stage}, epoch {epoch + 1}: loss not finite; lower stages.lr")
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(classifier.parameters(), config.clip)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                advance(_cost(train, indices, frozen), "")
            score = selection(valid.labels, probabilities(classifier, valid, frozen, config, advance))
            if epoch == epochs - 1 and (best is None or score > best[0]):
                weights = {name: value.clone() for name, value in classifier.state_dict().items()}
                best = score, len(history), weights
            history.append(Epoch(stage, epoch, float(np.mean(losses)), score))
            advance(0, f"{stage} {epoch + 1}/{epochs}, validation {score:.3f}")
    assert best is not None  # the head has an epoch at least
    _, kept, weights = best
    classifier.load_state_dict(weights)
    history[kept] = history[kept]._replace(kept=True)
    return history


def _unfreeze(groups: list[list[nn.Parameter]], depth: int, lr: float, config: StagesConfig) -> list[dict[str, Any]]:
    """Lets the top `depth` groups learn and no other; the optimizer's groups with their peak rates."""
    for group in groups:
        for parameter in group:
            parameter.requires_grad_(False)
    learning = []
    for height, group in enumerate(reversed(groups[len(groups) - depth :])):
        for parameter in group:
            parameter.requires_grad_(True)
        decay = config.weight_decay_lm if height else config.weight_decay
        learning.append({"params": group, "lr": lr / config.lr_decay**height, "weight_decay": decay})
    return learning
