"""Optimizers, what they are told at each step, and averages of the weights.

Learning rate, momentum and averaging are pure functions of the step and of when averaging began: a resume needs no
state of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from cluster.config import Section

PARAMETER = "parameter"  # the name of a parameter's own value beside its optimizer states
AVERAGE = "average"  # the optimizer state that holds the averaged weights


class OptimConfig(Section):
    """Section `optim` of a training recipe."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="sgd is without momentum, as AWD-LSTM was published")
    lr: float = Field(5e-3, gt=0, description="peak learning rate; `./launch.sh find-lr` suggests one")
    schedule: Literal["one-cycle", "cosine", "linear", "wsd", "constant"] = "one-cycle"
    warmup: float = Field(0.25, ge=0, le=1, description="share of the steps until the peak")
    decay: float = Field(0.2, gt=0, le=1, description="share of the steps, the last, in which wsd falls")
    final_lr_ratio: float = Field(1e-3, ge=0, le=1, description="last learning rate as a share of the peak")
    layer_decay: float = Field(
        1.0, ge=1, description="learning rate of a layer over that of the one below (ULMFiT: 2.6)"
    )
    beta1: float = Field(0.8, ge=0, lt=1)
    beta1_at_peak: float = Field(0.7, ge=0, lt=1, description="one-cycle lowers beta1 while the learning rate is high")
    beta2: float = Field(0.99, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0, description="not applied to biases; decoupled with adamw")
    clip: float = Field(0.25, gt=0, description="largest norm of the gradient")
    average: Literal["none", "ema", "nt-asgd"] = Field("none", description="weights that are validated and used later")
    ema_decay: float = Field(0.999, gt=0, lt=1)
    patience: int = Field(5, ge=1, description="nt-asgd averages once the last so many validations had no best one")


class Knobs(NamedTuple):
    """What the optimizer is told at one step."""

    lr: float
    beta1: float | None = None  # None: as it was built
    newest: float = 1.0  # share of the newest weights in their average


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2


def _after_warmup(share: float, config: OptimConfig) -> float:
    return (share - config.warmup) / max(1 - config.warmup, 1e-9)


def _warming(share: float, config: OptimConfig) -> float | None:
    """Linear up to the peak; None behind it."""
    return share / config.warmup if share < config.warmup else None


def one_cycle(share: float, config: OptimConfig) -> float:
    """fastai's shape of Smith's 1cycle (arXiv:1803.09820): cosine from 1/25 of the peak up to it, then cosine down."""
    if share < config.warmup:
        return _cosine_between(1 / 25, 1.0, share / config.warmup)
    return _cosine_between(1.0, config.final_lr_ratio, _after_warmup(share, config))


def cosine(share: float, config: OptimConfig) -> float:
    """Linear up to the peak, then half a cosine down (Loshchilov & Hutter, arXiv:1608.03983 eq. 5)."""
    return _warming(share, config) or _cosine_between(1.0, config.final_lr_ratio, _after_warmup(share, config))


def linear(share: float, config: OptimConfig) -> float:
    """Linear up to the peak, then linear down."""
    return _warming(share, config) or 1.0 + (config.final_lr_ratio - 1.0) * _after_warmup(share, config)


def wsd(share: float, config: OptimConfig) -> float:
    """Warm-up, stable, decay (Hu et al., arXiv:2404.06395): linear up, flat, and over the last share `decay` down as
    1 − √x (Hägele et al., arXiv:2405.18392).
    """
    falling = max((share - 1 + config.decay) / config.decay, 0.0)
    return _warming(share, config) or 1.0 + (config.final_lr_ratio - 1.0) * math.sqrt(falling)


def constant(share: float, config: OptimConfig) -> float:
    """Linear up to the peak, then flat."""
    return _warming(share, config) or 1.0


SCHEDULES: dict[str, Callable[[float, OptimConfig], float]] = {
    "one-cycle": one_cycle,
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
}


def knobs(step: int, steps: int, config: OptimConfig, averaging_since: int | None = None) -> Knobs:
    """What the optimizer is told at step `step` (from 0) of a run of `steps`. NT-ASGD averages from step
    `averaging_since` on; before it, the average is the newest weights.
    """
    share = (step + 1) / steps
    beta1 = config.beta1
    if config.schedule == "one-cycle":  # fastai: the mirror image of the learning rate
        low = config.beta1_at_peak
        if share < config.warmup:
            beta1 = _cosine_between(config.beta1, low, share / config.warmup)
        else:
            beta1 = _cosine_between(low, config.beta1, _after_warmup(share, config))
    newest = 1.0
    if config.average == "ema":
        newest = max(1 - config.ema_decay, 1 / (step + 1))  # at first the mean of all, so that none weighs too much
    elif averaging_since is not None:
        newest = 1 / (step - averaging_since + 1)
    return Knobs(config.lr * SCHEDULES[config.schedule](share, config), beta1, newest)


def no_longer_improves(valid_losses: Sequence[float], patience: int) -> bool:
    """NT-ASGD's trigger (arXiv:1708.02182, algorithm 1): the newest loss is above the best of those that are at least
    `patience` validations old.
    """
    return len(valid_losses) > patience and valid_losses[-1] > min(valid_losses[:-patience])


class _Averaging(torch.optim.Optimizer):
    """Keeps an average of the weights beside each, as one more state of the optimizer: sharded, saved and resharded
    with the others.
    """

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if AVERAGE not in state:
                    state[AVERAGE] = parameter.detach().clone()
                else:
                    state[AVERAGE].lerp_(parameter.detach(), group["newest"])
        return result


class AveragedAdamW(_Averaging, torch.optim.AdamW):
    """AdamW that keeps an average of the weights."""


class AveragedSGD(_Averaging, torch.optim.SGD):
    """SGD that keeps an average of the weights: averaged SGD (Polyak & Juditsky 1992)."""


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a model, with weight decay on matrices only. Each parameter group has a `lr_scale`: 1 for the
    top layer, and below it `layer_decay` times less a layer (Howard & Ruder, arXiv:1801.06146 §3.2).
    """
    whole = [list(model.parameters())]
    layers = whole if config.layer_decay == 1.0 else model.layer_groups()  # type: ignore[operator]
    groups: list[dict[str, Any]] = []
    for height, layer in enumerate(layers):
        scale = config.layer_decay ** (height - len(layers) + 1)
        matrices = [parameter for parameter in layer if parameter.dim() > 1]
        vectors = [parameter for parameter in layer if parameter.dim() <= 1]
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "lr_scale": scale, "newest": 1.0})
    averaged = config.average != "none"
    if config.name == "sgd":
        return (AveragedSGD if averaged else torch.optim.SGD)(groups, lr=config.lr, fused=True)
    kind = AveragedAdamW if averaged else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
