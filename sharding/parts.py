"""What tasks make of one block, and of one shard.

    block ──read_block──► part-00000.notes, .words, .vocabulary ──count_words──► words of its training notes
                                                                └─encode──► part-00000.tokens, cut by shard
    part-*.tokens ──pack──► train-00000.arrow and its sidecar train-00000.json

A step's JSON is written after its files and makes them count; a step whose JSON is there with files of the
right size is not done again. Steps are pure functions of their arguments, so a task that died may simply run
again. No part waits for the disk: what a power cut took has not its size, on file systems that record a size after
the data (ext4, XFS); where that is in doubt, remove OUTPUT/work after one. Parts hold note text: they lie in
OUTPUT/work, which is removed when the manifest is written.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from cluster.errors import StorageError
from sharding import dedup, stats
from sharding.clean import CleanConfig, clean_notes
from sharding.readers import ReaderConfig
from sharding.schema import Block, shard_schema
from sharding.shards import TOKENIZER, write_shard
from sharding.splits import SplitConfig, splits_of
from sharding.tokenizer import Tokenizer, units

Compare = Literal["off", "exact", "near"]

# How the names of work files begin.
NAMES = ("part-", "read.json", "index.json")

# One row per cleaned note, in input order; what decides about it, but not what it says.
NOTE_SCHEMA = pa.schema(
    [
        pa.field("record", pa.int64(), nullable=False),  # from 0 within the block
        pa.field("doc_id", pa.string()),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("encounter_id", pa.string()),
        pa.field("category", pa.string()),
        pa.field("time", pa.string()),
        pa.field("n_bytes", pa.int64(), nullable=False),
        pa.field("split", pa.int8(), nullable=False),  # place in SPLITS
        pa.field("digest", pa.binary(dedup.DIGEST_BYTES), nullable=False),  # zeros where nothing asks for it
        pa.field("sketch", pa.binary(dedup.SKETCH_BYTES)),  # only where near-duplicates are looked for
    ]
)


def _url(work: str, index: int, kind: str) -> str:
    return storage.join(work, f"part-{index:05d}.{kind}")


def read_block(
    index: int,
    block: Block,
    reader: ReaderConfig,
    cleaning: CleanConfig,
    splits: SplitConfig,
    compare: Compare,
    work: str,
) -> dict[str, Any]:
    """Parses and cleans a block, gives each note its split, and writes the part. Returns its counts.

    `compare` says what later steps ask of the text: nothing, its digest, or its sketch too.
    """
    parsed = reader.parse(block)
    words = clean_notes(parsed.notes.column("text").combine_chunks(), cleaning)
    hashes = dedup.word_hashes(words.vocabulary)
    patients = parsed.notes.column("patient_id").combine_chunks()
    digests = [bytes(dedup.DIGEST_BYTES)] * len(patients)
    compared = np.empty(0, np.uint64)
    if compare != "off" or patients.null_count:
        compared = dedup.word_hashes(dedup.folded(words.vocabulary))
        digests = dedup.note_digests(compared, words.ids, words.offsets)
    notes = parsed.notes.drop_columns(["text"]).append_column("n_bytes", pa.array(words.n_bytes))
    notes = notes.append_column("digest", pa.array(digests, pa.binary(dedup.DIGEST_BYTES)))
    if patients.null_count:
        patients = pc.coalesce(patients, pa.array([digest.hex() for digest in digests], pa.string()))
    notes = notes.set_column(notes.column_names.index("patient_id"), "patient_id", patients)
    notes = notes.append_column("split", pa.array(_splits(patients, splits)))
    sketches = _sketches(compared, words.ids, words.offsets) if compare == "near" else pa.nulls(len(notes))
    notes = notes.append_column("sketch", sketches.cast(NOTE_SCHEMA.field("sketch").type))
    # Most blocks have few enough distinct words for half the bytes.
    narrow = np.uint16 if len(words.vocabulary) <= 1 << 16 else np.int32
    lists = pa.ListArray.from_arrays(pa.array(words.offsets, pa.int32()), pa.array(words.ids.astype(narrow)))
    filled = pa.array(~words.blank)
    files = {
        "notes": notes.select(NOTE_SCHEMA.names).cast(NOTE_SCHEMA).filter(filled),
        "words": pa.table({"words": lists}).filter(filled),
        "vocabulary": pa.table({"word": pa.array(words.vocabulary, pa.string()), "hash": pa.array(hashes)}),
    }
    sizes = {}
    for kind, table in files.items():
        sizes[_url("", index, kind).strip("/")] = _write(_url(work, index, kind), [table])
    drops = Counter(parsed.drops)
    drops.update(empty=int(words.blank.sum()))
    counts = {
        "index": index,
        "rows": parsed.records,
        "notes": files["notes"].num_rows,
        "drops": dict(sorted(drops.items())),
        "bytes_read": int(words.n_bytes.sum()),
        "stored_end": block.stored_end,
        "files": sizes,
    }
    storage.write_json(storage.join(work, f"part-{index:05d}.read.json"), counts, durable=False)
    return counts


def _splits(patients: pa.StringArray, config: SplitConfig) -> np.ndarray:
    encoded = patients.dictionary_encode()
    split: np.ndarray = splits_of(encoded.dictionary.to_pylist(), config)[encoded.indices.to_numpy()]
    return split


def _sketches(hashes: np.ndarray, ids: np.ndarray, offsets: np.ndarray) -> pa.Array:
    found = dedup.sketches(hashes, ids, offsets)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(dedup.SKETCH_BYTES), len(found), [None, pa.py_buffer(np.ascontiguousarray(found, "<u2"))]
    )


def _write(url: str, tables: Sequence[pa.Table]) -> int:
    """Writes tables of one schema as one record batch each; returns the size of the file in bytes."""
    with storage.atomic_writer(url, durable=False) as stream:
        with pa.ipc.new_file(pa.PythonFile(stream, mode="w"), tables[0].schema) as file:
            for table in tables:
                whole = table.combine_chunks()
                for batch in whole.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]:
                    file.write_batch(batch)
        return stream.tell()


def _open(url: str) -> pa.RecordBatchFileReader:
    source = pa.memory_map(str(storage.local_path(url))) if storage.is_local(url) else storage.read_bytes(url)
    return pa.ipc.open_file(source)


def notes_of(work: str, index: int) -> pa.Table:
    """The rows of a part (NOTE_SCHEMA)."""
    return _open(_url(work, index, "notes")).read_all()


def done(work: str, step: str, index: int) -> dict[str, Any] | None:
    """What the JSON of a step says, if its files are there with the right sizes."""
    url = storage.join(work, f"part-{index:05d}.{step}.json")
    if not storage.exists(url):
        return None
    counts: dict[str, Any] = storage.read_json(url)
    for name, size in counts["files"].items():
        file = storage.join(work, name)
        if not storage.exists(file) or storage.size_bytes(file) != size:
            return None
    return counts


def count_words(work: str, index: int, counted: np.ndarray, kind: str) -> pa.Table:
    """How often each word stands in the chosen notes of a part: a table (word, count)."""
    vocabulary = _open(_url(work, index, "vocabulary")).read_all().column("word")
    lists = _open(_url(work, index, "words")).read_all().column("words").combine_chunks()
    ids = lists.filter(pa.array(counted)).flatten().to_numpy()
    counts = np.bincount(ids, minlength=len(vocabulary))
    counts[0] = 0  # the line end
    met = np.flatnonzero(counts)
    words, counts = vocabulary.take(pa.array(met)).to_pylist(), counts[met]
    if kind != "word" and not any(" " in word for word in words):
        return pa.table({"word": pa.array(words, pa.string()), "count": pa.array(counts, pa.int64())})
    found: Counter[str] = Counter()
    for word, count in zip(words, counts.tolist(), strict=True):
        for unit in units(word, kind):
            found[unit] += count
    return pa.table({"word": pa.array(found, pa.string()), "count": pa.array(found.values(), pa.int64())})


def near_duplicates(
    work: str, kept: Sequence[np.ndarray], bucket: int, buckets: int, threshold: float
) -> list[tuple[int, np.ndarray]]:
    """Of the patients of one bucket, the notes that nearly repeat an earlier one: (part, rows) for every part.

    `kept` masks, per part, the notes that are still there.
    """
    patients: list[np.ndarray] = []
    places: list[np.ndarray] = []
    found: list[np.ndarray] = []
    for index, mask in enumerate(kept):
        notes = notes_of(work, index)
        encoded = notes.column("patient_id").combine_chunks().dictionary_encode()
        keys = dedup.word_hashes(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]
        rows = np.flatnonzero(mask & (keys % np.uint64(buckets) == bucket))
        sketches = notes.column("sketch").take(pa.array(rows)).combine_chunks()
        found.append(np.frombuffer(b"".join(sketches.to_pylist()), "<u2").reshape(len(rows), dedup.SKETCH_BINS))
        patients.append(keys[rows])
        places.append(np.stack([np.full(len(rows), index), rows], axis=1))
    keys, where, sketches_of_notes = np.concatenate(patients), np.concatenate(places), np.concatenate(found)
    order = np.argsort(keys, kind="stable")
    copies: list[np.ndarray] = []
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    for group in np.split(order, edges):
        copies.append(group[dedup.near_duplicates(sketches_of_notes[group], threshold)])
    dropped = where[np.sort(np.concatenate(copies))]
    return [(index, dropped[dropped[:, 0] == index, 1]) for index in range(len(kept))]


# sha256 of the tokenizer's file, and whether notes get BOS and EOS.
ModelKey = tuple[str, bool, bool]


def encode(
    output: str, work: str, index: int, first_record: int, shard: np.ndarray, place: np.ndarray, model: ModelKey
) -> dict[str, Any]:
    """Encodes the notes of a part that stay and cuts them by the shard they go to.

    `shard` and `place` say, per note of the part, which shard it goes to (-1: it does not stay) and where in it.
    """
    tokenizer = _tokenizer(output, *model)
    rows = np.lexsort((place, shard))[int((shard < 0).sum()) :]
    chosen = pa.array(rows)
    notes = notes_of(work, index).take(chosen).combine_chunks()
    lists = _open(_url(work, index, "words")).read_all().column("words").combine_chunks().take(chosen)
    vocabulary = _open(_url(work, index, "vocabulary")).read_all()
    ids = lists.flatten().to_numpy()
    values, starts, unknown = tokenizer.encode_notes(
        vocabulary.column("word").to_pylist(), ids, lists.offsets.to_numpy().astype(np.int64)
    )
    records = pc.add(notes.column("record"), first_record + 1).cast(pa.string())
    schema = shard_schema(tokenizer.dtype)
    tokens = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values), type=schema.field("tokens").type)
    columns = {name: notes.column(name) for name in schema.names if name != "tokens"}
    columns |= {
        "doc_id": pc.coalesce(notes.column("doc_id"), records),
        "tokens": tokens,
        "place": pa.array(place[rows]),
    }
    table = pa.table(columns)
    targets, firsts = np.unique(shard[rows], return_index=True)
    edges = [*firsts.tolist(), len(rows)]
    batches = [table.slice(start, end - start) for start, end in itertools.pairwise(edges)]
    name = _url("", index, "tokens").strip("/")
    counts = {
        "index": index,
        "tokenizer": tokenizer.sha256,
        "shards": targets.tolist(),  # one record batch each, in this order
        "words": stats.words(ids, unknown, vocabulary.column("hash").to_numpy()),
        "tokens": len(values),
        "bytes": int(pc.sum(notes.column("n_bytes")).as_py() or 0),
        "files": {name: _write(storage.join(work, name), batches or [table])},
    }
    storage.write_json(storage.join(work, f"part-{index:05d}.encode.json"), counts, durable=False)
    return counts


def pack(output: str, work: str, name: str, sources: Sequence[tuple[int, int]], model: ModelKey) -> dict[str, Any]:
    """Writes one shard from the record batches (part, number) that go into it, then its sidecar."""
    tokenizer = _tokenizer(output, *model)
    tables = [pa.Table.from_batches([_batch(_url(work, index, "tokens"), number)]) for index, number in sources]
    notes = pa.concat_tables(tables).combine_chunks()
    notes = notes.take(pc.sort_indices(notes.column("place"))).drop_columns(["place"])
    entry = write_shard(storage.join(output, f"{name}.arrow"), notes, tokenizer)
    sidecar = {"shard": entry, "tokenizer": tokenizer.sha256, "stats": stats.of_shard(notes, tokenizer)}
    storage.write_json(storage.join(output, f"{name}.json"), sidecar)
    return sidecar


def _batch(url: str, number: int) -> pa.RecordBatch:
    if storage.is_local(url):
        return _open(url).get_batch(number)
    with storage.reader(url, compression=None) as stream:  # of a remote file only this batch is read
        return pa.ipc.open_file(pa.PythonFile(stream, mode="r")).get_batch(number)


def packed(output: str, name: str, model: ModelKey) -> dict[str, Any] | None:
    """The sidecar of a shard that is there and whole, as far as its size tells."""
    url = storage.join(output, f"{name}.json")
    if not storage.exists(url):
        return None
    sidecar: dict[str, Any] = storage.read_json(url)
    shard = storage.join(output, f"{name}.arrow")
    whole = storage.exists(shard) and storage.size_bytes(shard) == sidecar["shard"]["size"]
    return sidecar if whole and sidecar["tokenizer"] == model[0] else None


@functools.lru_cache(maxsize=1)
def _tokenizer(output: str, sha256: str, bos: bool, eos: bool) -> Tokenizer:
    """One tokenizer for a worker process: its word cache is warm from the second part on."""
    tokenizer = Tokenizer(storage.read_bytes(storage.join(output, TOKENIZER)), bos=bos, eos=eos)
    if tokenizer.sha256 != sha256:
        raise StorageError(f"{output}: {TOKENIZER} is another one on this machine; is {output} shared by all nodes?")
    return tokenizer
