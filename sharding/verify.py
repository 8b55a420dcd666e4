"""`./launch.sh verify SHARDS`: every damaged or foreign file of a corpus, by name.

    manifest.json plan.json stats.json  ──► are as they were written and agree with each other
    tokenizer.model                     ──► is the manifest's
    every shard and its sidecar (threads) ► sha256; then what stands in it: columns, counts, marks, token ids
    all shards together                 ──► a note once, a patient in the split that is his
    what else lies there                ──► belongs to no manifest

A fault is a line that begins with the name of the file. One fault hides no other: what is damaged is left out of
the checks that need it whole, and all else is still looked at. A shard that is not the manifest's is not opened.
Where the manifest itself is damaged, shards are compared with their sidecars.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster import config, logs, storage
from cluster.errors import DataError, StorageError
from sharding import stats
from sharding.dedup import all_differ, byte_sums
from sharding.schema import FORMAT_VERSION, SPLITS, shard_schema, token_dtype
from sharding.shards import MANIFEST, PLAN, SHARD_NAME, TOKENIZER, WORK, content_fingerprint, marks_stand, seal_holds
from sharding.splits import SplitConfig, splits_of
from sharding.stats import PICTURE, STATS
from sharding.tokenizer import Tokenizer

AGAIN = "make the shards again"
# What lies in a shard directory beside the files of its manifest.
KNOWN = (MANIFEST, PLAN, STATS, TOKENIZER, PICTURE, storage.LOCK)
# What Arrow raises on bytes that are no Arrow file.
ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError)


class _Written(BaseModel):
    """A part of the manifest: these keys with these types."""

    model_config = ConfigDict(frozen=True, strict=True)


class _Counts(_Written):
    notes: int
    tokens: int
    bytes: int


class _Shard(_Counts):
    name: str
    size: int
    sha256: str


class _Split(_Counts):
    patients: int
    shards: list[_Shard]


class _Tokenizer(_Written):
    sha256: str
    vocab_size: int
    kind: str
    bos: bool
    eos: bool


class _Manifest(_Written):
    fingerprint: str
    recipe: dict[str, Any]
    tokenizer: _Tokenizer
    dtype: Literal["uint16", "uint32"]
    splits: dict[Literal["train", "valid", "test"], _Split]
    rows_read: int
    drops: dict[str, int]

    @functools.cached_property
    def shards(self) -> list[tuple[str, _Shard]]:
        """Every shard with the name of its split."""
        return [(name, shard) for name in SPLITS if name in self.splits for shard in self.splits[name].shards]


@dataclass
class _Found:
    """What was found in a shard; None where it could not be looked for."""

    faults: list[str] = field(default_factory=list)
    split: str = ""
    name: str = ""
    size: int = 0  # bytes read
    docs: pa.Array | None = None  # each once
    doc_sums: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # their byte_sums
    patients: pa.Array | None = None  # each once
    counted: dict[str, Any] | None = None  # as stats.of_shard


class VerifyConfig(config.Section):
    """`./launch.sh verify SHARDS`."""

    shards: str
    workers: int = Field(default=0, ge=0)  # shards looked at at a time; 0: one for every CPU of this machine


def main(args: list[str]) -> None:
    """The verb `verify`: a line for every fault, and DataError where there is one."""
    options = config.load(VerifyConfig, args, positional="shards")
    shards = options.shards
    began = time.monotonic()
    faults = verify(shards, options.workers)
    seconds = max(time.monotonic() - began, 1e-9)
    for fault in faults:
        logs.say(fault)
    if faults:
        number = "1 fault" if len(faults) == 1 else f"{len(faults):,} faults; the first"
        raise DataError(f"{shards}: {number}: {faults[0]}")
    manifest = _Manifest.model_validate(storage.read_json(storage.join(shards, MANIFEST)))
    size = sum(shard.size for _, shard in manifest.shards) / 1e6
    notes, tokens = (sum(getattr(split, key) for split in manifest.splits.values()) for key in ("notes", "tokens"))
    logs.say(
        f"{shards}: whole; {len(manifest.shards):,} shards, {notes:,} notes, {tokens:,} tokens, {size:,.1f} MB, "
        f"{size / seconds:,.0f} MB/s"
    )


def verify(url: str, workers: int = 0) -> list[str]:
    """The faults of a shard directory, each a line that begins with the name of a file; none if it is whole.

    `workers` shards are looked at at a time; 0: one for every CPU of this machine.
    """
    present = _names(url)
    faults: list[str] = []
    manifest, fault = _manifest(url)
    faults += fault
    plan = _sealed(url, PLAN, faults)
    counted = _sealed(url, STATS, faults)
    if manifest is not None:
        faults += _manifest_faults(manifest)
        if plan is not None and not _same([plan.get("format"), plan.get("recipe")], [FORMAT_VERSION, manifest.recipe]):
            faults.append(f"{PLAN}: its format or recipe is not the manifest's; {AGAIN}")
    tokenizer, fault = _tokenizer(url, manifest)
    faults += fault
    items = manifest.shards if manifest is not None else _by_sidecars(url, present)
    found = _looked_at(items, functools.partial(_shard, url, manifest=manifest, tokenizer=tokenizer), workers)
    for one in found:
        faults += one.faults
    faults += _repeated(found)
    if manifest is not None:
        faults += _misplaced(found, manifest)
        if counted is not None:
            faults += _miscounted(counted, found, manifest)
    faults += _foreign(present, items, manifest is not None)
    return [_printable(fault) for fault in faults]


def _names(url: str) -> list[str]:
    """Names of all that lies in the directory, files half written included."""
    names = storage.names(url)
    if names and storage.is_local(url):
        names += [path.name for path in storage.local_path(url).glob("*.tmp")]
    return sorted(names)


def _printable(line: str) -> str:
    """The line without the control signs and broken UTF-8 that a name may have."""
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in line)


def _same(left: Any, right: Any) -> bool:
    """Whether two JSON values are the same to the last type (1 is not 1.0)."""
    return config.fingerprint(left) == config.fingerprint(right)


def _json(url: str, name: str, faults: list[str]) -> tuple[Any, bool]:
    """The value of a JSON file (None if it has none) and whether it has the bytes that storage.write_json gives."""
    try:
        content = storage.read_bytes(storage.join(url, name))
        value = json.loads(content)
        canonical = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    except StorageError as exc:
        faults.append(_unreadable(name, exc))
    except (ValueError, RecursionError):
        faults.append(f"{name}: is not valid JSON; {AGAIN}")
    else:
        if content == canonical:
            return value, True
        faults.append(f"{name}: its bytes are not as they were written; {AGAIN}")
        return value, False
    return None, False


def _unreadable(name: str, error: StorageError) -> str:
    return f"{name}: missing; {AGAIN}" if isinstance(error.__cause__, FileNotFoundError) else f"{name}: {error}"


def _sealed(url: str, name: str, faults: list[str]) -> dict[str, Any] | None:
    """The value of a sealed file if it can be relied on."""
    value, canonical = _json(url, name, faults)
    if isinstance(value, dict) and seal_holds(value):
        return value
    if canonical:  # else it is known to be damaged
        faults.append(f"{name}: was changed after it was written (its checksum does not hold); {AGAIN}")
    return None


def _manifest(url: str) -> tuple[_Manifest | None, list[str]]:
    """The manifest if it can be relied on, and what is wrong with the file."""
    faults: list[str] = []
    value = _sealed(url, MANIFEST, faults)
    if value is None:
        return None, faults
    if value.get("format") != FORMAT_VERSION:
        return None, [*faults, f"{MANIFEST}: is of another format, this chartlm reads {FORMAT_VERSION}; {AGAIN}"]
    try:
        manifest = _Manifest.model_validate(value)
    except ValidationError as exc:
        where = ".".join(map(str, exc.errors()[0]["loc"]))
        return None, [*faults, f"{MANIFEST}: {where} is missing or of another kind; {AGAIN}"]
    if content_fingerprint(value) != manifest.fingerprint:
        faults.append(f"{MANIFEST}: its fingerprint is not that of its shards; {AGAIN}")
    return manifest, faults


def _manifest_faults(manifest: _Manifest) -> list[str]:
    """Where a manifest contradicts itself."""
    faults = []
    if set(manifest.splits) != set(SPLITS):
        faults.append(f"{MANIFEST}: has not the splits {', '.join(SPLITS)}; {AGAIN}")
    for name, split in manifest.splits.items():
        for number, shard in enumerate(split.shards):
            if shard.name != f"{name}-{number:05d}.arrow":
                faults.append(f"{MANIFEST}: shard {number} of {name} has the name of another; {AGAIN}")
        for key in ("notes", "tokens", "bytes"):
            if getattr(split, key) != sum(getattr(shard, key) for shard in split.shards):
                faults.append(f"{MANIFEST}: the {key} of split {name} are not those of its shards; {AGAIN}")
    kept = sum(split.notes for split in manifest.splits.values())
    if kept + sum(manifest.drops.values()) != manifest.rows_read:
        faults.append(f"{MANIFEST}: notes kept and dropped are not the records read; {AGAIN}")
    if manifest.dtype != str(token_dtype(manifest.tokenizer.vocab_size)):
        faults.append(f"{MANIFEST}: {manifest.dtype} is not the type of this many tokens; {AGAIN}")
    return faults


def _tokenizer(url: str, manifest: _Manifest | None) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer if it is the manifest's."""
    try:
        model = storage.read_bytes(storage.join(url, TOKENIZER))
    except StorageError as exc:
        return None, [_unreadable(TOKENIZER, exc)]
    if manifest is None:
        return None, []
    entry = manifest.tokenizer
    if hashlib.sha256(model).hexdigest() != entry.sha256:
        return None, [f"{TOKENIZER}: sha256 is not the manifest's; {AGAIN}"]
    try:
        tokenizer = Tokenizer(model, bos=entry.bos, eos=entry.eos)
    except (RuntimeError, ValueError, KeyError, DataError):
        return None, [f"{TOKENIZER}: is not a tokenizer of chartlm; {AGAIN}"]
    if (tokenizer.vocab_size, tokenizer.kind) != (entry.vocab_size, entry.kind):
        return None, [f"{TOKENIZER}: its kind or size is not what the manifest says; {AGAIN}"]
    return tokenizer, []


def _by_sidecars(url: str, present: list[str]) -> list[tuple[str, _Shard]]:
    """The shards that are there, as their sidecars describe them; faults of the sidecars are found later."""
    items = []
    for name in present:
        if re.fullmatch(SHARD_NAME, name) and name.endswith(".arrow"):
            value, _ = _json(url, _sidecar(name), [])
            try:
                shard = _Shard.model_validate(value["shard"])
            except (ValidationError, TypeError, KeyError):
                shard = _Shard(name=name, size=-1, sha256="", notes=0, tokens=0, bytes=0)
            items.append((name.partition("-")[0], shard.model_copy(update={"name": name})))
    return items


def _sidecar(name: str) -> str:
    return f"{name.removesuffix('.arrow')}.json"


def _looked_at(items: list[tuple[str, _Shard]], look: Callable[[str, _Shard], _Found], workers: int) -> list[_Found]:
    """What was found in every shard, several at a time."""
    found: list[_Found] = []
    read, began = 0, time.monotonic()
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        with logs.progress("verify", sum(max(shard.size, 0) for _, shard in items)) as advance:
            for one in pool.map(lambda item: look(*item), items):
                found.append(one)
                read += one.size
                advance(read, f"{read / 1e6 / max(time.monotonic() - began, 1e-9):.0f} MB/s")
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _shard(url: str, split: str, shard: _Shard, *, manifest: _Manifest | None, tokenizer: Tokenizer | None) -> _Found:
    """Looks at one shard and its sidecar."""
    found = _Found(split=split, name=shard.name)
    origin = "the manifest" if manifest is not None else "its sidecar"
    place = storage.join(url, shard.name)
    try:
        size = storage.size_bytes(place)
        content = storage.read_bytes(place) if size == shard.size else b""
    except StorageError as exc:
        found.faults.append(_unreadable(shard.name, exc))
    else:
        found.size = len(content)
        if shard.size < 0:
            pass  # there is neither a manifest nor a sidecar that can be read
        elif size != shard.size:
            found.faults.append(f"{shard.name}: has {size:,} bytes, {origin} says {shard.size:,}; {AGAIN}")
        elif hashlib.sha256(content).hexdigest() != shard.sha256:
            found.faults.append(f"{shard.name}: sha256 is not that of {origin}; {AGAIN}")
        elif manifest is not None:
            faults = _opened(content, shard, manifest, tokenizer, found)
            found.faults += [f"{shard.name}: {fault}; {AGAIN}" for fault in faults]
    found.faults += _sidecar_faults(url, shard, manifest, found.counted)
    return found


def _sidecar_faults(
    url: str, shard: _Shard, manifest: _Manifest | None, counted: dict[str, Any] | None
) -> Iterator[str]:
    name = _sidecar(shard.name)
    faults: list[str] = []
    value, canonical = _json(url, name, faults)
    yield from faults
    if manifest is None or not canonical:
        return
    if not isinstance(value, dict) or value.keys() != {"shard", "tokenizer", "stats"}:
        yield f"{name}: is not the sidecar of a shard; {AGAIN}"
        return
    if not _same(value["shard"], shard.model_dump()):
        yield f"{name}: describes another shard than the manifest; {AGAIN}"
    if value["tokenizer"] != manifest.tokenizer.sha256:
        yield f"{name}: names another tokenizer than the manifest; {AGAIN}"
    if counted is not None and not _same(value["stats"], counted):
        yield f"{name}: its stats are not those of the shard; {AGAIN}"


def _opened(
    content: bytes, shard: _Shard, manifest: _Manifest, tokenizer: Tokenizer | None, found: _Found
) -> list[str]:
    """What is wrong in a shard with the right sha256. What stands in it is put into `found`."""
    try:
        file = pa.ipc.open_file(pa.py_buffer(content))
        if file.num_record_batches != 1:
            return [f"has {file.num_record_batches} record batches instead of one"]
        schema = shard_schema(np.dtype(manifest.dtype))
        if not file.schema.equals(schema, check_metadata=True):
            return [f"its columns are not those of format {FORMAT_VERSION} with {manifest.dtype} tokens"]
        batch = file.get_batch(0)
        batch.validate(full=True)
    except ARROW_ERRORS:
        return ["is not an Arrow file"]
    lists = batch.column("tokens")
    empty = [name for name in schema.names if not schema.field(name).nullable and batch.column(name).null_count]
    if empty or lists.values.null_count:
        return [f"has nulls in {', '.join(empty or ['tokens'])}"]
    faults = []
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    if not _within(lists.values.buffers()[1], pa.py_buffer(content)):
        faults.append("is compressed and cannot be mapped")
    counts = {"notes": len(batch), "tokens": len(values), "bytes": pc.sum(batch.column("n_bytes")).as_py() or 0}
    for key, number in counts.items():
        if number != (said := getattr(shard, key)):
            faults.append(f"has {number:,} {key}, the manifest says {said:,}")
    if not len(batch) or offsets[0] or offsets[-1] != len(values):
        faults.append("has no notes, or tokens of no note")
    known = not len(values) or int(values.max()) < manifest.tokenizer.vocab_size
    if not known:
        faults.append(f"has token id {int(values.max())} of a vocabulary of {manifest.tokenizer.vocab_size}")
    if tokenizer is not None:
        if not marks_stand(values, offsets, tokenizer):
            faults.append("a note lacks BOS, EOS or any token")
        elif known and len(batch):
            found.counted = stats.of_shard(pa.Table.from_batches([batch]), tokenizer)
    docs = batch.column("doc_id")
    found.docs, found.patients = docs.unique(), batch.column("patient_id").unique()
    found.doc_sums = byte_sums(pa.chunked_array([found.docs]))
    if len(found.docs) < len(docs):
        faults.append(f"holds notes with the same doc_id ({len(docs) - len(found.docs):,})")
    return faults


def _within(part: pa.Buffer | None, whole: pa.Buffer) -> bool:
    return part is None or (part.address >= whole.address and part.address + part.size <= whole.address + whole.size)


def _repeated(found: list[_Found]) -> list[str]:
    """Notes that stand in two shards."""
    docs = pa.chunked_array([one.docs for one in found if one.docs is not None], pa.string())
    if not found or all_differ(docs, np.concatenate([one.doc_sums for one in found])):
        return []
    counted = docs.value_counts()
    twice = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
    owner: dict[str, str] = {}
    shared: Counter[tuple[str, str]] = Counter()
    for one in found:
        if one.docs is not None:
            for doc in one.docs.filter(pc.is_in(one.docs, twice)).to_pylist():
                shared[one.name, owner.setdefault(doc, one.name)] += 1
    return [
        f"{name}: holds notes of {other} ({number:,} with the same doc_id); {AGAIN}"
        for (name, other), number in shared.items()
        if name != other
    ]


def _misplaced(found: list[_Found], manifest: _Manifest) -> list[str]:
    """Patients who are not in the split that is theirs: also where a patient is in two, one of them is wrong."""
    faults = []
    looked = [one for one in found if one.patients is not None]
    everyone = pa.chunked_array([one.patients for one in looked], pa.string())
    ends = np.cumsum([len(chunk) for chunk in everyone.chunks])
    encoded = everyone.combine_chunks().dictionary_encode()
    patients, of_shard = encoded.dictionary, np.split(encoded.indices.to_numpy(), ends)[:-1]
    for name in manifest.splits:
        if all(one.patients is not None for one in found if one.split == name):
            present = np.zeros(len(patients), bool)
            for one, indices in zip(looked, of_shard, strict=True):
                present[indices] |= one.split == name
            if (number := int(present.sum())) != (said := manifest.splits[name].patients):
                faults.append(f"{MANIFEST}: split {name} has {number:,} patients, not {said:,}; {AGAIN}")
    try:
        splitting = SplitConfig.model_validate(manifest.recipe["splits"])
    except (KeyError, ValidationError):
        return [*faults, f"{MANIFEST}: its recipe says not how patients are split; {AGAIN}"]
    own = splits_of(patients.to_pylist(), splitting)
    for one, indices in zip(looked, of_shard, strict=True):
        strange = indices[own[indices] != SPLITS.index(one.split)]
        if number := len(strange):
            first = patients[strange[0]]
            faults.append(f"{one.name}: holds patients of another split ({number:,}; the first: {first}); {AGAIN}")
    return faults


def _miscounted(counted: dict[str, Any], found: list[_Found], manifest: _Manifest) -> Iterator[str]:
    """Where stats.json says other than the manifest and the shards."""
    if not _same([counted.get("records"), counted.get("drops")], [manifest.rows_read, manifest.drops]):
        yield f"{STATS}: its records are not the manifest's; {AGAIN}"
    for key in ("notes", "tokens", "bytes"):
        try:
            total = sum(category[key] for category in counted["categories"].values())
        except (KeyError, TypeError, AttributeError):
            total = None
        if total != sum(getattr(split, key) for split in manifest.splits.values()):
            yield f"{STATS}: the {key} of its categories are not the manifest's; {AGAIN}"
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for one in found:
        if one.counted is None:
            return  # what is missing cannot be counted
        shards[one.split].append(one.counted)
    recounted = stats.whole(shards, [], manifest.rows_read, manifest.drops)
    for key in ("categories", "lengths", "class_tokens"):
        if not _same(counted.get(key), recounted[key]):
            yield f"{STATS}: its {key} are not those of the shards; {AGAIN}"


def _foreign(present: list[str], items: list[tuple[str, _Shard]], whole: bool) -> Iterator[str]:
    """What lies there and belongs to no manifest."""
    own = {name for _, shard in items for name in (shard.name, _sidecar(shard.name))}
    for name in present:
        if name == WORK:
            yield f"{name}: an unfinished run left its notes there; run ./launch.sh shard again, or remove it"
        elif name not in KNOWN and name not in own and (whole or not re.fullmatch(SHARD_NAME, name)):
            yield f"{name}: belongs to no manifest; remove it"
