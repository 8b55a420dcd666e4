"""A corpus is read as it was written, without copies, and not at all where something is wrong with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from cluster import storage
from cluster.errors import DataError, StorageError
from sharding import shards
from sharding.clean import CLASS_TOKENS
from sharding.schema import FORMAT_VERSION, shard_schema
from sharding.shards import MANIFEST, TOKENIZER, Corpus, content_fingerprint, sealed, token_lists, write_shard
from sharding.tokenizer import Tokenizer, TokenizerConfig, train

MODEL = train({"chest": 9, "pain": 7, "since": 5, "today": 3}, TokenizerConfig(vocab_size=282), CLASS_TOKENS)
TEXTS = {"train": [["chest pain", "pain\nsince"], ["today"]], "valid": [["since today"]], "test": []}


def make(url: str) -> str:
    """A corpus written by hand: two training shards, one for validation, none for test."""
    tokenizer = Tokenizer(MODEL)
    storage.write_bytes(storage.join(url, TOKENIZER), MODEL)
    splits: dict[str, Any] = {}
    for split, parts in TEXTS.items():
        entries = []
        for index, texts in enumerate(parts):
            table = pa.table(
                {
                    "doc_id": [f"{split}{index}{number}" for number in range(len(texts))],
                    "patient_id": ["p"] * len(texts),
                    "encounter_id": pa.array([None] * len(texts), pa.string()),
                    "category": ["ECG"] * len(texts),
                    "time": ["2101-10-20"] * len(texts),
                    "n_bytes": [len(text.encode()) for text in texts],
                    "tokens": token_lists(tokenizer.encode(texts), tokenizer.dtype),
                }
            )
            name = storage.join(url, f"{split}-{index:05d}.arrow")
            entries.append(write_shard(name, table, tokenizer))
        totals = {key: sum(entry[key] for entry in entries) for key in ("notes", "tokens", "bytes")}
        splits[split] = totals | {"shards": entries}
    marks = {"sha256": tokenizer.sha256, "bos": True, "eos": True, "file": TOKENIZER, "vocab_size": 282}
    manifest = {"format": FORMAT_VERSION, "dtype": "uint16", "tokenizer": marks, "splits": splits}
    manifest |= {"fingerprint": content_fingerprint(manifest)}
    storage.write_json(storage.join(url, MANIFEST), sealed(manifest))
    return url


def test_what_was_written_is_read_without_a_copy(tmp_path: Path) -> None:
    corpus = Corpus.open(make(str(tmp_path)))
    split = corpus.split("train")
    texts = [text for part in TEXTS["train"] for text in part]
    assert [corpus.tokenizer.decode(split.tokens(note).tolist()) for note in range(3)] == texts
    assert (split.n_notes, split.n_bytes) == (3, sum(len(text) for text in texts))
    assert split.shard_of_note.tolist() == [0, 0, 1]
    assert split.start_of_note.tolist() == [0, split.length_of_note[0], 0]
    assert (split.shard_of_note.dtype, split.start_of_note.dtype) == (np.int32, np.int64)
    assert split.n_tokens == split.length_of_note.sum() == sum(map(len, split.values))
    assert split.column("doc_id") == ["train00", "train01", "train10"]
    assert split.column("encounter_id") == [None] * 3
    for values in split.values:
        assert values.dtype == np.uint16
        assert not values.flags.owndata
        assert not values.flags.writeable
        assert values[0] == corpus.tokenizer.bos_id
        assert values[-1] == corpus.tokenizer.eos_id


READ = """
import sys
import pyarrow as pa
from pathlib import Path
from sharding.shards import Corpus
corpus = Corpus.open(sys.argv[1])
before = pa.total_allocated_bytes()
split = corpus.split("train")
assert split.values[0].nbytes > 0
assert pa.total_allocated_bytes() == before
maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
mapped = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1].endswith(".arrow")]
for values in split.values:
    start = values.__array_interface__["data"][0]
    assert any(low <= start and start + values.nbytes <= high for low, high in mapped)
"""


def test_reading_maps_the_file_and_allocates_nothing(tmp_path: Path) -> None:
    """In a process of its own: in this one other tests' tables are freed in between."""
    subprocess.run([sys.executable, "-c", READ, make(str(tmp_path))], check=True)


def test_the_same_notes_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = make(str(tmp_path / "a")), make(str(tmp_path / "b"))
    for name in storage.names(first):
        assert storage.sha256(f"{first}/{name}") == storage.sha256(f"{second}/{name}"), name


def test_empty_and_unknown_splits_are_errors_that_name_the_others(tmp_path: Path) -> None:
    corpus = Corpus.open(make(str(tmp_path)))
    for name in ("test", "tset"):
        with pytest.raises(DataError, match=f"'{name}'; there are train, valid"):
            corpus.split(name)


def damage(url: str, what: str) -> None:
    manifest = json.loads((Path(url) / MANIFEST).read_text())
    if what == "no manifest":
        (Path(url) / MANIFEST).unlink()
    elif what == "other format":
        manifest["format"] = 99
    elif what == "edited manifest":
        manifest["splits"]["train"]["shards"].pop()
    elif what == "missing shard":
        (Path(url) / "train-00001.arrow").unlink()
    elif what == "short shard":
        path = Path(url) / "train-00000.arrow"
        path.write_bytes(path.read_bytes()[:-1])
    if what in ("other format", "edited manifest"):
        (Path(url) / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no manifest", "is not a finished shard directory; run ./launch.sh shard"),
        ("other format", "format 99"),
        ("edited manifest", "was changed after it was written"),
        ("missing shard", "train-00001.arrow: missing"),
        ("short shard", "train-00000.arrow: has .* bytes, the manifest says"),
    ],
)
def test_a_damaged_corpus_does_not_open(tmp_path: Path, what: str, said: str) -> None:
    url = make(str(tmp_path))
    damage(url, what)
    with pytest.raises(DataError, match=said):
        Corpus.open(url)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    corpus = Corpus.open(make(str(tmp_path)))
    (tmp_path / TOKENIZER).write_bytes(MODEL + b"\0")
    with pytest.raises(DataError, match="not the tokenizer of these shards"):
        _ = corpus.tokenizer


def test_remote_shards_are_fetched_once_and_checked(tmp_path: Path) -> None:
    url = make("memory://corpus-of-test-shards")
    cache = tmp_path / "cache"
    split = Corpus.open(url, cache).split("train")
    assert split.n_notes == 3
    names = sorted(path.name for path in cache.glob("*.arrow"))
    assert len(names) == 2
    filesystem = fsspec.filesystem("memory")
    target = "/corpus-of-test-shards/valid-00000.arrow"
    content = filesystem.cat(target)
    filesystem.pipe(target, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"valid-00000\.arrow: damaged"):
        Corpus.open(url, cache).split("valid")
    assert sorted(path.name for path in cache.glob("*.arrow")) == names
    filesystem.rm("/corpus-of-test-shards/train-00000.arrow")
    filesystem.pipe("/corpus-of-test-shards/train-00000.arrow", b"\0" * (cache / names[0]).stat().st_size)
    assert Corpus.open(make(url), cache).split("train").n_notes == 3


def test_a_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not used for the longest time goes; a mapped shard can still be read."""
    url, cache = make("memory://corpus-of-bounded-cache"), tmp_path / "cache"
    corpus = Corpus.open(url, cache)
    split = corpus.split("train")
    before = [split.tokens(note).copy() for note in range(split.n_notes)]
    first, second = (cache / f"{shard['sha256']}.arrow" for shard in corpus.manifest["splits"]["train"]["shards"])
    os.utime(first, (2, 2))
    os.utime(second, (1, 1))
    wanted = corpus.manifest["splits"]["valid"]["shards"][0]["size"]
    monkeypatch.setenv("CHARTLM_CACHE_GB", str((first.stat().st_size + wanted) / 1e9))
    corpus.split("valid")
    assert first.exists()
    assert not second.exists()
    assert all((split.tokens(note) == tokens).all() for note, tokens in enumerate(before))


def test_the_default_cache_is_closed_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = shards._user_cache()
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o755)
    with pytest.raises(StorageError, match="open to others"):
        shards._user_cache()


def test_a_note_without_its_marks_is_not_written(tmp_path: Path) -> None:
    tokenizer = Tokenizer(MODEL)
    table = pa.table({name: pa.array(["x"]) for name in shard_schema(tokenizer.dtype).names[:5]})
    table = table.append_column("n_bytes", pa.array([1]))
    for ids in ([tokenizer.bos_id, 9], [9, tokenizer.eos_id], [tokenizer.bos_id, tokenizer.eos_id], []):
        with pytest.raises(DataError, match="lacks BOS, EOS"):
            lists = token_lists([np.array(ids, dtype=np.uint16)], tokenizer.dtype)
            write_shard(str(tmp_path / "x.arrow"), table.append_column("tokens", lists), tokenizer)
    assert storage.names(str(tmp_path)) == []
