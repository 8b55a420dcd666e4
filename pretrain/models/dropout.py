"""Dropout masks as pure functions of (seed, step, name, global lane).

No generator is kept, so nothing has to be saved for a resume to be exact, and a lane draws the same mask on whichever
worker it is. Bits come from SplitMix64 (Steele et al. 2014), made where they are used and the same on every device, one
byte an element: probabilities are multiples of 1/256, and masks are scaled by the exact rate that is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Masks:
    """The masks of one training step, for the lanes at hand.

    `lanes` are global lane numbers in the order of the batch rows; `scale` multiplies every probability (fastai's
    drop_mult). Passing no Masks to a model (None) means no dropout: evaluation.
    """

    def __init__(self, seed: int, step: int, lanes: Sequence[int], device: torch.device, scale: float = 1.0):
        self.seed, self.step, self.lanes, self.device, self.scale = seed, step, lanes, device, scale
        self._made: dict[str, Tensor] = {}  # shared masks, for groups of lanes to have in common

    def rows(self, rows: slice) -> Masks:
        """The masks of some rows of the batch; what is shared is made once for all of them."""
        part = Masks(self.seed, self.step, self.lanes[rows], self.device, self.scale)
        part._made = self._made
        return part

    def shared(self, name: str, p: float, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Scaled mask [*shape], the same on every worker (weights, embedding rows); None where nothing drops."""
        threshold = self.threshold(p)
        if threshold == 0:
            return None
        if name not in self._made:
            kept_1N = _kept(self.shared_key(name), math.prod(shape), threshold, dtype)
            self._made[name] = kept_1N.mul_(256 / (256 - threshold)).view(shape)
        return self._made[name]

    def per_lane(self, name: str, p: float, width: int) -> Tensor | None:
        """Scaled mask [lanes, 1, width], constant over time (locked dropout, Merity et al. 2017 §4.2)."""
        threshold = self.threshold(p)
        if threshold == 0:
            return None
        kept_BD = _kept(self.keys([name])[0], width, threshold, torch.float32)
        return kept_BD.mul_(256 / (256 - threshold))[:, None]

    def keys(self, names: Sequence[str]) -> Tensor:
        """A key for `dropped` for every name and lane, int64 [names, lanes]."""
        numbers = [int.from_bytes(self._key(f"{name}/{lane}")[:8]) for name in names for lane in self.lanes]
        keys = np.array(numbers, np.uint64).view(np.int64).reshape(len(names), len(self.lanes))
        return torch.from_numpy(keys).to(self.device)

    def shared_key(self, name: str) -> Tensor:
        """A key for `dropped` that is the same on every worker, int64 [1]."""
        return torch.from_numpy(np.frombuffer(self._key(name)[:8], ">i8").astype(np.int64)).to(self.device)

    def threshold(self, p: float) -> int:
        """Bytes below it drop their element, for a probability `p`."""
        return min(255, round(256 * p * self.scale))

    def _key(self, name: str) -> bytes:
        return hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=16).digest()


_GAMMA, _MIX1, _MIX2 = (
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _splitmix(keys_B: Tensor, count: int) -> Tensor:
    """`count` numbers of 64 bits for every key, int64 [B, count]."""
    z = torch.arange(1, count + 1, device=keys_B.device).mul_(_GAMMA) + keys_B[:, None]
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        z ^= (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # `>>` repeats the sign
        z *= factor
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z


def _kept(keys_B: Tensor, count: int, threshold: int, dtype: torch.dtype) -> Tensor:
    """1 for each element that stays, else 0 [B, count]. Compared as floats: vectorized everywhere, as bytes are not."""
    numbers_BN = _splitmix(keys_B, -(-count // 8)).view(torch.uint8)[:, :count]
    return numbers_BN.to(dtype).ge_(threshold)


def _kept_like(x_BTD: Tensor, keys_B: Tensor, threshold: int) -> Tensor:
    return _kept(keys_B, x_BTD[0].numel(), threshold, x_BTD.dtype).reshape(x_BTD.shape)


class _Dropped(torch.autograd.Function):
    """The mask is made again in the backward; nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, keys_B: Tensor, threshold: int) -> Tensor:
        ctx.save_for_backward(keys_B)
        ctx.threshold = threshold
        return _kept_like(x_BTD, keys_B, threshold).mul_(x_BTD).mul_(256 / (256 - threshold))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (keys_B,) = ctx.saved_tensors
        kept = _kept_like(gradients[0], keys_B, ctx.threshold)
        return kept.mul_(gradients[0]).mul_(256 / (256 - ctx.threshold)), None, None


class _ReluDropped(torch.autograd.Function):
    """What comes out is positive just where the gradient passes, so nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, keys_B: Tensor, threshold: int) -> Tensor:
        ctx.scale = 256 / (256 - threshold)
        output = _kept_like(x_BTD, keys_B, threshold).mul_(x_BTD).relu_().mul_(ctx.scale)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradients[0], output, 0).mul_(ctx.scale), None, None


_drop, _relu_drop = _Dropped.apply, _ReluDropped.apply


def keep_out_of_graphs() -> None:
    """From now on dropout is not compiled: its numbers came out otherwise (torch 2.13, CPU). Who compiles a model says
    so, and nobody else: torch's compiler takes seconds to import.
    """
    global _drop, _relu_drop
    _drop, _relu_drop = map(torch.compiler.disable, (_Dropped.apply, _ReluDropped.apply))


def dropped(x_BTD: Tensor, keys_B: Tensor, threshold: int) -> Tensor:
    """`x` with every element dropped or scaled by itself, by `Masks.keys` and `Masks.threshold`."""
    return x_BTD if threshold == 0 else _drop(x_BTD, keys_B, threshold)  # type: ignore[no-any-return]


def relu_dropped(x_BTD: Tensor, keys_B: Tensor, threshold: int) -> Tensor:
    """dropped(relu(x))."""
    return _relu_drop(x_BTD, keys_B, threshold)  # type: ignore[no-any-return]
