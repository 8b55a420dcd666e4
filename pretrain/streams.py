"""Token streams: which tokens belong to step N is a pure function of (corpus, seed, N).

    notes of a split, permuted for the epoch → one stream of n tokens → L lanes of ⌈n/L⌉ → the next epoch's, and so on

Truncated backpropagation through time needs contiguous text in every lane, so lanes are global and fixed in number,
whatever the number of workers: worker r of W reads lanes [rL/W, (r+1)L/W). A lane never ends: after its part of an
epoch comes its part of the next, and segments are cut out of that, across the border too. Nothing of a stream is lost:
the last lane is padded, and the target of a lane's last token is the first token of the next lane, so every token but
the first of an epoch is a target exactly once. No iterator exists, hence none has to be saved: a step is looked up in
prefix sums.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from sharding.shards import Split

IGNORED = -1  # target of a position that has none
TABLE = 4096  # jittered lengths until they begin again
Ints = np.ndarray[Any, Any]


class StreamConfig(Section):
    """Section `data` of a training recipe."""

    corpus: Place | dict[Place, float] = Field(
        description="shard directory (URL), or several with their shares of the lanes"
    )
    lanes: int = Field(16, ge=1, description="texts read side by side, over all workers: the global batch")
    bptt: int = Field(70, ge=1, description="tokens of a segment, T")
    jitter: bool = Field(False, description="segments of varying length, the learning rate with them")
    order: Literal["notes", "patients"] = Field("notes", description="what is shuffled; a patient's notes by time")
    backward: bool = Field(False, description="each note from its end to its beginning")
    carry_across: Literal["everything", "patients", "notes"] = Field(
        "everything", description="what the hidden state survives"
    )

    @model_validator(mode="after")
    def _shared(self) -> StreamConfig:
        if isinstance(self.corpus, dict):
            if not self.corpus or min(self.corpus.values()) <= 0:
                raise ValueError("data.corpus: give each corpus a share above 0")
            if len(self.corpus) > self.lanes:
                raise ValueError(f"{self.lanes} lanes are too few for {len(self.corpus)} corpora; raise data.lanes")
        return self

    @property
    def urls(self) -> list[str]:
        """The shard directories."""
        return [self.corpus] if isinstance(self.corpus, str) else list(self.corpus)


@dataclass(frozen=True)
class Batch:
    """One segment of some lanes: inputs and next tokens, int64 [lanes, T]; targets may be IGNORED."""

    tokens_BT: Tensor
    targets_BT: Tensor
    starts_BT: Tensor | None = None  # bool: where what was read before is to be forgotten; None: nowhere
    notes_BT: Tensor | None = None  # int64: the note a target belongs to; where asked for

    def _each(self, make: Any) -> Batch:
        starts_BT, notes_BT = (None if tensor is None else make(tensor) for tensor in (self.starts_BT, self.notes_BT))
        return Batch(make(self.tokens_BT), make(self.targets_BT), starts_BT, notes_BT)

    def rows(self, start: int, stop: int) -> Batch:
        """The segment of some of its lanes."""
        return self._each(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> Batch:
        """The same on another device; from pinned memory the copy goes on beside what comes next."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in memory that a GPU reads by itself."""
        return self._each(lambda tensor: tensor.pin_memory())


def lanes_of(rank: int, world: int, lanes: int) -> range:
    """Global lanes of one worker, as many as each other has, or one more. Raises ConfigError where one gets none."""
    if lanes < world:
        raise ConfigError(
            f"data.lanes={lanes} are too few for {world} workers, of which each needs one; raise data.lanes"
        )
    return range(rank * lanes // world, (rank + 1) * lanes // world)


class Lengths:
    """Lengths of the segments, one after the other without end, and where they begin.

    With jitter (Merity et al. 2017, arXiv:1708.02182 §4.1): 95% N(T, 5), 5% N(T/2, 5), from a table of 4,096 that
    begins again, so a step's place is an index.
    """

    def __init__(self, bptt: int, jitter: bool, seed: int):
        lengths = np.full(1, bptt)
        if jitter:
            draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1 << 20])))
            mean = np.where(draws.random(TABLE) < 0.95, bptt, bptt / 2)
            lengths = np.clip(np.rint(draws.normal(mean, 5.0)), min(5, bptt), bptt + 20).astype(np.int64)
        self._ends = np.cumsum(lengths)

    def offset(self, step: int) -> int:
        """Positions of a lane before segment `step`."""
        rounds, place = divmod(step, len(self._ends))
        return rounds * int(self._ends[-1]) + (int(self._ends[place - 1]) if place else 0)

    def count(self, positions: int) -> int:
        """How many segments hold so many positions; the last may be cut."""
        rounds, rest = divmod(positions, int(self._ends[-1]))
        return rounds * len(self._ends) + (int(np.searchsorted(self._ends, rest)) + 1 if rest else 0)


class Streams:
    """The lanes of one split. `shuffle=False` reads the notes in corpus order (evaluation); with `passes` the lanes end
    after so many epochs, else never.
    """

    def __init__(
        self,
        split: Split,
        lanes: int,
        bptt: int,
        seed: int,
        *,
        shuffle: bool = True,
        order: str = "notes",
        backward: bool = False,
        carry_across: str = "everything",
        passes: float | None = None,
        with_notes: bool = False,
        lengths: Lengths | None = None,
    ):
        if split.n_tokens < 2 * lanes:
            raise DataError(f"{split.n_tokens} tokens are too few for {lanes} lanes; lower data.lanes")
        self.split, self.lanes, self.seed, self.shuffle = split, lanes, seed, shuffle
        self._by_patient, self._backward, self._with_notes = order == "patients", backward, with_notes
        self._across = carry_across
        self._lengths = lengths or Lengths(bptt, False, seed)
        self.lane_tokens = -(-split.n_tokens // lanes)
        self._end = None if passes is None else int(np.ceil(passes * self.lane_tokens))
        self._epochs: dict[int, tuple[Ints, Ints]] = {}

    @property
    def steps(self) -> int | None:
        """Segments until the lanes end; None where they never do."""
        return None if self._end is None else self._lengths.count(self._end)

    def offset_of(self, step: int) -> int:
        """Positions of a lane before segment `step`."""
        offset = self._lengths.offset(step)
        return offset if self._end is None else min(offset, self._end)

    def length_of(self, step: int) -> int:
        """Positions of segment `step`."""
        return self.offset_of(step + 1) - self.offset_of(step)

    def epoch_of(self, step: int) -> float:
        """How often the split has been read before segment `step`."""
        return self.offset_of(step) / self.lane_tokens

    def order(self, epoch: int) -> Ints:
        """Notes of an epoch in reading order."""
        split = self.split
        if not self.shuffle:
            return np.arange(split.n_notes)
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        if not self._by_patient:
            return draws.permutation(split.n_notes)
        rank = draws.permutation(int(split.patient_of_note.max()) + 1)
        return np.lexsort((split.time_order, rank[split.patient_of_note]))

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """(notes in reading order, where each ends in the stream)."""
        if epoch not in self._epochs:
            order = self.order(epoch)
            # A segment may lie in two epochs, and two workers' threads never share a stream: two are enough.
            self._epochs = {known: self._epochs[known] for known in self._epochs if abs(known - epoch) == 1}
            self._epochs[epoch] = order, np.cumsum(self.split.length_of_note[order])
        return self._epochs[epoch]

    def _spans(self, step: int) -> list[tuple[int, int, int]]:
        """(epoch, from, to) of the segment in a lane's part of each epoch it touches."""
        at, stop = self.offset_of(step), self.offset_of(step + 1)
        found = []
        while at < stop:
            epoch, first = divmod(at, self.lane_tokens)
            take = min(self.lane_tokens - first, stop - at)
            found.append((epoch, first, first + take))
            at += take
        return found

    def spans(self, step: int, lanes: range) -> list[list[tuple[int, int, int]]]:
        """For every lane what it reads as inputs: (epoch, from, to) in the epoch's stream; empty past its end."""
        total = self.split.n_tokens
        found = []
        for lane in lanes:
            base = lane * self.lane_tokens
            parts = [(epoch, base + start, min(base + stop, total)) for epoch, start, stop in self._spans(step)]
            found.append([part for part in parts if part[1] < part[2]])
        return found

    def batch(self, step: int, lanes: range) -> Batch:
        """The segment of step `step` for `lanes`."""
        shape = (len(lanes), self.length_of(step))
        total = self.split.n_tokens
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        starts = np.zeros(shape, bool) if self._across != "everything" else None
        notes = np.full(shape, IGNORED, np.int64) if self._with_notes else None
        row, row_notes = np.empty(shape[1] + 1, np.int64), np.empty(shape[1] + 1, np.int64)
        for index, lane in enumerate(lanes):
            at = 0
            for epoch, first, last in self._spans(step):
                start = min(lane * self.lane_tokens + first, total)
                stop = min(lane * self.lane_tokens + last, total)
                ahead = min(stop + 1, total)  # the next token, where there is one
                begins = self._read(epoch, start, ahead, row, row_notes if notes is not None else None)
                inputs, wanted = slice(at, at + stop - start), slice(at, at + max(ahead - start - 1, 0))
                tokens[index, inputs] = row[: stop - start]
                targets[index, wanted] = row[1 : ahead - start]
                if notes is not None:
                    notes[index, wanted] = row_notes[1 : ahead - start]
                if starts is not None:
                    starts[index, [at + begin for begin in begins if begin < stop - start]] = True
                    starts[index, at] |= first == 0  # the lane goes on elsewhere
                at += last - first
        made = [None if part is None else torch.from_numpy(part) for part in (starts, notes)]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), *made)

    def _read(self, epoch: int, start: int, stop: int, out: Ints, notes: Ints | None) -> list[int]:
        """Copies tokens [start, stop) of an epoch's stream into `out`; returns where in it the carry's text begins."""
        split = self.split
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, start, side="right"))
        filled, begins = 0, []
        while filled < stop - start:
            note = int(order[place])
            length = int(split.length_of_note[note])
            skipped = start + filled - (int(ends[place]) - length)
            take = min(length - skipped, stop - start - filled)
            values, first = split.values[split.shard_of_note[note]], int(split.start_of_note[note])
            if self._backward:
                out[filled : filled + take] = values[first + length - skipped - take : first + length - skipped][::-1]
            else:
                out[filled : filled + take] = values[first + skipped : first + skipped + take]
            if notes is not None:
                notes[filled : filled + take] = note
            if skipped == 0 and self._begins(order, place):
                begins.append(filled)
            filled += take
            place += 1
        return begins

    def _begins(self, order: Ints, place: int) -> bool:
        """Whether the carry ends before the note at a place of the order."""
        if self._across != "patients":
            return self._across == "notes"
        patients = self.split.patient_of_note
        return place == 0 or bool(patients[order[place]] != patients[order[place - 1]])

    def targets_in(self, step: int) -> int:
        """Number of targets of a step over all lanes; by arithmetic, so no worker has to ask another."""
        last = self.split.n_tokens - 1  # the position without a next token
        bases = np.arange(self.lanes) * self.lane_tokens
        return sum(
            int((np.minimum(bases + stop, last) - np.minimum(bases + start, last)).sum())
            for _, start, stop in self._spans(step)
        )


class Mixture:
    """Several corpora side by side, each on its own lanes: every step has them in the same shares. Reads as Streams."""

    def __init__(self, parts: Sequence[Streams]):
        self.parts = list(parts)
        ends = np.cumsum([part.lanes for part in parts]).tolist()
        self._places = list(zip([0, *ends[:-1]], ends, strict=True))
        self.steps = None
        self.offset_of, self.length_of = parts[0].offset_of, parts[0].length_of

    def epoch_of(self, step: int) -> float:
        """Tokens read before segment `step`, in the size of all corpora."""
        tokens = sum(part.split.n_tokens for part in self.parts)
        return sum(part.epoch_of(step) * part.split.n_tokens for part in self.parts) / tokens

    def batch(self, step: int, lanes: range) -> Batch:
        """The segment of step `step` for `lanes`."""
        made = []
        for part, (start, stop) in zip(self.parts, self._places, strict=True):
            mine = range(max(lanes.start, start) - start, min(lanes.stop, stop) - start)
            if len(mine):
                made.append(part.batch(step, mine))
        starts = [batch.starts_BT for batch in made if batch.starts_BT is not None]
        return Batch(
            torch.cat([batch.tokens_BT for batch in made]),
            torch.cat([batch.targets_BT for batch in made]),
            torch.cat(starts) if starts else None,
        )

    def targets_in(self, step: int) -> int:
        """Number of targets of a step over all lanes."""
        return sum(part.targets_in(step) for part in self.parts)


def shared_out(lanes: int, shares: Sequence[float]) -> list[int]:
    """Lanes of each share, by largest remainders, at least one each."""
    spare = lanes - len(shares)
    exact = [max(share * lanes / sum(shares) - 1, 0.0) for share in shares]
    exact = [part * spare / sum(exact) if sum(exact) else 0.0 for part in exact]
    found = [int(part) for part in exact]
    for index in sorted(range(len(shares)), key=lambda index: (found[index] - exact[index], index)):
        found[index] += sum(found) < spare
    return [1 + part for part in found]


def open_streams(splits: Sequence[Split], config: StreamConfig, seed: int, passes: float | None) -> Streams | Mixture:
    """The training streams of a recipe, for so many epochs or without end."""
    lengths = Lengths(config.bptt, config.jitter, seed)

    def opened(split: Split, lanes: int, seed: int) -> Streams:
        return Streams(
            split,
            lanes,
            config.bptt,
            seed,
            order=config.order,
            backward=config.backward,
            carry_across=config.carry_across,
            passes=passes,
            lengths=lengths,
        )

    if isinstance(config.corpus, str):
        return opened(splits[0], config.lanes, seed)
    if passes is not None:
        raise ConfigError("data.corpus names several corpora, which have no epoch in common: give steps, not epochs")
    lanes = shared_out(config.lanes, list(config.corpus.values()))
    seeds = [int(np.random.SeedSequence([seed, 2 << 20, index]).generate_state(1)[0]) for index in range(len(lanes))]
    return Mixture([opened(*one) for one in zip(splits, lanes, seeds, strict=True)])


class Prefetch:
    """One worker's batches, the next made while the last is trained on. It owns no truth: any step may be asked for."""

    def __init__(self, streams: Streams | Mixture, lanes: range, device: torch.device):
        self._streams, self._lanes, self._pin = streams, lanes, device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")  # the only one that reads the streams
        self._ahead: tuple[int, Future[Batch]] | None = None
        self.waited = 0.0  # seconds

    def _make(self, step: int) -> Batch:
        batch = self._streams.batch(step, self._lanes)
        return batch.pinned() if self._pin else batch

    def get(self, step: int) -> Batch:
        """The batch of a step; the one after it is begun."""
        begun = time.monotonic()
        if self._ahead is not None and self._ahead[0] == step:
            batch = self._ahead[1].result()
        else:
            batch = self._thread.submit(self._make, step).result()
        self._ahead = step + 1, self._thread.submit(self._make, step + 1)
        self.waited += time.monotonic() - begun
        return batch

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)
