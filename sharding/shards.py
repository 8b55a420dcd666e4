"""Shards on disk: Arrow IPC files of the notes of a split, and the manifest that makes them a corpus.

    train-00000.arrow …   one record batch, uncompressed
    train-00000.json …    its sidecar: size, sha256, counts; written after it
    valid-00000.arrow …
    tokenizer.model       SentencePiece
    stats.json            what the corpus is made of
    plan.json             what this directory is made from (written first)
    manifest.json         counts, sha256 of every file, resolved recipe (written last)

Without a manifest there is no corpus. Shards are memory-mapped; tokens come out as numpy without a copy.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import config, storage
from cluster.errors import DataError, StorageError
from sharding.schema import FORMAT_VERSION, SPLITS, shard_schema
from sharding.tokenizer import Tokenizer

MANIFEST = "manifest.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer.model"
# Parts of an unfinished run: note text.
WORK = "work"
# A shard or its sidecar.
SHARD_NAME = rf"({'|'.join(SPLITS)})-\d+\.(arrow|json)"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The value with a checksum of itself, so that no number in it changes unseen."""
    return value | {"checksum": config.fingerprint(value)}


def seal_holds(value: dict[str, Any]) -> bool:
    """Whether a sealed value is as it was written."""
    return value.get("checksum") == config.fingerprint({k: v for k, v in value.items() if k != "checksum"})


def write_shard(url: str, notes: pa.Table, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes notes (columns of the schema) as one shard; returns its entry for the manifest.

    The same notes give the same bytes.
    """
    lists = notes.column("tokens").combine_chunks()
    offsets = lists.offsets.to_numpy()
    values = lists.flatten().to_numpy()
    _check_marks(url, values, offsets - offsets[0], tokenizer)
    schema = shard_schema(tokenizer.dtype)
    batch = pa.RecordBatch.from_arrays([notes.column(name).combine_chunks() for name in schema.names], schema=schema)
    with storage.atomic_writer(url) as stream:
        hashed = _Hashed(stream)
        with pa.ipc.new_file(pa.PythonFile(hashed, mode="w"), schema) as file:
            file.write_batch(batch)
        size = stream.tell()
    return {
        "name": url.rsplit("/", 1)[-1],
        "size": size,
        "sha256": hashed.sha256.hexdigest(),
        "notes": len(lists),
        "tokens": len(values),
        "bytes": int(notes.column("n_bytes").to_numpy().sum()),
    }


class _Hashed:
    """A stream to write to that knows the sha256 of what was written."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.sha256 = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        self._stream.flush()


def token_lists(tokens: Sequence[np.ndarray], dtype: np.dtype[np.generic]) -> pa.ListArray:
    """The `tokens` column of a shard from the tokens of each note."""
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])])
    kind = shard_schema(dtype).field("tokens").type
    values = pa.array(np.concatenate(list(tokens)), type=kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=kind)


def _check_marks(url: str, values: np.ndarray, offsets: np.ndarray, tokenizer: Tokenizer) -> None:
    """A corpus that lost its BOS or EOS trains without an error, and badly: look at every note."""
    if not marks_stand(values, offsets, tokenizer):
        raise DataError(f"{url}: a note lacks BOS, EOS or any token; this is a fault of chartlm: report it")


def marks_stand(values: np.ndarray, offsets: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether every note has BOS and EOS as the tokenizer says, and at least one more token."""
    if (np.diff(offsets) < 1 + tokenizer.bos + tokenizer.eos).any():
        return False
    if tokenizer.bos and (values[offsets[:-1]] != tokenizer.bos_id).any():
        return False
    return not (tokenizer.eos and (values[offsets[1:] - 1] != tokenizer.eos_id).any())


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """Fingerprint of what is trained on: equal for equal shards, wherever and by however many made."""
    splits = {name: [shard["sha256"] for shard in split["shards"]] for name, split in manifest["splits"].items()}
    return config.fingerprint(
        {
            "format": manifest["format"],
            "dtype": manifest["dtype"],
            "tokenizer": {key: manifest["tokenizer"][key] for key in ("sha256", "bos", "eos")},
            "splits": splits,
        }
    )


FETCH_SECONDS = 7200.0
CACHE_GB = 200  # of copies of remote shards on a machine, unless CHARTLM_CACHE_GB says otherwise


class Corpus:
    """A finished shard directory. Reading is memory-mapped; remote shards are copied into a cache first."""

    def __init__(self, url: str, manifest: dict[str, Any], cache: Path) -> None:
        self.url = url
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self._cache = cache

    @classmethod
    def open(cls, url: str, cache: Path | None = None) -> Corpus:
        """The corpus of a shard directory, its files present and of the right size. Raises DataError."""
        manifest_url = storage.join(url, MANIFEST)
        if not storage.exists(manifest_url):
            raise DataError(f"{url} is not a finished shard directory; run ./launch.sh shard … output={url}")
        manifest = storage.read_json(manifest_url)
        if not isinstance(manifest, dict) or "format" not in manifest:
            raise DataError(f"{manifest_url}: not a manifest of shards; run ./launch.sh shard … output={url}")
        if manifest["format"] != FORMAT_VERSION:
            raise DataError(
                f"{url}: shards of format {manifest['format']}, this chartlm reads format {FORMAT_VERSION}; "
                "make them again with ./launch.sh shard"
            )
        try:
            same = seal_holds(manifest) and content_fingerprint(manifest) == manifest["fingerprint"]
        except (KeyError, TypeError, AttributeError):
            same = False
        if not same:
            raise DataError(f"{manifest_url}: was changed after it was written; make the shards again")
        for name, size in files(manifest).items():
            check_size(storage.join(url, name), size)
        return cls(url, manifest, cache or _user_cache())

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards. Raises DataError where the file is another one."""
        entry = self.manifest["tokenizer"]
        model_url = storage.join(self.url, entry["file"])
        model = storage.read_bytes(model_url)
        if hashlib.sha256(model).hexdigest() != entry["sha256"]:
            raise DataError(f"{model_url}: is not the tokenizer of these shards (sha256 differs)")
        return Tokenizer(model, bos=entry["bos"], eos=entry["eos"])

    def split(self, name: str) -> Split:
        """All notes of "train", "valid" or "test". Raises DataError where there is none."""
        filled = [split for split in SPLITS if self.manifest["splits"].get(split, {}).get("notes")]
        if name not in filled:
            raise DataError(f"{self.url}: no notes in split {name!r}; there are {', '.join(filled)}")
        return Split([_map(self._local(shard)) for shard in self.manifest["splits"][name]["shards"]])

    def _local(self, shard: dict[str, Any]) -> Path:
        url = storage.join(self.url, shard["name"])
        if storage.is_local(url):
            return storage.local_path(url)
        # Named by content, so corpora may share a cache; renamed when checked: no process maps half a file.
        kept = self._cache / f"{shard['sha256']}.arrow"
        busy = f"{self._cache}: another process fetches shards into it, {FETCH_SECONDS / 3600:.0f} h long; end it"
        with storage.held(str(self._cache), busy, FETCH_SECONDS):  # the workers of a machine need the same shards
            if not kept.exists() or kept.stat().st_size != shard["size"]:
                with tempfile.TemporaryDirectory(dir=self._cache) as folder:
                    copy = storage.fetch(url, Path(folder))
                    if storage.sha256(str(copy)) != shard["sha256"]:
                        raise DataError(f"{url}: damaged (sha256 is not the manifest's); make the shards again")
                    _make_room(self._cache, shard["size"])
                    os.replace(copy, kept)
            os.utime(kept)  # used now
        return kept


def files(manifest: dict[str, Any]) -> dict[str, int]:
    """Name and size in bytes of every shard of a manifest."""
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return {shard["name"]: shard["size"] for shard in shards}


def check_size(url: str, size: int) -> None:
    """Raises DataError unless the file is there and has this size in bytes."""
    if not storage.exists(url):
        raise DataError(f"{url}: missing; make the shards again with ./launch.sh shard")
    found = storage.size_bytes(url)
    if found != size:
        raise DataError(f"{url}: has {found:,} bytes, the manifest says {size:,}; make the shards again")


def _user_cache() -> Path:
    """Folder of this user's copies of remote shards. Tokens are notes: nobody else may read them."""
    folder = Path(tempfile.gettempdir()) / f"chartlm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise StorageError(f"{folder}: belongs to or is open to others; remove it or name another cache")
    return folder


def _make_room(cache: Path, size: int) -> None:
    """Removes the shards of a cache that were not used for the longest time, until `size` bytes more are within its
    bound. A process that has mapped one keeps reading it: its bytes go when the last one ends.
    """
    bound = float(os.environ.get("CHARTLM_CACHE_GB", CACHE_GB)) * 1e9 - size
    kept = []
    for path in cache.glob("*.arrow"):
        with contextlib.suppress(FileNotFoundError):  # another process makes room, too
            kept.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(bytes_ for _, bytes_, _ in kept)
    for _, bytes_, path in sorted(kept):
        if total <= bound:
            break
        path.unlink(missing_ok=True)
        total -= bytes_


def _map(path: Path) -> pa.RecordBatch:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except pa.ArrowInvalid as exc:
        raise DataError(f"{path}: not an Arrow file; it was damaged: make the shards again") from exc


class Split:
    """All notes of one split in manifest order. Token buffers are views of memory-mapped files."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = list(batches)
        lists = [batch.column("tokens") for batch in self._batches]
        self.values: list[np.ndarray] = [notes.values.to_numpy(zero_copy_only=True) for notes in lists]
        offsets = [notes.offsets.to_numpy().astype(np.int64) for notes in lists]
        counts = [len(notes) for notes in lists]
        self.shard_of_note = np.repeat(np.arange(len(lists), dtype=np.int32), counts)
        self.start_of_note = np.concatenate([ends[:-1] for ends in offsets])
        self.length_of_note = np.concatenate([np.diff(ends) for ends in offsets])
        self.n_notes = int(sum(counts))
        self.n_tokens = int(self.length_of_note.sum())
        self.n_bytes = sum(int(batch.column("n_bytes").to_numpy().sum()) for batch in self._batches)

    @functools.cached_property
    def patient_of_note(self) -> np.ndarray:
        """A number for the patient of every note, int64, from 0; a note without a patient is one of its own."""
        codes = self._strings("patient_id").dictionary_encode().indices
        known = np.asarray(codes.fill_null(-1)).astype(np.int64)
        alone = known < 0
        known[alone] = known.max(initial=-1) + 1 + np.arange(alone.sum())
        return known

    def patients(self) -> list[str]:
        """Every patient once; notes without one have no part in it."""
        return [name for name in self._strings("patient_id").unique().to_pylist() if name is not None]

    @functools.cached_property
    def time_order(self) -> np.ndarray:
        """Place of every note among all by time, int64; those without a time first, equal ones in manifest order."""
        sorted_notes = pc.array_sort_indices(self._strings("time"), null_placement="at_start")
        rank = np.empty(self.n_notes, np.int64)
        rank[np.asarray(sorted_notes)] = np.arange(self.n_notes)
        return rank

    def _strings(self, name: str) -> pa.Array:
        columns = [batch.column(name).cast(pa.large_string()) for batch in self._batches]
        return pa.concat_arrays(columns)

    def column(self, name: str) -> list[Any]:
        """One value per note of doc_id, patient_id, encounter_id, category, time or n_bytes."""
        return [value for batch in self._batches for value in batch.column(name).to_pylist()]

    def tokens(self, note: int) -> np.ndarray:
        """Token ids of one note, a view."""
        values, start = self.values[self.shard_of_note[note]], int(self.start_of_note[note])
        view: np.ndarray = values[start : start + int(self.length_of_note[note])]
        return view
