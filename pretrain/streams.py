"""Token streams: which tokens belong to step N is a pure function of (corpus, seed, N).

    notes of a split, permuted for the epoch → one stream of N tokens → L lanes of ⌈N/L⌉ → segments of T

Truncated backpropagation through time needs contiguous text in every lane, so lanes are global and fixed in number,
whatever the number of workers: worker r of W reads lanes [rL/W, (r+1)L/W). Nothing of a stream is lost: the last
segment of an epoch is shorter, the last lane is padded, and the target of a lane's last token is the first token of
the next lane, so every token but the first of an epoch is a target exactly once. No iterator exists, hence none has to
be saved: a step is looked up in prefix sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cluster.config import Section
from cluster.errors import ConfigError, DataError
from sharding.shards import Split

IGNORED = -1  # target of a position that has none


class StreamConfig(Section):
    """Section `data` of a training recipe."""

    corpus: str = Field(description="shard directory (URL)")
    lanes: int = Field(16, ge=1, description="texts read side by side, over all workers: the global batch")
    bptt: int = Field(70, ge=1, description="tokens of a segment, T")


@dataclass(frozen=True)
class Batch:
    """One segment of some lanes: inputs and next tokens, int64 [lanes, T]; targets may be IGNORED."""

    tokens_BT: Tensor
    targets_BT: Tensor


def lanes_of(rank: int, world: int, lanes: int) -> range:
    """Global lanes of one worker. Raises ConfigError where the lanes cannot be shared out evenly."""
    if lanes % world:
        raise ConfigError(f"data.lanes={lanes} cannot be shared evenly by {world} workers; take a multiple of {world}")
    return range(rank * lanes // world, (rank + 1) * lanes // world)


class Streams:
    """The lanes of one split. `shuffle=False` reads the notes in corpus order (evaluation)."""

    def __init__(self, split: Split, lanes: int, bptt: int, seed: int, shuffle: bool = True):
        if split.n_tokens < 2 * lanes:
            raise DataError(f"{split.n_tokens} tokens are too few for {lanes} lanes; lower data.lanes")
        self.split, self.lanes, self.bptt, self.seed, self.shuffle = split, lanes, bptt, seed, shuffle
        self.lane_tokens = -(-split.n_tokens // lanes)
        self.steps_per_epoch = -(-self.lane_tokens // bptt)
        self._epoch = -1
        self._order: np.ndarray[Any, Any] = np.empty(0, np.int64)
        self._ends: np.ndarray[Any, Any] = np.empty(0, np.int64)

    def order(self, epoch: int) -> np.ndarray[Any, Any]:
        """Notes of an epoch in reading order."""
        if not self.shuffle:
            return np.arange(self.split.n_notes)
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
        return np.random.Generator(bits).permutation(self.split.n_notes)

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order = self.order(epoch)
            self._ends = np.cumsum(self.split.length_of_note[self._order])
            self._epoch = epoch

    def _read(self, start: int, stop: int, out: np.ndarray[Any, Any]) -> None:
        """Copies tokens [start, stop) of the current epoch's stream into `out`."""
        place = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < stop - start:
            note = int(self._order[place])
            length = int(self.split.length_of_note[note])
            skipped = start + filled - (int(self._ends[place]) - length)
            take = min(length - skipped, stop - start - filled)
            first = int(self.split.start_of_note[note]) + skipped
            out[filled : filled + take] = self.split.values[self.split.shard_of_note[note]][first : first + take]
            filled += take
            place += 1

    def spans(self, step: int, lanes: range) -> list[tuple[int, int]]:
        """Stream positions [start, stop) that the lanes read as inputs in this step (empty past the end)."""
        offset = (step % self.steps_per_epoch) * self.bptt
        length = min(self.bptt, self.lane_tokens - offset)
        total = self.split.n_tokens
        starts = [min(lane * self.lane_tokens + offset, total) for lane in lanes]
        return [(start, min(start + length, total)) for start in starts]

    def batch(self, step: int, lanes: range) -> Batch:
        """The segment of step `step` (counted over all epochs) for `lanes`."""
        self._enter(step // self.steps_per_epoch)
        spans = self.spans(step, lanes)
        length = min(self.bptt, self.lane_tokens - (step % self.steps_per_epoch) * self.bptt)
        tokens = np.zeros((len(spans), length), np.int64)
        targets = np.full((len(spans), length), IGNORED, np.int64)
        row = np.empty(length + 1, np.int64)
        for lane, (start, stop) in enumerate(spans):
            ahead = min(stop + 1, self.split.n_tokens)  # the next token, where there is one
            self._read(start, ahead, row[: ahead - start])
            tokens[lane, : stop - start] = row[: stop - start]
            targets[lane, : max(ahead - start - 1, 0)] = row[1 : ahead - start]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def targets_in(self, step: int) -> int:
        """Number of targets of a step over all lanes; by arithmetic, so no worker has to ask another."""
        last = self.split.n_tokens - 1  # the position without a next token
        return sum(min(stop, last) - min(start, last) for start, stop in self.spans(step, range(self.lanes)))
