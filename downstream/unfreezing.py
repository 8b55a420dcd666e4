"""Fine-tuning in stages: the head alone, then the top layer with it, then everything (ULMFiT §3.3).

    head   every note is read once by the frozen language model; the head learns on the kept states
    top    the language model's top layer learns too (with `gradual`, then the next one, one layer a stage)
    all    all of it

Within a stage the learning rate is a slanted triangle (eq. 3) or one cycle (Smith 2018, arXiv:1803.09820); a group of
layers learns `lr_decay` times slower than the one above (§3.2). Validation then chooses among the ends of the stages,
where the rate has come down: a late stage that does harm costs time and nothing else. Not among all epochs: with a few
hundred notes the best of twenty noisy scores is a worse guide than the end of the schedule. Masks and the order of
notes derive from (seed, epoch).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cluster.config import Section
from cluster.errors import TrainingError
from downstream.classifier import NoteClassifier, Scored, batches, padded
from downstream.metrics import Floats, Ints, selection
from downstream.reading import Note
from pretrain.models.dropout import Masks


class StagesConfig(Section):
    """How long and how fast each stage learns."""

    epochs_head: int = Field(15, ge=1)
    epochs_top: int = Field(1, ge=0, description="with `gradual`: of every stage between head and all")
    epochs_all: int = Field(2, ge=0)
    gradual: bool = Field(False, description="unfreeze one layer after the other (ULMFiT §3.3), not only the top one")
    schedule: Literal["slanted", "one-cycle"] = Field("slanted", description="of the learning rate within a stage")
    balance: bool = Field(True, description="every class counts the same in the loss, however rare")
    patience: int = Field(
        0, ge=0, description="end training after so many stages without a gain on validation; 0: never"
    )
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
    """The notes of a split, labels [N] (several at once: 0 and 1 [N, K]), and the frozen model's states [T, E] of each
    note, if kept.
    """

    notes: Sequence[Note]
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


def one_cycle(step: int, steps: int, cut: float = 0.3, ratio: float = 25) -> float:
    """Share of the peak learning rate at `step` of `steps`: half a cosine up over `cut`, and down to almost nothing."""
    peak = max(1, int(steps * cut))
    if step < peak:
        return 1 / ratio + (1 - 1 / ratio) * (1 - math.cos(math.pi * step / peak)) / 2
    return 1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * (step - peak) / max(1, steps - peak))) / 2


def class_weights(labels_N: Ints, classes: int) -> Tensor:
    """Weights [K] with which every class counts the same in the loss: N / (K · N_k). With several labels a note (0 and
    1 [N, K]): what a positive counts, so that both sides of a class count the same.
    """
    if labels_N.ndim == 2:
        positive_K = labels_N.sum(0)
        return torch.tensor((len(labels_N) - positive_K) / np.maximum(positive_K, 1), dtype=torch.float32)
    counts_K = np.bincount(labels_N, minlength=classes)
    return torch.tensor(len(labels_N) / (classes * np.maximum(counts_K, 1)), dtype=torch.float32)


def _loss(logits_BK: Tensor, labels_B: Tensor, weight_K: Tensor | None) -> Tensor:
    if labels_B.dim() == 2:
        return functional.binary_cross_entropy_with_logits(logits_BK, labels_B.float(), pos_weight=weight_K)
    return functional.cross_entropy(logits_BK, labels_B, weight_K)


@torch.no_grad()
def read_states(
    classifier: NoteClassifier, notes: Sequence[Note], config: StagesConfig, advance: Callable[[int, str], None]
) -> list[Tensor]:
    """States [T, E] of every note by the language model as it is, without dropout."""
    classifier.eval()
    device = next(classifier.parameters()).device
    states: list[Tensor] = [torch.empty(0)] * len(notes)
    for indices in batches([len(note.tokens) for note in notes], config.batch, None):
        batch = padded([notes[i] for i in indices], device)
        states_BTE = torch.cat(list(classifier.states(batch, None)), 1)
        for i, states_TE in zip(indices, states_BTE, strict=True):
            states[i] = states_TE[: len(notes[i].tokens)].clone()
        advance(int(batch.lengths_B.sum()), "")
    return states


@torch.no_grad()
def probabilities(
    classifier: NoteClassifier, data: Labelled, frozen: bool, config: StagesConfig, advance: Callable[[int, str], None]
) -> Floats:
    """Class probabilities [N, K] without dropout; with several labels a note each for itself."""
    classifier.eval()
    found = np.empty((len(data.notes), classifier.classes))
    for indices in batches([len(note.tokens) for note in data.notes], config.batch, None):
        logits_BK = _scored(classifier, data, indices, frozen, None).logits_BK.double()
        found[indices] = (logits_BK.sigmoid() if data.labels.ndim == 2 else logits_BK.softmax(1)).cpu().numpy()
        advance(_cost(data, indices, frozen), "")
    return found


def _scored(classifier: NoteClassifier, data: Labelled, indices: Ints, frozen: bool, masks: Masks | None) -> Scored:
    """Logits of a batch; a frozen language model reads without dropout, from kept states if there are any."""
    batch = padded([data.notes[i] for i in indices], next(classifier.parameters()).device)
    if frozen and data.states is not None:
        states_BTE = nn.utils.rnn.pad_sequence([data.states[i] for i in indices], batch_first=True)
        return classifier.score([states_BTE], batch, masks)
    return classifier.score(classifier.states(batch, None if frozen else masks), batch, masks)


def _cost(data: Labelled, indices: Ints, frozen: bool) -> int:
    """What is added to the progress: tokens read; kept states cost about a tenth."""
    tokens = sum(len(data.notes[i].tokens) for i in indices)
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
    weight_K = class_weights(train.labels, classifier.classes).to(device) if config.balance else None
    lengths = [len(note.tokens) for note in train.notes]
    look = classifier.config.look if "attention" in classifier.config.pooling else 0.0
    steps_per_epoch = -(-len(lengths) // config.batch)
    history: list[Epoch] = []
    best: tuple[float, int, dict[str, Tensor]] | None = None
    worse = 0
    for stage, depth, epochs, lr in stages_of(config, len(groups)):
        if config.patience and worse >= config.patience:
            break
        optimizer = torch.optim.AdamW(_unfreeze(groups, depth, lr, config), betas=(0.8, 0.99))
        shape = one_cycle if config.schedule == "one-cycle" else slanted_triangle
        rate = functools.partial(shape, steps=epochs * steps_per_epoch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        frozen = stage == "head"
        for epoch in range(epochs):
            classifier.train()
            losses = []
            order = np.random.default_rng([seed, len(history)])
            for step, indices in enumerate(batches(lengths, config.batch, order)):
                drawn = len(history) * steps_per_epoch + step  # no step draws the masks of another
                masks = Masks(seed, drawn, indices.tolist(), device, config.drop_scale)
                scored = _scored(classifier, train, indices, frozen, masks)
                loss = _loss(scored.logits_BK, labels_N[indices], weight_K)
                if look:
                    loss = loss - look * scored.on_mentions_B.clamp(min=1e-6).log().mean()
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
            if epoch == epochs - 1:
                worse += 1
                if best is None or score > best[0]:
                    weights = {name: value.clone() for name, value in classifier.state_dict().items()}
                    best, worse = (score, len(history), weights), 0
            history.append(Epoch(stage, epoch, float(np.mean(losses)), score))
            advance(0, f"{stage} {epoch + 1}/{epochs}, validation {score:.3f}")
    assert best is not None  # the head has an epoch at least
    _, kept, weights = best
    classifier.load_state_dict(weights)
    history[kept] = history[kept]._replace(kept=True)
    return history


def stages_of(config: StagesConfig, groups: int) -> list[tuple[str, int, int, float]]:
    """(name, how many groups learn, epochs, peak learning rate) of every stage."""
    depths = range(2, groups) if config.gradual else [2]
    between = [("top" if depth == 2 else f"top {depth - 1}", depth, config.epochs_top, config.lr) for depth in depths]
    stages = [("head", 1, config.epochs_head, config.lr_head), *between, ("all", groups, config.epochs_all, config.lr)]
    return [stage for stage in stages if stage[2]]


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
        rate = lr / config.lr_decay**height
        # A lone number (how strongly attention is drawn to mentions) means nothing at zero: it does not decay.
        for decays, kept in ((decay, [p for p in group if p.dim()]), (0.0, [p for p in group if not p.dim()])):
            if kept:
                learning.append({"params": kept, "lr": rate, "weight_decay": decays})
    return learning
