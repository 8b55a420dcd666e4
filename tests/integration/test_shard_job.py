"""The whole job on a small hospital with real Ray: the same bytes, however it runs and is stopped."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from cluster import logs, ray_runtime, storage
from cluster.config import validate
from cluster.errors import ConfigError, DataError, StorageError
from sharding import job
from sharding.job import ShardRecipe, run
from sharding.schema import SPLITS
from sharding.shards import Corpus

HEADER = [
    "ROW_ID",
    "SUBJECT_ID",
    "HADM_ID",
    "CHARTDATE",
    "CHARTTIME",
    "STORETIME",
    "CATEGORY",
    "DESCRIPTION",
    "CGID",
    "ISERROR",
    "TEXT",
]
SECRET = "zebrafinch"


def notes(number: int = 400) -> list[list[str]]:
    """Notes of 40 patients: every tenth repeats an earlier one, some are wrong, some are empty."""
    draw = random.Random(5)
    words = [a + b for a in ("card", "pulm", "ren", "hep") for b in ("itis", "osis", "algia", "emia", "ectomy")]
    found: list[list[str]] = []
    for row in range(1, number + 1):
        text = "\n".join(" ".join(draw.choices(words, k=7)) + f", {draw.randint(1, 99)} mg" for _ in range(4))
        text = f'[**Known lastname {row}**] "{SECRET}"\r\n' + text
        if row % 10 == 0:
            text = found[draw.randrange(row - 1)][-1]
        if row % 50 == 7:
            text = " \n"
        error = "1" if row % 40 == 3 else ""
        found.append([str(row), str(row * 7 % 40), "", "2101-01-01", "", "", "Nursing ", "", "", error, text])
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([HEADER, *notes()])
    path = tmp_path_factory.mktemp("hospital") / "NOTEEVENTS.csv"
    path.write_bytes(text.getvalue().encode())
    return path


@pytest.fixture(scope="module", autouse=True)
def ray_stops() -> Iterator[None]:
    yield
    ray_runtime.stop()


def recipe(source: Path, output: Path, **changes: Any) -> ShardRecipe:
    values = {
        "input": str(source),
        "output": str(output),
        "reader": {"name": "mimic"},
        "splits": {"valid": 0.2, "test": 0.2},
        "tokenizer": {"vocab_size": 330},
        "block_mib": 0.015,
        "shard_mib": 0.015,
        "workers": 2,
    }
    return validate(ShardRecipe, values | changes, "test")


def content(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    return {name: storage.sha256(str(folder / name)) for name in storage.names(str(folder)) if name not in but}


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "shards"
    run(recipe(source, output))
    return output


def test_every_record_is_kept_or_counted_and_no_patient_is_in_two_splits(made: Path) -> None:
    corpus = Corpus.open(str(made))
    manifest = corpus.manifest
    assert manifest["rows_read"] == 400
    rows = notes()
    first = {row[-1]: row[0] for row in reversed(rows) if row[9] != "1" and row[-1].strip()}
    assert manifest["drops"] == {
        "iserror": sum(row[9] == "1" for row in rows),
        "empty": sum(row[9] != "1" and not row[-1].strip() for row in rows),
        "duplicate": sum(row[9] != "1" and bool(row[-1].strip()) for row in rows) - len(first),
    }
    kept: Counter[str] = Counter()
    owner: dict[str, str] = {}
    for name in ("train", "valid", "test"):
        split = corpus.split(name)
        kept.update(split.column("doc_id"))
        assert manifest["splits"][name]["patients"] == len(set(split.column("patient_id")))
        for patient in split.column("patient_id"):
            assert owner.setdefault(patient, name) == name
        sample = corpus.tokenizer.decode(split.tokens(0).tolist())
        original = next(row[-1] for row in rows if row[0] == split.column("doc_id")[0])
        assert sample == "<name>" + original.partition("**]")[2].replace("\r\n", "\n")
        assert set(split.column("category")) == {"Nursing"}
    assert kept == Counter(first.values())
    assert len(manifest["splits"]["train"]["shards"]) > 3


def test_nothing_but_the_corpus_stays_and_no_text_in_it(made: Path) -> None:
    names = storage.names(str(made))
    shards = {name.removesuffix(".arrow") for name in names if name.endswith(".arrow")}
    sidecars = {f"{name}.json" for name in shards}
    alone = {".lock", "tokenizer.model", "manifest.json", "plan.json", "stats.json"}
    assert set(names) == {f"{name}.arrow" for name in shards} | sidecars | alone
    assert [path.name for path in made.glob(".*")] == [".lock"]
    for name in names:
        if name != "tokenizer.model":
            assert SECRET.encode() not in (made / name).read_bytes()


@pytest.mark.parametrize("kind", ["one worker", "gz", "gz, other name"])
def test_workers_compression_and_names_change_no_byte(kind: str, source: Path, made: Path, tmp_path: Path) -> None:
    if kind != "one worker":
        packed = tmp_path / ("NOTEEVENTS.csv.gz" if kind == "gz" else "other.csv.gz")
        packed.write_bytes(gzip.compress(source.read_bytes()))
        source = packed
    corpus = run(recipe(source, tmp_path / "again", workers=1))
    assert corpus.fingerprint == Corpus.open(str(made)).fingerprint
    but = ("plan.json",) if kind != "one worker" else ()  # the plan names the sha256 of the file as it is stored
    assert content(tmp_path / "again", but) == content(made, but)


def test_a_rerun_has_nothing_left_to_do(
    source: Path, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_runtime, "map_tasks", None)
    said: list[str] = []
    monkeypatch.setattr(logs, "say", said.append)
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    run(recipe(source, made, workers=1, block_mib=0.015, shard_mib=0.015))
    assert "nothing left to do" in said[-1]
    assert before == {path: path.stat().st_mtime_ns for path in made.iterdir()}


class Killed(BaseException):
    """Stands for SIGKILL: no handler runs that a killed process would not run."""


@pytest.mark.parametrize(
    ("step", "after"),
    [("read_block", 0), ("read_block", 3), ("count_words", 1), ("encode", 0), ("encode", 4), ("pack", 0), ("pack", 2)],
)
def test_killed_in_any_step_and_run_again_gives_the_same_bytes(
    step: str, after: int, source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "shards"
    map_tasks = ray_runtime.map_tasks
    ran: Counter[str] = Counter()

    def dying(task: Any, items: Any, **options: Any) -> Iterator[Any]:
        for number, result in enumerate(map_tasks(task, items, **options)):
            ran[task.__name__] += 1
            if task.__name__ == step and number == after:
                raise Killed
            yield result

    monkeypatch.setattr(ray_runtime, "map_tasks", dying)
    with pytest.raises(Killed):
        run(recipe(source, output))
    with pytest.raises(DataError, match="not a finished shard directory"):
        Corpus.open(str(output))
    # Half files under temporary names, as an interrupted write leaves them, and a step whose JSON never came.
    (output / ".train-00000.arrow.0123abcd.tmp").write_bytes(b"half")
    (output / "work" / ".part-00000.arrow.0123abcd.tmp").write_bytes(b"half")
    (output / "work" / "part-00001.read.json").unlink(missing_ok=True)
    finished_before = len(list((output / "work").glob("part-*.read.json")))
    monkeypatch.setattr(ray_runtime, "map_tasks", map_tasks)
    redone: Counter[str] = Counter()

    def counting(task: Any, items: Any, **options: Any) -> Iterator[Any]:
        for result in map_tasks(task, items, **options):
            redone[task.__name__] += 1
            yield result

    monkeypatch.setattr(ray_runtime, "map_tasks", counting)
    run(recipe(source, output))
    assert content(output) == content(made)
    assert [path.name for path in output.glob(".*")] == [".lock"]
    blocks = len(list(recipe(source, output).reader.blocks(str(source), int(0.015 * (1 << 20)))))
    # Fewer are redone where tasks in flight at the kill came to their end.
    assert redone["read_block"] <= blocks - finished_before
    if step == "encode":
        assert redone["count_words"] == 0
        assert redone["encode"] <= blocks - after
    if step == "pack":
        assert redone["encode"] == 0
        assert 0 < redone["pack"] <= len(list(made.glob("*-*.arrow"))) - after


def test_a_lost_shard_is_made_again(source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "shards"
    shutil.copytree(made, output)
    (output / "manifest.json").unlink()
    (output / "train-00001.arrow").unlink()
    (output / "train-00002.arrow").write_bytes(b"short")
    run(recipe(source, output))
    assert content(output) == content(made)
    (output / "train-00002.arrow").write_bytes(b"short")
    with monkeypatch.context() as patch:
        patch.setattr(job._Job, "make", Mock(side_effect=Killed))
        with pytest.raises(Killed):
            run(recipe(source, output))
    assert not (output / "manifest.json").exists()
    run(recipe(source, output))
    assert content(output) == content(made)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clean": {"case": "lower"}}, "recipe.clean.case: 'keep' → 'lower'"),
        ({"tokenizer": {"vocab_size": 331}}, "recipe.tokenizer.vocab_size: 330 → 331"),
        ({"dedup": "off"}, "recipe.dedup: 'exact' → 'off'"),
        ({"block_mib": 0.03}, "recipe.block_mib: 0.015 → 0.03"),
    ],
)
def test_another_recipe_is_refused_and_harms_nothing(
    source: Path, made: Path, changes: dict[str, Any], said: str
) -> None:
    before = content(made)
    with pytest.raises(ConfigError) as caught:
        run(recipe(source, made, **changes))
    assert said in str(caught.value)
    assert "choose another output=" in str(caught.value)
    assert content(made) == before


def test_other_input_and_foreign_folders_are_refused(source: Path, made: Path, tmp_path: Path) -> None:
    other = tmp_path / "NOTEEVENTS.csv"
    other.write_bytes(source.read_bytes() + b'999,1,,2101-01-01,,,ECG,,,,"late"\r\n')
    with pytest.raises(ConfigError, match=r"input\.digest"):
        run(recipe(other, made))
    foreign = tmp_path / "home"
    (foreign / "work").mkdir(parents=True)
    (foreign / "work" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex but no plan"):
        run(recipe(source, foreign))
    assert (foreign / "work" / "thesis.tex").exists()


def test_bad_input_is_one_line_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def csv_of(rows: list[list[str]], header: list[str] = HEADER) -> Path:
        text = io.StringIO()
        csv.writer(text).writerows([header, *rows])
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        path.write_bytes(text.getvalue().encode())
        return path

    output = tmp_path / "shards"
    rows = notes(60)
    doubled = [*rows, rows[0]]
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (tmp_path / "none.csv", {}, StorageError, "no such file"),
        (csv_of([]), {}, DataError, r"no notes left of 0 records \(the file has none\)"),
        (csv_of([row[:-1] for row in rows], HEADER[:-1]), {}, DataError, "no column TEXT"),
        (
            csv_of([[*row[:9], "1", "x"] for row in rows]),
            {},
            DataError,
            r"no notes left of 60 records \(60 iserror",
        ),
        (
            csv_of([row for row in rows if row[1] == "7"]),
            {},
            DataError,
            "split '(train|valid)' came out empty",
        ),
        (csv_of(doubled), {}, DataError, "doc_id 1 stands twice"),
        (csv_of([*rows, ["secret", "x"]]), {}, DataError, "has 2 fields, the header has 11"),
        (source, {"tokenizer": {"vocab_size": 30_000}}, ConfigError, "the largest possible is"),
    ]
    for path, changes, kind, said in cases:
        with pytest.raises(kind, match=said):
            run(recipe(path, output, **changes))
        assert storage.names(str(output)) in ([], [".lock"])


def test_the_tokenizer_of_another_corpus(source: Path, made: Path, tmp_path: Path) -> None:
    corpus = run(recipe(source, tmp_path / "second", tokenizer=None, tokenizer_from=str(made), dedup="off"))
    donor = Corpus.open(str(made))
    assert corpus.tokenizer.sha256 == donor.tokenizer.sha256
    assert corpus.fingerprint != donor.fingerprint
    assert "duplicate" not in {reason for reason, count in corpus.manifest["drops"].items() if count}
    with pytest.raises(ConfigError, match="either a"):
        recipe(source, tmp_path / "third", tokenizer=None)


def test_patients_in_time_order(source: Path, made: Path, tmp_path: Path) -> None:
    timed = tmp_path / "NOTEEVENTS.csv"
    rows = notes()
    for number, row in enumerate(rows):
        row[3] = f"21{number * 37 % 90 + 10}-01-01"
        row[4] = f"{row[3]} {number % 24:02d}:00:00" if number % 3 else ""
    text = io.StringIO()
    csv.writer(text).writerows([HEADER, *rows])
    timed.write_bytes(text.getvalue().encode())
    corpus = run(
        recipe(timed, tmp_path / "patients", order="patients", dedup="off", tokenizer_from=str(made), tokenizer=None)
    )
    split = corpus.split("train")
    assert len(split.values) > 2
    patients, times = split.column("patient_id"), split.column("time")
    runs = [patient for patient, _ in itertools.groupby(patients)]
    assert len(runs) == len(set(runs))  # a patient's notes stand together
    assert runs != sorted(runs, key=int)  # and patients are shuffled
    for one, other in itertools.pairwise(zip(patients, times, strict=True)):
        assert one[0] != other[0] or one[1] <= other[1]
    for patient in set(patients):
        assert len({int(split.shard_of_note[i]) for i, owner in enumerate(patients) if owner == patient}) == 1
    again = run(
        recipe(
            timed, tmp_path / "seed", order="patients", dedup="off", seed=2, tokenizer_from=str(made), tokenizer=None
        )
    )
    assert again.split("train").column("patient_id") != patients
    assert sorted(again.split("train").column("doc_id")) == sorted(split.column("doc_id"))


def test_notes_are_shuffled_and_stay_in_that_order_when_the_corpus_grows(
    source: Path, made: Path, tmp_path: Path
) -> None:
    names = Corpus.open(str(made)).split("train").column("doc_id")
    assert names != sorted(names, key=int)
    shorter = tmp_path / "NOTEEVENTS.csv"
    text = io.StringIO()
    csv.writer(text).writerows([HEADER, *notes()[:300]])
    shorter.write_bytes(text.getvalue().encode())
    fewer = run(recipe(shorter, tmp_path / "fewer", tokenizer_from=str(made), tokenizer=None))
    kept = set(fewer.split("train").column("doc_id"))
    assert fewer.split("train").column("doc_id") == [name for name in names if name in kept]
    # And no patient moved to another split.
    whole = Corpus.open(str(made))
    for name in SPLITS:
        assert set(fewer.split(name).column("patient_id")) <= set(whole.split(name).column("patient_id"))


def test_copied_forward_notes_are_dropped_within_a_patient_and_counted(made: Path, tmp_path: Path) -> None:
    draw = random.Random(8)
    rows = []
    for number in range(120):
        words = [f"w{draw.randrange(5000)}" for _ in range(150)]
        patient = str(number % 30)
        copied = [*words[:140], *(f"new{draw.randrange(5000)}" for _ in range(10))]
        for owner, said in ((patient, words), (patient, copied), (str(30 + number % 30), copied)):
            rows.append([str(len(rows)), owner, "", "2101-01-01", "", "", "Nursing", "", "", "", " ".join(said)])
    source = tmp_path / "NOTEEVENTS.csv"
    text = io.StringIO()
    csv.writer(text).writerows([HEADER, *rows])
    source.write_bytes(text.getvalue().encode())
    options = {"tokenizer_from": str(made), "tokenizer": None, "block_mib": 0.05, "shard_mib": 0.05}
    found = run(recipe(source, tmp_path / "near", dedup="near", **options)).manifest
    # Equal notes go first, wherever they are; then the copy of the patient's own note.
    assert found["drops"] == {"duplicate": 120, "empty": 0, "iserror": 0, "near_duplicate": 120}
    apart = run(recipe(source, tmp_path / "strict", dedup="near", near_similarity=0.97, **options)).manifest
    assert apart["drops"] == {"duplicate": 120, "empty": 0, "iserror": 0, "near_duplicate": 0}
    with pytest.raises(ConfigError, match=r"dedup='near' looks at the notes of a patient; name .* reader\.patient_id"):
        recipe(source, tmp_path / "x", dedup="near", reader={"name": "csv", "text": "TEXT"})


def test_order_by_time_needs_times(source: Path, tmp_path: Path) -> None:
    (tmp_path / "NOTEEVENTS.csv").write_bytes(source.read_bytes().replace(b"2101-01-01", b"1/1/2101"))
    with pytest.raises(DataError, match=r"needs a time for every note, written YYYY-MM-DD…; 342 notes have none"):
        run(recipe(tmp_path / "NOTEEVENTS.csv", tmp_path / "out", order="patients"))


@pytest.mark.parametrize(
    ("kind", "size", "case", "said"),
    [
        ("word", 60, "flag", "xxmaj"),
        ("char", 320, "lower", "carditis"),
        ("bpe", 330, "flag", "xxup hepitis"),
        ("unigram", 330, "keep", "HEPITIS"),
    ],
)
def test_kinds_of_tokenizers_and_cases(
    kind: str, size: int, case: str, said: str, source: Path, tmp_path: Path
) -> None:
    capitals = tmp_path / "NOTEEVENTS.csv"
    capitals.write_bytes(source.read_bytes().replace(b"card", b"Card").replace(b"hepitis", b"HEPITIS"))
    shas = set()
    for sample, workers in ((1, 1), (1, 2), (0.3, 2), (0.3, 1)):
        output = tmp_path / f"{sample}-{workers}"
        chosen = {"kind": kind, "vocab_size": size, "sample": sample}
        corpus = run(recipe(capitals, output, tokenizer=chosen, clean={"case": case}, workers=workers))
        assert content(output) == content(tmp_path / f"{sample}-1") if workers == 2 and sample == 1 else True
        shas.add((sample, corpus.tokenizer.sha256))
        split = corpus.split("train")
        decoded = [corpus.tokenizer.decode(split.tokens(note).tolist()) for note in range(20)]
        assert any(said in text for text in decoded)
        assert corpus.tokenizer.kind == kind
    assert len(shas) == len(dict(shas)) == 2  # one tokenizer per sample, whatever the workers
    assert len({sha for _, sha in shas}) == 2


def test_many_files_are_one_input(source: Path, made: Path, tmp_path: Path) -> None:
    rows = notes()
    for number, start in enumerate(range(0, 400, 150)):
        text = io.StringIO()
        csv.writer(text).writerows([HEADER, *rows[start : start + 150]])
        data = text.getvalue().encode()
        path = tmp_path / "archive" / f"part{number}.csv"
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".csv.gz").write_bytes(gzip.compress(data)) if number == 1 else path.write_bytes(data)
    (tmp_path / "archive" / "_SUCCESS").write_text("")
    corpus = run(recipe(tmp_path / "archive", tmp_path / "out"))
    assert corpus.fingerprint == Corpus.open(str(made)).fingerprint
    named = run(
        recipe(Path(f"{tmp_path}/archive/part[12].csv*"), tmp_path / "named", tokenizer_from=str(made), tokenizer=None)
    )
    assert named.manifest["rows_read"] == 250
    with pytest.raises(StorageError, match=r"none\*\.csv: no such file"):
        run(recipe(tmp_path / "none*.csv", tmp_path / "none"))


def test_notes_without_names_are_numbered_over_all_files(tmp_path: Path, made: Path) -> None:
    for number in range(3):
        lines = "".join(f"cardoitis note {number} {line}\n" for line in range(100))
        (tmp_path / f"{number}.csv").write_text("text\n" + lines)
    options = {"reader": {"name": "csv", "text": "text"}, "tokenizer_from": str(made), "tokenizer": None}
    corpus = run(recipe(tmp_path / "*.csv", tmp_path / "out", block_mib=0.001, shard_mib=0.001, **options))
    names = [name for split in SPLITS for name in corpus.split(split).column("doc_id")]
    assert sorted(names, key=int) == [str(number) for number in range(1, 301)]
    split = corpus.split("train")
    for note in range(0, split.n_notes, 17):
        row = int(split.column("doc_id")[note]) - 1
        assert corpus.tokenizer.decode(split.tokens(note).tolist()) == f"cardoitis note {row // 100} {row % 100}"


def test_two_jobs_do_not_share_an_output(source: Path, tmp_path: Path) -> None:
    with storage.held(str(tmp_path / "out"), "busy"):
        with pytest.raises(ConfigError, match="another process is writing shards there"):
            run(recipe(source, tmp_path / "out"))


def test_plan_and_manifest_hold_no_paths(made: Path) -> None:
    for name in ("plan.json", "manifest.json"):
        assert str(made.parent) not in (made / name).read_text()
    manifest = json.loads((made / "manifest.json").read_text())
    assert {"input", "output", "workers"}.isdisjoint(manifest["recipe"])
    assert manifest["version"] == job._version()
