"""Optimizer and learning-rate schedules. A schedule is a pure function of the step: a resume needs no state of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from cluster.config import Section


class OptimConfig(Section):
    """Section `optim` of a training recipe."""

    lr: float = Field(5e-3, gt=0, description="peak learning rate")
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    warmup: float = Field(0.25, ge=0, le=1, description="share of the steps until the peak")
    final_lr_ratio: float = Field(1e-3, ge=0, le=1, description="last learning rate as a share of the peak")
    beta1: float = Field(0.8, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0, description="decoupled; not applied to biases")
    clip: float = Field(0.25, gt=0, description="largest norm of the gradient")

    @model_validator(mode="after")
    def _known(self) -> OptimConfig:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        return self


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2


def one_cycle(share: float, config: OptimConfig) -> float:
    """fastai's shape of Smith's 1cycle (arXiv:1803.09820): cosine from 1/25 of the peak up to it, then cosine down."""
    if share < config.warmup:
        return _cosine_between(1 / 25, 1.0, share / config.warmup)
    return _cosine_between(1.0, config.final_lr_ratio, (share - config.warmup) / max(1 - config.warmup, 1e-9))


def cosine(share: float, config: OptimConfig) -> float:
    """Linear up to the peak, then half a cosine down (Loshchilov & Hutter, arXiv:1608.03983 eq. 5)."""
    if share < config.warmup:
        return share / config.warmup
    return _cosine_between(1.0, config.final_lr_ratio, (share - config.warmup) / max(1 - config.warmup, 1e-9))


def constant(share: float, config: OptimConfig) -> float:
    """Linear up to the peak, then flat."""
    return min(1.0, share / config.warmup) if config.warmup else 1.0


SCHEDULES: dict[str, Callable[[float, OptimConfig], float]] = {
    "one-cycle": one_cycle,
    "cosine": cosine,
    "constant": constant,
}


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` (from 0) of a run of `steps`."""
    return config.lr * SCHEDULES[config.schedule]((step + 1) / steps, config)


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
