"""verify finds every fault that is put into a real corpus, names its file, and finds none where there is none."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cluster import cli, logs, storage
from cluster.config import validate
from cluster.errors import DataError
from sharding import job, shards, stats
from sharding.clean import CLASS_TOKENS
from sharding.schema import SPLITS, shard_schema
from sharding.splits import SplitConfig, split_of
from sharding.tokenizer import Tokenizer, TokenizerConfig, train
from sharding.verify import main, verify

HEADER = "ROW_ID,SUBJECT_ID,HADM_ID,CHARTDATE,CHARTTIME,STORETIME,CATEGORY,DESCRIPTION,CGID,ISERROR,TEXT".split(",")
WORDS = [a + b for a in ("card", "pulm", "ren", "hep", "neur") for b in ("itis", "osis", "algia", "emia", "ectomy")]
URL = "memory://verify/corpus"
Files = dict[str, bytes]
# What a fault does to the files, and the file it must be found in.
Fault = tuple[str, Callable[[Files], str]]


def source(notes: int = 700, patients: int = 70) -> bytes:
    draw = random.Random(3)
    rows = [HEADER]
    for row in range(1, notes + 1):
        text = "[**Known lastname 7**] " + "\n".join(
            " ".join(draw.choices(WORDS, k=draw.randint(2, 20))) for _ in "abc"
        )
        category = draw.choice(["Nursing", "ECG", "Discharge summary", ""])
        error = "1" if row % 40 == 3 else ""
        rows.append([str(row), str(row * 3 % patients), "", "2101-01-01", "", "", category, "", "", error, text])
    written = io.StringIO()
    csv.writer(written).writerows(rows)
    return written.getvalue().encode()


def make(name: str) -> str:
    """A corpus made by the job itself, in memory and in this process."""
    storage.write_bytes(f"memory://verify/{name}.csv", source())
    recipe = {
        "input": f"memory://verify/{name}.csv",
        "output": f"memory://verify/{name}",
        "reader": {"name": "mimic"},
        "splits": {"valid": 0.3, "test": 0.2},
        "tokenizer": {"vocab_size": 300},
        "block_mib": 0.03,
        "shard_mib": 0.03,
    }
    job.run(validate(job.ShardRecipe, recipe, "test"))
    return f"memory://verify/{name}"


@pytest.fixture(scope="module")
def whole() -> Iterator[Files]:
    """The files of a whole corpus."""
    url = make("corpus")
    files = {name: storage.read_bytes(storage.join(url, name)) for name in storage.names(url)}
    assert sum(name.startswith("train") for name in files) >= 6  # three shards and their sidecars
    assert verify(url) == []
    yield files
    storage.remove("memory://verify")


def put(files: Files) -> str:
    """The files as a directory in memory; returns its URL."""
    filesystem = fsspec.filesystem("memory")
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm("/verify/corpus", recursive=True)
    filesystem.pipe({f"/verify/corpus/{name}": content for name, content in files.items()})
    return URL


def canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def sidecar(name: str) -> str:
    return name.replace(".arrow", ".json")


def read(content: bytes) -> pa.RecordBatch:
    return pa.ipc.open_file(content).get_batch(0)


def with_column(batch: pa.RecordBatch, name: str, column: pa.Array, field: pa.Field | None = None) -> pa.RecordBatch:
    place = batch.schema.get_field_index(name)
    columns = [*batch.columns]
    columns[place] = column
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema.set(place, field or batch.schema.field(name)))


def with_tokens(batch: pa.RecordBatch, change: Callable[[list[list[int]]], None], kind: Any = None) -> pa.RecordBatch:
    """The batch with other tokens; `kind` is another type for them."""
    tokens = batch.column("tokens").to_pylist()
    change(tokens)
    kind = kind or batch.schema.field("tokens").type
    column = pa.array(tokens, pa.list_(kind.value_type)).cast(kind)
    return with_column(batch, "tokens", column, pa.field("tokens", kind, nullable=False))


def arrow(*batches: pa.RecordBatch, options: pa.ipc.IpcWriteOptions | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema, options=options) as file:
        for batch in batches:
            file.write_batch(batch)
    return bytes(sink.getvalue())


def put_shard(files: Files, name: str, content: bytes) -> None:
    """Puts other content under the name of a shard and mends all that tells of it but stats.json's words."""
    manifest = json.loads(files["manifest.json"])
    marks = manifest["tokenizer"]
    tokenizer = Tokenizer(files["tokenizer.model"], bos=marks["bos"], eos=marks["eos"])
    (entry,) = (one for split in manifest["splits"].values() for one in split["shards"] if one["name"] == name)
    entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    side = json.loads(files[sidecar(name)])
    with contextlib.suppress(pa.ArrowException, OSError, IndexError, TypeError, ValueError), np.errstate(all="ignore"):
        table = pa.ipc.open_file(content).read_all()
        values = table.column("tokens").combine_chunks().flatten()
        entry |= {"notes": len(table), "tokens": len(values), "bytes": pc.sum(table.column("n_bytes")).as_py() or 0}
        side["stats"] = stats.of_shard(table, tokenizer)
    files[name] = content
    files[sidecar(name)] = canonical(side | {"shard": entry})
    mend(files, manifest)


def mend(files: Files, manifest: dict[str, Any]) -> None:
    """Makes totals, fingerprint and seals hold again."""
    sides: dict[str, list[Any]] = {}
    for name, split in manifest["splits"].items():
        for key in ("notes", "tokens", "bytes"):
            split[key] = sum(entry[key] for entry in split["shards"])
        sides[name] = [json.loads(files[sidecar(entry["name"])])["stats"] for entry in split["shards"]]
        batches = []
        for entry in split["shards"]:
            with contextlib.suppress(pa.ArrowException, OSError, ValueError, KeyError):
                batches.append(read(files[entry["name"]]).column("patient_id").to_pylist())
        split["patients"] = len({patient for batch in batches for patient in batch})
    kept = sum(split["notes"] for split in manifest["splits"].values())
    manifest["rows_read"] = kept + sum(manifest["drops"].values())
    counted = json.loads(files["stats.json"])
    counted |= {key: stats.whole(sides, [], 0, {})[key] for key in ("categories", "lengths", "class_tokens")}
    counted["records"] = manifest["rows_read"]
    files["stats.json"] = sealed(counted)
    manifest["fingerprint"] = shards.content_fingerprint(manifest)
    files["manifest.json"] = sealed(manifest)


def resign(files: Files, name: str, content: bytes) -> None:
    """Puts other content under the name of a shard and mends size and sha256 only."""
    manifest = json.loads(files["manifest.json"])
    (entry,) = (one for split in manifest["splits"].values() for one in split["shards"] if one["name"] == name)
    entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files[name] = content
    manifest["fingerprint"] = shards.content_fingerprint(manifest)
    files["manifest.json"] = sealed(manifest)


def sealed(value: dict[str, Any]) -> bytes:
    return canonical(shards.sealed({key: one for key, one in value.items() if key != "checksum"}))


def flip(name: str, place: float, bit: int) -> Callable[[Files], str]:
    def fault(files: Files) -> str:
        content = bytearray(files[name])
        content[int(place * len(content))] ^= 1 << bit
        files[name] = bytes(content)
        return name

    return fault


def padding(name: str, nth: int) -> Callable[[Files], str]:
    """Flips a bit between the buffers of a shard, which nobody reads."""

    def fault(files: Files) -> str:
        content = bytearray(files[name])
        covered = np.zeros(len(content), bool)
        batch = pa.ipc.open_file(pa.py_buffer(files[name])).get_batch(0)
        start = pa.py_buffer(files[name]).address
        for buffer in (buffer for column in batch.columns for buffer in column.buffers() if buffer):
            covered[buffer.address - start : buffer.address - start + buffer.size] = True
        first = int(np.flatnonzero(covered)[0])
        free = first + np.flatnonzero(~covered[first : int(np.flatnonzero(covered)[-1])])
        content[free[nth % len(free)]] ^= 4
        files[name] = bytes(content)
        return name

    return fault


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Files], str]:
    def fault(files: Files) -> str:
        files[name] = change(files[name])
        return name

    return fault


def missing(name: str) -> Callable[[Files], str]:
    def fault(files: Files) -> str:
        del files[name]
        return name

    return fault


def swapped(first: str, second: str, sidecars: bool) -> Callable[[Files], str]:
    def fault(files: Files) -> str:
        names = [(first, second), (sidecar(first), sidecar(second))]
        for one, other in names[: 1 + sidecars]:
            files[one], files[other] = files[other], files[one]
        return first

    return fault


def extra(name: str, number: int) -> Callable[[Files], str]:
    def fault(files: Files) -> str:
        new = f"{name.partition('-')[0]}-{number:05d}.arrow"
        files[new], files[sidecar(new)] = files[name], files[sidecar(name)]
        return new

    return fault


def leftover(name: str) -> Callable[[Files], str]:
    def fault(files: Files) -> str:
        files[name] = b"left"
        return name.partition("/")[0]

    return fault


def other_tokenizer(seed: int) -> Callable[[Files], str]:
    def fault(files: Files) -> str:
        draw = random.Random(seed)
        counts = {word: draw.randint(1, 99) for word in WORDS}
        files["tokenizer.model"] = train(counts, TokenizerConfig(vocab_size=300), CLASS_TOKENS)
        return "tokenizer.model"

    return fault


def rewritten(name: str, change: Callable[[pa.RecordBatch], pa.RecordBatch | bytes]) -> Callable[[Files], str]:
    """Writes a shard anew, with manifest, sidecar, fingerprint and seals that agree: only looking into it helps."""

    def fault(files: Files) -> str:
        made = change(read(files[name]))
        put_shard(files, name, made if isinstance(made, bytes) else arrow(made))
        return name

    return fault


def token(note: int, place: int, value: int) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def change(tokens: list[list[int]]) -> None:
        tokens[note % len(tokens)][place] = value

    return lambda batch: with_tokens(batch, change)


def without_last(batch: pa.RecordBatch) -> pa.RecordBatch:
    return with_tokens(batch, lambda tokens: tokens[0].pop())


def null(name: str) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        values = [*batch.column(name).to_pylist()[:-1], None]
        return with_column(batch, name, pa.array(values, batch.schema.field(name).type))

    return change


def uint32(batch: pa.RecordBatch) -> pa.RecordBatch:
    return with_tokens(batch, lambda tokens: None, shard_schema(np.dtype(np.uint32)).field("tokens").type)


def same_patient(row: int, own: str) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    """Gives a note to a patient of another split."""

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        splitting = SplitConfig(valid=0.3, test=0.2)
        other = next(str(patient) for patient in range(70) if split_of(str(patient), splitting) != own)
        patients = batch.column("patient_id").to_pylist()
        patients[row % len(patients)] = other
        return with_column(batch, "patient_id", pa.array(patients, pa.string()))

    return change


def repeated_within(batch: pa.RecordBatch) -> pa.RecordBatch:
    docs = batch.column("doc_id").to_pylist()
    return with_column(batch, "doc_id", pa.array([docs[1], *docs[1:]], pa.string()))


def repeated_across(first: str, second: str, row: int) -> Callable[[Files], str]:
    def fault(files: Files) -> str:
        known = read(files[first]).column("doc_id").to_pylist()
        batch = read(files[second])
        docs = batch.column("doc_id").to_pylist()
        docs[row % len(docs)] = known[row % len(known)]
        put_shard(files, second, arrow(with_column(batch, "doc_id", pa.array(docs, pa.string()))))
        return second

    return fault


def edited(name: str, change: Callable[[dict[str, Any]], None], seal: bool = True) -> Callable[[Files], str]:
    """Changes a JSON file and seals it again."""

    def fault(files: Files) -> str:
        value = json.loads(files[name])
        change(value)
        files[name] = sealed(value) if seal else canonical(value)
        return name

    return fault


def counts_one_more(key: str, shard: int) -> Callable[[Files], str]:
    """Manifest and sidecar agree on a number that is not the shard's."""

    def fault(files: Files) -> str:
        manifest = json.loads(files["manifest.json"])
        entry = manifest["splits"]["train"]["shards"][shard]
        entry[key] += 1
        side = json.loads(files[sidecar(entry["name"])])
        files[sidecar(entry["name"])] = canonical(side | {"shard": entry})
        mend(files, manifest)
        return str(entry["name"])

    return fault


def other_totals(manifest: dict[str, Any]) -> None:
    manifest["splits"]["train"]["tokens"] += 1


def faults(whole: Files) -> list[Fault]:
    """Two hundred of them, from one seed."""
    draw = random.Random(20)
    arrows = sorted(name for name in whole if name.endswith(".arrow"))
    by_split = {split: [name for name in arrows if name.startswith(split)] for split in SPLITS}
    trains, valid = by_split["train"], by_split["valid"][0]
    every = sorted(whole)
    made: list[Fault] = []
    kinds = {
        "flip in a shard": (50, arrows),
        "flip in a sidecar": (21, [sidecar(name) for name in arrows]),
        "flip in the manifest": (15, ["manifest.json"]),
        "flip in the plan": (8, ["plan.json"]),
        "flip in the stats": (10, ["stats.json"]),
        "flip in the tokenizer": (8, ["tokenizer.model"]),
    }
    for kind, (number, names) in kinds.items():
        made += [(kind, flip(draw.choice(names), draw.random(), draw.randrange(8))) for _ in range(number)]
    made += [("flip in padding", padding(draw.choice(arrows), draw.randrange(1000))) for _ in range(6)]
    ends: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("cut", lambda content: content[: len(content) // 2]),
        ("one byte short", lambda content: content[:-1]),
        ("longer", lambda content: content + b"\0"),
        ("line end appended", lambda content: content + b"\n"),
        ("emptied", lambda content: b""),
        ("zeros", lambda content: bytes(len(content))),
    ]
    for kind, change in ends:
        made += [(kind, changed(name, change)) for name in ("manifest.json", "stats.json", draw.choice(every))]
    made += [("deep JSON", changed(name, lambda _: b"[" * 100_000)) for name in ("plan.json", sidecar(valid))]
    made += [("a list", changed(name, lambda _: b"[]\n")) for name in ("manifest.json", sidecar(valid))]
    made += [("swapped", swapped(*draw.sample(arrows, 2), sidecars=n > 1)) for n in range(4)]
    made += [("missing", missing(name)) for name in [*draw.sample(arrows, 2), sidecar(valid), *every[:1], "plan.json"]]
    made += [("missing", missing(name)) for name in ("manifest.json", "stats.json", "tokenizer.model")]
    made += [("extra shard", extra(draw.choice(arrows), number)) for number in (7, 99)]
    left = ("work/part-00000.words", "notes.txt", "train-00000.arrow.bak", "test-00050.json")
    made += [("leftover", leftover(name)) for name in left]
    made += [("another tokenizer", other_tokenizer(seed)) for seed in range(2)]
    contents: list[tuple[str, str, Callable[[pa.RecordBatch], pa.RecordBatch | bytes]]] = [
        ("uint32 tokens", trains[0], uint32),
        ("no BOS", trains[1], token(3, 0, 9)),
        ("no BOS", valid, token(0, 0, 2)),
        ("no EOS", trains[2], token(5, -1, 9)),
        ("no EOS", valid, without_last),
        ("token beyond the vocabulary", trains[0], token(2, 4, 300)),
        ("token beyond the vocabulary", valid, token(1, 3, 65535)),
        ("patient of another split", trains[1], same_patient(4, "train")),
        ("patient of another split", valid, same_patient(0, "valid")),
        ("doc_id twice in a shard", trains[2], repeated_within),
        ("null patient", trains[0], null("patient_id")),
        ("null doc_id", valid, null("doc_id")),
        ("null n_bytes", valid, null("n_bytes")),
        ("null tokens", trains[1], null("tokens")),
        ("no column", trains[1], lambda batch: arrow(batch.drop_columns(["time"]))),
        ("two batches", trains[2], lambda batch: arrow(batch.slice(0, 9), batch.slice(9))),
        ("compressed", trains[0], lambda batch: arrow(batch, options=pa.ipc.IpcWriteOptions(compression="zstd"))),
        ("metadata", trains[0], lambda batch: arrow(batch.replace_schema_metadata({"by": "hand"}))),
        ("no Arrow", trains[1], lambda batch: bytes(500)),
        ("no Arrow", valid, lambda batch: b"ARROW1\0\0" + bytes(range(256)) * 3 + b"\x10\0\0\0ARROW1"),
        ("broken footer", valid, lambda batch: broken(arrow(batch))),
    ]
    made += [(f"rewritten, {kind}", rewritten(name, change)) for kind, name, change in contents]
    made += [("doc_id in two shards", repeated_across(trains[0], name, 3)) for name in (trains[2], valid)]
    made += [("counts", counts_one_more(key, 1)) for key in ("notes", "tokens", "bytes")]
    edits: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
        ("manifest.json", other_totals),
        ("manifest.json", lambda value: value.update(format=1)),
        ("manifest.json", lambda value: value.update(rows_read=1)),
        ("manifest.json", lambda value: value.update(fingerprint="0" * 64)),
        ("manifest.json", lambda value: value["splits"]["train"].update(patients=1)),
        ("manifest.json", lambda value: value["splits"].pop("test")),
        ("manifest.json", lambda value: value["recipe"].pop("splits")),
        ("manifest.json", lambda value: value["tokenizer"].update(vocab_size="300")),
        ("plan.json", lambda value: value["recipe"].update(seed=2)),
        ("stats.json", lambda value: value["drops"].update(iserror=0)),
        ("stats.json", lambda value: value["categories"]["ECG"].update(tokens=0)),
        ("stats.json", lambda value: value.update(categories=7)),
        ("stats.json", lambda value: value["lengths"]["train"].update(unknown_tokens=-1)),
    ]
    made += [("edited", edited(name, change)) for name, change in edits]
    made += [("edited", edited(sidecar(valid), lambda value: value.update(note="x"), seal=False))]
    return made


def broken(content: bytes) -> bytes:
    """A shard whose footer is noise."""
    noise = random.Random(1).randbytes(200)
    return content[:-210] + noise + content[-10:]


def test_two_hundred_of_two_hundred_faults_are_found(whole: Files) -> None:
    made = faults(whole)
    assert len(made) == 200
    missed = []
    for number, (kind, fault) in enumerate(made):
        files = dict(whole)
        name = fault(files)
        assert files != whole, (number, kind)
        found = verify(put(files))
        if not any(line.startswith(f"{name}: ") for line in found):
            missed.append((number, kind, name, found))
        text = "\n".join(found)
        assert not any(word in text for word in WORDS), (number, kind)
    assert missed == []
    assert verify(put(whole)) == []


def test_bytes_that_are_no_arrow_file_raise_nothing(whole: Files) -> None:
    """Noise in a shard whose sha256 is right, so that Arrow itself has to read it."""
    draw = random.Random(8)
    name = "valid-00000.arrow"
    opened = 0
    for _ in range(120):
        content = bytearray(whole[name])
        # Mostly near the end, where the schema and the places of the buffers stand.
        start = draw.choice([0, len(content) - 2000])
        for place in draw.choices(range(start, start + 2000), k=draw.choice([1, 8, 200])):
            content[place] ^= 1 << draw.randrange(8)
        files = dict(whole)
        resign(files, name, bytes(content))
        opened += not any("not an Arrow file" in line for line in verify(put(files)))
    assert 0 < opened < 120


def test_no_fault_hides_another(whole: Files) -> None:
    files = dict(whole)
    named = {
        rewritten("train-00002.arrow", token(2, 4, 300))(files),
        flip("train-00000.arrow", 0.5, 1)(files),
        flip("valid-00000.json", 0.5, 1)(files),
        missing("train-00001.json")(files),
        flip("stats.json", 0.5, 1)(files),
        flip("tokenizer.model", 0.5, 1)(files),
        leftover("notes.txt")(files),
    }
    assert {line.partition(": ")[0] for line in verify(put(files))} == named
    # Without a manifest the sidecars tell what the shards should be.
    named = {*named, flip("manifest.json", 0.01, 1)(files)} - {"train-00002.arrow", "tokenizer.model"}
    assert {line.partition(": ")[0] for line in verify(put(files))} == named


def test_the_verb_prints_every_fault_and_exits_with_2(
    whole: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logs, "say", said.append)
    cli.run_verb("verify", [put(whole)])
    manifest = json.loads(whole["manifest.json"])
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    assert f"{URL}: whole; 6 shards, 682 notes, {tokens:,} tokens, 0.2 MB, " in said[-1]
    files = dict(whole)
    name, other = flip("train-00001.arrow", 0.3, 0)(files), missing("valid-00000.arrow")(files)
    said.clear()
    with pytest.raises(SystemExit) as ended:
        cli.run_verb("verify", [put(files)])
    assert ended.value.code == 2
    lines = [f"{name}: sha256 is not that of the manifest; make the shards again", f"{other}: missing; make"]
    assert [line for line in said if line.startswith(lines[0]) or line.startswith(lines[1])] == said[-2:]
    assert capsys.readouterr().err == f"chartlm: {URL}: 2 faults; the first: {lines[0]}\n"
    with pytest.raises(DataError, match=r"manifest\.json: missing"):
        main(["memory://nothing/here"])


def test_a_folder_of_this_machine(whole: Files, tmp_path: Path) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".lock").touch()
    (tmp_path / "stats.png").touch()
    assert verify(str(tmp_path)) == []
    (tmp_path / ".stats.png.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / os.fsdecode(b"\xff[red]")).touch()
    (tmp_path / "train-00000.arrow").unlink()
    (tmp_path / "train-00000.arrow").mkdir()
    found = verify(str(tmp_path))
    assert [line.partition(": ")[0] for line in found] == [
        "train-00000.arrow",
        ".stats.png.0123abcd.tmp",
        "\\xdcff[red]",
    ]


def other_names(manifest: dict[str, Any]) -> None:
    for shard in manifest["splits"]["train"]["shards"]:
        shard["name"] = f"train-{int(shard['name'][6:11]) + 1:05d}.arrow"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("manifest.json", lambda value: value.update(format=1), "is of another format, this chartlm reads"),
        ("manifest.json", lambda value: value.update(dtype="uint32"), "uint32 is not the type of this many tokens"),
        ("manifest.json", lambda value: value["splits"].pop("test"), "has not the splits train, valid, test"),
        ("manifest.json", other_names, "shard 0 of train has the name of another"),
        ("manifest.json", lambda value: value["tokenizer"].update(vocab_size=301), ""),
        ("manifest.json", lambda value: value["splits"]["train"].update(notes=1), "the notes of split train are not"),
        ("manifest.json", lambda value: value["drops"].update(iserror=1), "notes kept and dropped are not the"),
        ("manifest.json", lambda value: value["splits"]["valid"].update(patients=1), "split valid has"),
        ("manifest.json", lambda value: value["recipe"].update(splits={"valid": 2}), "says not how patients are split"),
        ("plan.json", lambda value: value.update(format=1), "its format or recipe is not the manifest's"),
        ("stats.json", lambda value: value.update(records=1), "its records are not the manifest's"),
        ("stats.json", lambda value: value["class_tokens"].update({"<age>": 9}), "its class_tokens are not those"),
        ("train-00000.json", lambda value: value.update(tokenizer="0" * 64), "names another tokenizer"),
        ("train-00000.json", lambda value: value["shard"].update(notes=1.0), "describes another shard"),
        ("train-00000.json", lambda value: value["stats"].update(unknown_tokens=-1), "its stats are not those of"),
    ],
)
def test_a_fault_says_what_is_wrong(
    whole: Files, name: str, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    files = dict(whole)
    edited(name, change, seal=not name.startswith("train"))(files)
    assert any(line.startswith((f"{name}: ", "tokenizer.model: ")) and said in line for line in verify(put(files)))


def test_sizes_and_foreign_tokenizers_are_named(whole: Files) -> None:
    files = dict(whole)
    files["train-00000.arrow"] += b"\0"
    (line,) = verify(put(files))
    size = len(files["train-00000.arrow"])
    assert f"train-00000.arrow: has {size:,} bytes, the manifest says {size - 1:,}" in line
    for model, said in [(b"no model", "is not a tokenizer of chartlm"), (whole["tokenizer.model"], "kind or size")]:
        files = dict(whole)
        manifest = json.loads(files["manifest.json"])
        manifest["tokenizer"] |= {"sha256": hashlib.sha256(model).hexdigest(), "kind": "bpe"}
        files |= {"tokenizer.model": model, "manifest.json": sealed(manifest)}
        assert any(line.startswith("tokenizer.model: ") and said in line for line in verify(put(files)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda batch: arrow(batch.slice(0, 9), batch.slice(9)), "has 2 record batches instead of one"),
        (lambda batch: arrow(batch.slice(0, 0)), "has no notes"),
        (null("time"), None),
        (null("n_bytes"), "has nulls in n_bytes"),
    ],
)
def test_what_is_wrong_in_a_shard_is_said(
    whole: Files, change: Callable[[pa.RecordBatch], pa.RecordBatch | bytes], said: str | None
) -> None:
    files = dict(whole)
    rewritten("valid-00000.arrow", change)(files)
    found = verify(put(files))
    assert found == [] if said is None else any(f"valid-00000.arrow: {said}" in line for line in found)
