"""Dropout masks as pure functions of (seed, step, name, global lane).

No generator is kept, so nothing has to be saved for a resume to be exact, and a lane draws the same mask on whichever
worker it is. Bits come from NumPy's counter-based Philox (Salmon et al. 2011), one byte an element: probabilities are
multiples of 1/256, and masks are scaled by the exact rate that is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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

    def shared(self, name: str, p: float, shape: tuple[int, ...]) -> Tensor | None:
        """Scaled mask [*shape], the same on every worker (weights, embedding rows); None where nothing drops."""
        threshold = self._threshold(p)
        if threshold == 0:
            return None
        if name not in self._made:
            kept = self._bytes(name, int(np.prod(shape))) >= threshold
            self._made[name] = self._scaled(kept.reshape(shape), threshold)
        return self._made[name]

    def per_lane(self, name: str, p: float, width: int) -> Tensor | None:
        """Scaled mask [lanes, 1, width], constant over time (locked dropout, Merity et al. 2017 §4.2)."""
        threshold = self._threshold(p)
        if threshold == 0:
            return None
        kept = np.stack([self._bytes(f"{name}/{lane}", width) >= threshold for lane in self.lanes])
        return self._scaled(kept[:, None, :], threshold)

    def _threshold(self, p: float) -> int:
        return min(255, round(256 * p * self.scale))

    def _bytes(self, name: str, count: int) -> np.ndarray:
        key = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=16).digest()
        bits = np.random.Philox(key=np.frombuffer(key, np.uint64))
        return bits.random_raw(-(-count // 8)).view(np.uint8)[:count]

    def _scaled(self, kept: np.ndarray, threshold: int) -> Tensor:
        return torch.from_numpy(kept).to(self.device).float().mul_(256 / (256 - threshold))
