from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, DataError
from pretrain.streams import (
    IGNORED,
    TABLE,
    Lengths,
    Mixture,
    Prefetch,
    StreamConfig,
    Streams,
    lanes_of,
    open_streams,
    shared_out,
)


def split_of(lengths: list[int], shards: int = 2, patients: list[int] | None = None, first_token: int = 0) -> Any:
    """A split whose k-th token overall is the number k, spread over a few shards; later notes are earlier in time."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    values, shard_of, start_of = [], [], []
    for part in np.array_split(np.arange(len(lengths)), shards):
        if len(part):
            first = int(starts[part[0]])
            values.append(np.arange(first, starts[part[-1] + 1], dtype=np.uint16) + np.uint16(first_token))
            shard_of += [len(values) - 1] * len(part)
            start_of += [int(starts[note]) - first for note in part]
    return SimpleNamespace(
        n_notes=len(lengths),
        n_tokens=sum(lengths),
        values=values,
        shard_of_note=np.array(shard_of, np.int32),
        start_of_note=np.array(start_of, np.int64),
        length_of_note=np.array(lengths, np.int64),
        patient_of_note=np.array(patients if patients is not None else range(len(lengths)), np.int64),
        time_order=np.arange(len(lengths))[::-1],
    )


notes = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def stream_of(streams: Streams, lengths: list[int], epoch: int, backward: bool = False) -> list[int]:
    """The epoch's stream, written out."""
    found: list[int] = []
    for note in streams.order(epoch):
        tokens = list(range(sum(lengths[:note]), sum(lengths[: note + 1])))
        found += tokens[::-1] if backward else tokens
    return found


@settings(max_examples=150, deadline=None)
@given(notes, st.integers(1, 9), st.integers(1, 17), st.integers(0, 5), st.booleans(), st.booleans())
def test_every_token_is_read_once_and_is_a_target_once(
    lengths: list[int], lanes: int, bptt: int, seed: int, jitter: bool, backward: bool
) -> None:
    """In every epoch, whatever segments lie across its borders."""
    split = split_of(lengths)
    table = Lengths(bptt, jitter, seed)
    if split.n_tokens < 2 * lanes:
        with pytest.raises(DataError, match="too few"):
            Streams(split, lanes, bptt, seed)
        return
    streams = Streams(split, lanes, bptt, seed, backward=backward, lengths=table)
    epochs = 3
    written = [stream_of(streams, lengths, epoch, backward) for epoch in range(epochs)]
    read: list[list[int]] = [[] for _ in range(epochs)]
    targets: list[list[int]] = [[] for _ in range(epochs)]
    step = 0
    while streams.offset_of(step) < epochs * streams.lane_tokens:
        batch = streams.batch(step, range(lanes))
        assert batch.tokens_BT.shape == (lanes, streams.length_of(step))
        wanted = 0
        for lane, spans in enumerate(streams.spans(step, range(lanes))):
            for epoch, start, stop in spans:
                if epoch >= epochs:
                    continue
                at = epoch * streams.lane_tokens + start - lane * streams.lane_tokens - streams.offset_of(step)
                tokens = batch.tokens_BT[lane, at : at + stop - start].tolist()
                assert tokens == written[epoch][start:stop]
                read[epoch] += tokens
                following = batch.targets_BT[lane, at : at + stop - start].tolist()
                assert following == [*written[epoch][start + 1 : stop + 1], IGNORED][: stop - start]
                targets[epoch] += [target for target in following if target != IGNORED]
        wanted = int((batch.targets_BT != IGNORED).sum())
        assert streams.targets_in(step) == wanted
        step += 1
    for epoch in range(epochs):
        assert sorted(read[epoch]) == list(range(split.n_tokens))
        assert sorted(targets[epoch]) == sorted(written[epoch][1:])


@settings(max_examples=60, deadline=None)
@given(notes, st.integers(1, 4), st.integers(1, 17), st.sampled_from([0.3, 1.0, 1.5, 2.0]))
def test_lanes_end_after_the_passes(lengths: list[int], lanes: int, bptt: int, passes: float) -> None:
    split = split_of(lengths)
    if split.n_tokens < 2 * lanes:
        return
    ending = Streams(split, lanes, bptt, 1, passes=passes)
    endless = Streams(split, lanes, bptt, 1)
    assert endless.steps is None
    assert ending.steps is not None
    read = [ending.batch(step, range(lanes)).tokens_BT for step in range(ending.steps)]
    whole = [endless.batch(step, range(lanes)).tokens_BT for step in range(ending.steps)]
    positions = int(np.ceil(passes * ending.lane_tokens))
    assert np.concatenate(read, 1).tolist() == np.concatenate(whole, 1)[:, :positions].tolist()
    assert all(batch.shape[1] for batch in read)


def test_lanes_are_contiguous_from_segment_to_segment() -> None:
    streams = Streams(split_of([7, 30, 4, 19]), lanes=3, bptt=6, seed=1)
    lane = np.concatenate([streams.batch(step, range(1, 2)).tokens_BT[0] for step in range(3)])
    first = streams.batch(0, range(1, 2)).targets_BT[0]
    assert lane[1 : 1 + len(first)].tolist() == first.tolist()


def test_a_worker_reads_the_same_lanes_whatever_the_number_of_workers() -> None:
    lengths = np.random.Generator(np.random.Philox(3)).integers(1, 60, 50).tolist()
    whole = Streams(split_of(lengths), 8, 11, seed=4)
    for step in (0, 5, 17, 18, 40):
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


def test_patients_are_shuffled_with_their_notes_in_time_order() -> None:
    patients = np.random.Generator(np.random.Philox(1)).integers(0, 20, 90).tolist()
    split = split_of([3] * 90, patients=patients)
    streams = Streams(split, 2, 7, seed=1, order="patients")
    orders = [streams.order(epoch).tolist() for epoch in range(2)]
    for order in orders:
        assert sorted(order) == list(range(90))
        seen = [patients[note] for note in order]
        met = [patient for place, patient in enumerate(seen) if place == 0 or seen[place - 1] != patient]
        assert len(met) == len(set(met))  # each in one piece
        for patient in met:
            mine = [note for note in order if patients[note] == patient]
            assert mine == sorted(mine, reverse=True)  # split_of: later notes are earlier in time
    first = [[patients[note] for note in order] for order in orders]
    assert first[0] != first[1]


def test_patients_and_times_of_a_corpus(tmp_path: Any) -> None:
    import pyarrow as pa

    from sharding.schema import shard_schema
    from sharding.shards import Split

    def part(patients: list[str | None], times: list[str | None]) -> pa.RecordBatch:
        schema = shard_schema(np.dtype(np.uint16))
        rows = {
            "doc_id": [str(row) for row in range(len(times))],
            "patient_id": patients,
            "encounter_id": [None] * len(times),
            "category": [None] * len(times),
            "time": times,
            "n_bytes": [1] * len(times),
            "tokens": [[1, 2]] * len(times),
        }
        return pa.RecordBatch.from_arrays([pa.array(rows[f.name], f.type) for f in schema], schema=schema)

    split = Split(
        [part(["b", None, "a"], ["2101-02-01", None, "2100"]), part(["a", "b", None], ["2100", "2099", None])]
    )
    codes = split.patient_of_note.tolist()
    assert codes[0] == codes[4]
    assert codes[2] == codes[3]
    assert len(set(codes)) == 4
    assert sorted(set(codes)) == [0, 1, 2, 3]
    assert split.time_order.tolist() == [5, 0, 3, 4, 2, 1]


@pytest.mark.parametrize("across", ["notes", "patients"])
def test_starts_are_where_the_carry_ends(across: str) -> None:
    lengths = [4, 7, 1, 9, 5, 6]
    patients = [0, 0, 1, 1, 1, 2]
    streams = Streams(split_of(lengths, patients=patients), 2, 5, 3, order="patients", carry_across=across)
    for step in range(12):
        batch = streams.batch(step, range(2))
        assert batch.starts_BT is not None
        for lane, spans in enumerate(streams.spans(step, range(2))):
            for epoch, start, stop in spans:
                order = streams.order(epoch)
                begins = np.concatenate([[0], np.cumsum(np.array(lengths)[order])[:-1]]).tolist()
                if across == "patients":
                    seen = [patients[note] for note in order]
                    begins = [at for place, at in enumerate(begins) if place == 0 or seen[place] != seen[place - 1]]
                begins.append(lane * streams.lane_tokens)  # there the lane jumps
                at = epoch * streams.lane_tokens + start - lane * streams.lane_tokens - streams.offset_of(step)
                flags = batch.starts_BT[lane, at : at + stop - start].tolist()
                assert flags == [position in begins for position in range(start, stop)]
    assert Streams(split_of(lengths), 2, 5, 3).batch(0, range(2)).starts_BT is None


def test_notes_of_targets() -> None:
    lengths = [4, 7, 1, 9]
    streams = Streams(split_of(lengths), 2, 5, 3, with_notes=True, passes=1)
    owner = np.repeat(np.arange(4), lengths)
    for step in range(streams.steps or 0):
        batch = streams.batch(step, range(2))
        assert batch.notes_BT is not None
        known = batch.targets_BT != IGNORED
        assert batch.notes_BT[known].tolist() == owner[batch.targets_BT[known].numpy()].tolist()
        assert (batch.notes_BT[~known] == IGNORED).all()


def test_jittered_lengths() -> None:
    """95% N(70, 5) and 5% N(35, 5): their mean, their two humps, and the same places however one comes to them."""
    lengths = Lengths(70, True, seed=1)
    sizes = np.array([lengths.offset(step + 1) - lengths.offset(step) for step in range(2 * TABLE)])
    assert sizes.min() >= 5
    assert sizes.max() <= 90
    assert sizes.mean() == pytest.approx(0.95 * 70 + 0.05 * 35, abs=0.5)
    assert 0.03 < (sizes < 52).mean() < 0.07
    assert sizes[:TABLE].tolist() == sizes[TABLE:].tolist()
    assert Lengths(70, True, seed=1).offset(5000) == lengths.offset(5000) == sizes[:5000].sum()
    assert Lengths(70, True, seed=2).offset(5000) != lengths.offset(5000)
    for positions in (1, 70, 71, int(sizes[:TABLE].sum()), int(sizes[:5000].sum()) + 3):
        count = lengths.count(positions)
        assert lengths.offset(count) >= positions > lengths.offset(count - 1)


def test_a_mixture_has_each_corpus_on_its_lanes_as_it_is_alone() -> None:
    splits = [split_of([9, 30, 4, 19]), split_of([40] * 9, first_token=1000)]
    config = StreamConfig(corpus={"wiki": 1, "mimic": 3}, lanes=8, bptt=6, jitter=True, carry_across="notes")
    mixture = open_streams(splits, config, 5, None)
    assert isinstance(mixture, Mixture)
    assert mixture.steps is None
    for step in range(40):
        whole = mixture.batch(step, range(8))
        assert whole.tokens_BT.shape == (8, mixture.length_of(step))
        assert whole.starts_BT is not None
        assert whole.starts_BT.shape == whole.tokens_BT.shape
        assert (whole.targets_BT[:2] < 1000).all()
        assert (
            set((whole.targets_BT[2:] >= 1000).unique().tolist()) | {True} == {True}
            or (whole.targets_BT[2:][whole.targets_BT[2:] < 1000] == IGNORED).all()
        )
        assert mixture.targets_in(step) == int((whole.targets_BT != IGNORED).sum())
        alone = mixture.parts[1].batch(step, range(6))
        assert alone.tokens_BT.tolist() == whole.tokens_BT[2:].tolist()
        for world in (2, 4):
            apart = [mixture.batch(step, lanes_of(rank, world, 8)).targets_BT for rank in range(world)]
            assert np.concatenate(apart).tolist() == whole.targets_BT.tolist()
    with pytest.raises(ConfigError, match="give steps, not epochs"):
        open_streams(splits, config, 5, 1.0)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 60))
def test_shares_of_the_lanes(shares: list[float], more: int) -> None:
    lanes = len(shares) + more
    found = shared_out(lanes, shares)
    assert sum(found) == lanes
    assert min(found) >= 1
    assert [part for _, part in sorted(zip(shares, found, strict=True))] == sorted(found)
    assert shared_out(10, [0.3, 0.7]) == [3, 7]


def test_batches_made_ahead_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.Generator(np.random.Philox(3)).integers(1, 60, 50).tolist()
    streams, cpu = Streams(split_of(lengths), 8, 11, seed=4), torch.device("cpu")
    ahead = Prefetch(Streams(split_of(lengths), 8, 11, seed=4), range(2, 4), cpu)
    for step in (0, 1, 2, 9, 10, 3, 30):
        assert ahead.get(step).tokens_BT.tolist() == streams.batch(step, range(2, 4)).tokens_BT.tolist()
    assert ahead.waited > 0
    monkeypatch.setattr(Streams, "batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ahead.get(99)
    ahead.close()


def test_lanes_that_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes=3 are too few for 4 workers"):
        lanes_of(0, 4, 3)


def test_a_recipe_of_several_corpora_needs_shares() -> None:
    with pytest.raises(ValueError, match="a share above 0"):
        StreamConfig(corpus={"a": 1.0, "b": 0.0})
    with pytest.raises(ValueError, match="too few for 2 corpora"):
        StreamConfig(corpus={"a": 1.0, "b": 1.0}, lanes=1)
