from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, DataError
from pretrain.streams import IGNORED, Streams, lanes_of


def split_of(lengths: list[int], shards: int = 2) -> Any:
    """A split whose k-th token overall is the number k, spread over a few shards."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    values, shard_of, start_of = [], [], []
    for part in np.array_split(np.arange(len(lengths)), shards):
        if len(part):
            first = int(starts[part[0]])
            values.append(np.arange(first, starts[part[-1] + 1], dtype=np.uint16))
            shard_of += [len(values) - 1] * len(part)
            start_of += [int(starts[note]) - first for note in part]
    return SimpleNamespace(
        n_notes=len(lengths),
        n_tokens=sum(lengths),
        values=values,
        shard_of_note=np.array(shard_of, np.int32),
        start_of_note=np.array(start_of, np.int64),
        length_of_note=np.array(lengths, np.int64),
    )


notes = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(notes, st.integers(1, 9), st.integers(1, 17), st.integers(0, 3), st.integers(0, 5))
def test_every_token_is_read_once_and_is_a_target_once(
    lengths: list[int], lanes: int, bptt: int, epoch: int, seed: int
) -> None:
    split = split_of(lengths)
    if split.n_tokens < 2 * lanes:
        with pytest.raises(DataError, match="too few"):
            Streams(split, lanes, bptt, seed)
        return
    streams = Streams(split, lanes, bptt, seed)
    stream = np.concatenate([[*range(sum(lengths[:n]), sum(lengths[: n + 1]))] for n in streams.order(epoch)])
    following = dict(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))
    read: list[int] = []
    targets: list[int] = []
    for segment in range(streams.steps_per_epoch):
        step = epoch * streams.steps_per_epoch + segment
        batch = streams.batch(step, range(lanes))
        spans = streams.spans(step, range(lanes))
        for lane, (start, stop) in enumerate(spans):
            read += batch.tokens_BT[lane, : stop - start].tolist()
        wanted = batch.targets_BT != IGNORED
        for token, target in zip(batch.tokens_BT[wanted].tolist(), batch.targets_BT[wanted].tolist(), strict=True):
            assert following[token] == target
            targets.append(target)
        assert streams.targets_in(step) == int(wanted.sum())
    assert sorted(read) == list(range(split.n_tokens))
    assert sorted(targets) == sorted(stream[1:].tolist())


def test_lanes_are_contiguous_from_segment_to_segment() -> None:
    streams = Streams(split_of([7, 30, 4, 19]), lanes=3, bptt=6, seed=1)
    lane = np.concatenate([streams.batch(step, range(1, 2)).tokens_BT[0] for step in range(streams.steps_per_epoch)])
    first = streams.batch(0, range(1, 2)).targets_BT[0]
    assert lane[1 : 1 + len(first)].tolist() == first.tolist()


def test_a_worker_reads_the_same_lanes_whatever_the_number_of_workers() -> None:
    lengths = np.random.Generator(np.random.Philox(3)).integers(1, 60, 50).tolist()
    whole = Streams(split_of(lengths), 8, 11, seed=4)
    for step in (0, 5, whole.steps_per_epoch - 1, whole.steps_per_epoch + 3):
        together = whole.batch(step, range(8))
        for world in (1, 2, 4, 8):
            parts = []
            for rank in range(world):
                alone = Streams(split_of(lengths), 8, 11, seed=4)  # a fresh worker, entering at this step
                parts.append(alone.batch(step, lanes_of(rank, world, 8)).targets_BT)
            assert np.concatenate(parts).tolist() == together.targets_BT.tolist()


def test_epochs_and_seeds_have_their_own_order() -> None:
    streams = Streams(split_of([5] * 40), 2, 7, seed=1)
    assert streams.order(0).tolist() != streams.order(1).tolist()
    assert streams.order(0).tolist() == Streams(split_of([5] * 40), 4, 9, seed=1).order(0).tolist()
    assert streams.order(0).tolist() != Streams(split_of([5] * 40), 2, 7, seed=2).order(0).tolist()
    assert Streams(split_of([5] * 40), 2, 7, 1, shuffle=False).order(3).tolist() == list(range(40))


def test_lanes_that_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes=10 cannot be shared evenly by 4"):
        lanes_of(0, 4, 10)
