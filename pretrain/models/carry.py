"""What passes from segment to segment, and where within a segment a recurrent layer forgets it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Carry = dict[str, Tensor]  # axis 0 is the lane


@dataclass(frozen=True)
class Pieces:
    """The segments of B lanes cut where the carry is forgotten, in the layout of packed sequences: sorted by length,
    position after position of all pieces that are long enough. N = B·T.
    """

    batch_sizes: Tensor  # [longest] pieces that have a k-th position; int64 on CPU, as torch.lstm wants it
    into_N: Tensor  # packed place → lane·T + position
    back_N: Tensor  # lane·T + position → packed place
    lane_P: Tensor  # lane of each piece
    keeps_P1: Tensor  # whether the piece goes on with the carry of its lane: 1 or 0
    last_B: Tensor  # the piece that ends each lane

    @classmethod
    def of(cls, starts_BT: Tensor) -> Pieces:
        """The pieces between starts."""
        starts = starts_BT.cpu().numpy()
        lanes, length = starts.shape
        cuts = starts.copy()
        cuts[:, 0] = True
        lane, first = np.nonzero(cuts)
        ends = np.append(first[1:], length)
        ends[np.append(lane[1:] != lane[:-1], True)] = length
        order = np.argsort(first - ends, kind="stable")
        lane, first, sizes = lane[order], first[order], (ends - first)[order]
        alive = sizes[None, :] > np.arange(sizes[0])[:, None]  # [longest, P]
        step, piece = np.nonzero(alive)
        into = lane[piece] * length + first[piece] + step
        back = np.empty_like(into)
        back[into] = np.arange(len(into))
        last = np.empty(lanes, np.int64)
        ending = first + sizes == length
        last[lane[ending]] = np.nonzero(ending)[0]
        keeps = ((first == 0) & ~starts[lane, 0])[:, None].astype(np.float32)
        on = starts_BT.device
        return cls(
            torch.from_numpy(alive.sum(1)),
            torch.from_numpy(into).to(on),
            torch.from_numpy(back).to(on),
            torch.from_numpy(lane).to(on),
            torch.from_numpy(keeps).to(on),
            torch.from_numpy(last).to(on),
        )


def forgotten(carry: Carry, starts_BT: Tensor) -> Carry:
    """The carry with zeros in the lanes whose first position is a start."""
    kept = ~starts_BT[:, 0]
    return {name: value * kept.view(-1, *[1] * (value.dim() - 1)).to(value.dtype) for name, value in carry.items()}
