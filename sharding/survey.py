"""What only all parts together can tell: duplicates, patients, whether names are unique, and the order of notes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DataError
from sharding import parts
from sharding.dedup import all_differ, byte_sums, first_occurrences, mixed, rows_by
from sharding.schema import SPLITS, Run

# Parts whose sketches one task compares: 256 bytes a note.
PARTS_AT_A_TIME = 16
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
COLUMNS = ["record", "doc_id", "patient_id", "time", "n_bytes", "split", "digest"]


@dataclass(frozen=True)
class Survey:
    """Which notes stay, where they go, and how many they are."""

    shards: list[str]  # names without ending: train-00000, …
    shard: list[np.ndarray]  # per part and note, its place in `shards`, -1 if it does not stay
    place: list[np.ndarray]  # per part and note, its place in the shard
    split: list[np.ndarray]  # per part and note, its place in SPLITS
    digest: list[np.ndarray]  # per part and note, the first 64 bits of its digest
    notes: Counter[str]  # per split, those that stay
    patients: dict[str, int]  # per split
    drops: Counter[str]


def survey(
    work: str,
    read: Sequence[dict[str, Any]],
    dedup: str,
    near_similarity: float,
    order: str,
    shard_bytes: int,
    seed: int,
    run: Run,
) -> Survey:
    """Looks at all notes, without their words. Raises DataError where a name stands twice or times are missing."""
    firsts = np.cumsum([0, *(part["rows"] for part in read)])
    tables = [parts.notes_of(work, part["index"]).select(COLUMNS) for part in read]
    lengths = [len(table) for table in tables]
    ends = np.cumsum(lengths)[:-1]
    nothing = parts.NOTE_SCHEMA.empty_table().select(COLUMNS)
    notes = pa.concat_tables([nothing, *tables])  # maps of files: to copy what is looked at once takes longer
    numbers = notes.column("record").to_numpy() + np.repeat(firsts[:-1], lengths) + 1
    split = notes.column("split").to_numpy()
    with ThreadPoolExecutor(1) as beside:  # the workers have nothing to do meanwhile
        ordering = beside.submit(_in_order, notes, numbers, split, order, seed)
        names = notes.column("doc_id")
        _check_unique(pc.coalesce(names, pa.array(numbers).cast(pa.string())) if names.null_count else names)
        digests = np.concatenate([_words_of(chunk) for chunk in notes.column("digest").chunks])
        drops: Counter[str] = Counter()
        keep = np.ones(len(notes), bool)
        if dedup != "off":
            keep = first_occurrences(digests)
            drops["duplicate"] = int((~keep).sum())
        if dedup == "near":
            copies = _near(work, np.split(keep, ends), near_similarity, run)
            drops["near_duplicate"] = int(copies.sum())
            keep &= ~copies
        if order == "patients":
            _check_times(notes.column("time").filter(pa.array(keep)))
        ordered, patient, patients = ordering.result()
    ordered = ordered[keep[ordered]]
    together = patient[ordered] if order == "patients" else np.arange(len(ordered))
    sizes = notes.column("n_bytes").to_numpy()[ordered]
    shards, shard_of, place_of = _cut(split[ordered], together, sizes, shard_bytes)
    shard, place = np.full(len(notes), -1, np.int32), np.zeros(len(notes), np.int32)
    shard[ordered], place[ordered] = shard_of, place_of
    staying = np.zeros(patients, bool)
    staying[patient[ordered]] = True
    split_of_patient = np.zeros(len(staying), np.int8)
    split_of_patient[patient] = split
    notes_of, patients_of = (
        np.bincount(of, minlength=len(SPLITS)).tolist() for of in (split[ordered], split_of_patient[staying])
    )
    return Survey(
        shards,
        np.split(shard, ends),
        np.split(place, ends),
        np.split(split, ends),
        np.split(digests[:, 0], ends),
        Counter(dict(zip(SPLITS, notes_of, strict=True))),
        dict(zip(SPLITS, patients_of, strict=True)),
        drops,
    )


def _in_order(
    notes: pa.Table, numbers: np.ndarray, split: np.ndarray, order: str, seed: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """All rows in the order of shards; the patient of each row, as a number; how many patients there are."""
    encoded = notes.column("patient_id").dictionary_encode().combine_chunks()
    patient = encoded.indices.to_numpy()
    if order == "patients":
        rank = _ranks(encoded.dictionary, seed)[patient]
        keys = {"split": split, "rank": rank, "time": notes.column("time"), "row": np.arange(len(notes))}
        ordered = pc.sort_indices(pa.table(keys), sort_keys=[(name, "ascending") for name in keys]).to_numpy()
    else:
        ordered = rows_by(_shuffled(numbers, seed))
        ordered = np.concatenate([ordered[split[ordered] == number] for number in range(len(SPLITS))])
    return ordered, patient, len(encoded.dictionary)


def _words_of(digests: pa.FixedSizeBinaryArray) -> np.ndarray:
    """The digests as pairs of numbers, uint64 [notes, 2]."""
    values = np.frombuffer(digests.buffers()[1] or b"", "<u8").reshape(-1, 2)
    return values[digests.offset : digests.offset + len(digests)]


def _check_unique(names: pa.ChunkedArray) -> None:
    if not all_differ(names, byte_sums(names)):
        counted = names.value_counts()
        twice = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
        raise DataError(f"doc_id {pc.min(twice).as_py()} stands twice in the input; it must name one note")


def _check_times(times: pa.ChunkedArray) -> None:
    dated = pc.sum(pc.fill_null(pc.match_substring_regex(times, r"^\d{4}-\d\d-\d\d"), False)).as_py() or 0
    if dated != len(times):
        raise DataError(
            f"order='patients' needs a time for every note, written YYYY-MM-DD…; {len(times) - dated:,} notes have "
            "none: name the column in reader.time, or take order='notes'"
        )


def _near(work: str, keep: list[np.ndarray], threshold: float, run: Run) -> np.ndarray:
    buckets = -(-len(keep) // PARTS_AT_A_TIME)
    copies = [np.zeros(len(mask), bool) for mask in keep]
    for found in run(parts.near_duplicates, [(work, keep, bucket, buckets, threshold) for bucket in range(buckets)]):
        for index, rows in found:
            copies[index][rows] = True
    return np.concatenate(copies)


def _ranks(patients: pa.Array, seed: int) -> np.ndarray:
    """A number for every patient that no other patient can change: in their order patients are shuffled."""
    digests = [hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest() for name in patients.to_pylist()]
    return np.frombuffer(b"".join(digests), "<u8")


def _shuffled(records: np.ndarray, seed: int) -> np.ndarray:
    """A number for every record: in their order notes are shuffled (SplitMix64 from `seed`, Steele et al. 2014)."""
    return mixed(mixed(np.array([seed], np.uint64)) + _GOLDEN_GAMMA * records.astype(np.uint64))


def _cut(
    split: np.ndarray, together: np.ndarray, sizes: np.ndarray, shard_bytes: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Cuts ordered notes into shards of about `shard_bytes` of text of one split.

    Neighbours with the same value of `together` stay in one shard. Returns the names of the shards and, for every
    note, its shard and its place in it.
    """
    names: list[str] = []
    shard = np.zeros(len(split), np.int32)
    for number, name in enumerate(SPLITS):
        rows = np.flatnonzero(split == number)
        if not len(rows):
            continue
        begin = np.cumsum(sizes[rows]) - sizes[rows]
        leaders = np.flatnonzero(np.diff(together[rows], prepend=-1))
        begin = np.repeat(begin[leaders], np.diff(np.append(leaders, len(rows))))
        total = int(sizes[rows].sum())
        wanted = max(round(total / shard_bytes), 1)
        found = np.cumsum(np.diff(begin * wanted // total, prepend=0) > 0)  # a shard that no note begins in is none
        shard[rows] = found + len(names)
        names += [f"{name}-{place:05d}" for place in range(int(found[-1]) + 1)]
    starts = np.flatnonzero(np.diff(shard, prepend=-1))
    place = np.arange(len(shard)) - np.repeat(starts, np.diff(np.append(starts, len(shard))))
    return names, shard, place.astype(np.int32)
