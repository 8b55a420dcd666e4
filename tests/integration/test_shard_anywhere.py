"""The same bytes on any number of workers, in any process, from any storage, however often the job is killed."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import psutil
import pytest
from object_store import object_store

from cluster import ray_runtime, storage
from cluster.config import validate
from sharding import synthetic
from sharding.job import ShardRecipe, main, run
from sharding.verify import verify

# What Ray calls the processes that run our tasks.
TASKS = ("read_block", "scan_range", "near_duplicates", "count_words", "encode", "pack")
TITLES = {"ray::IDLE", *(f"ray::{task}" for task in TASKS)}

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "reader": {"name": "mimic"},
    "tokenizer": {"vocab_size": 1200},
    "splits": {"valid": 0.1, "test": 0.1},
    "dedup": "near",
    "block_mib": 0.05,
    "shard_mib": 0.05,
}
WORDS = [
    "reader.name=mimic",
    "tokenizer.vocab_size=1200",
    "splits.valid=0.1",
    "splits.test=0.1",
    "dedup=near",
    "block_mib=0.05",
    "shard_mib=0.05",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospital")
    synthetic.main([f"out={folder}", "patients=60"])
    plain = folder / "NOTEEVENTS.csv"
    plain.write_bytes(gzip.decompress((folder / "NOTEEVENTS.csv.gz").read_bytes()))
    return plain


def start(source: str, output: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli", "shard", f"input={source}", f"output={output}", *WORDS, *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def shard(source: str, output: str, *words: str, **environment: str) -> None:
    job = start(source, output, *words, **environment)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said


def content(url: str) -> dict[str, str]:
    """sha256 of every file of a corpus, but of the lock and of plan.json, which tells the input .csv from .csv.gz."""
    names = [name for name in storage.names(url) if name not in ("plan.json", ".lock")]
    return {name: hashlib.sha256(storage.read_bytes(storage.join(url, name))).hexdigest() for name in names}


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("made") / "shards"
    shard(str(source), str(output), "workers=2", PYTHONHASHSEED="1")
    assert verify(str(output)) == []
    found = content(str(output))
    assert len(found) > 15
    return found


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_and_hash_seeds_change_no_byte(
    workers: int, source: Path, made: dict[str, str], tmp_path: Path
) -> None:
    shard(str(source), str(tmp_path / "out"), f"workers={workers}", PYTHONHASHSEED=str(workers * 1000))
    assert content(str(tmp_path / "out")) == made


@pytest.mark.parametrize("packed", [False, True])
def test_memory_gives_the_same_bytes(packed: bool, source: Path, made: dict[str, str]) -> None:
    ray_runtime.stop()  # memory:// is of this process, and so are its tasks
    filesystem = fsspec.filesystem("memory")
    name = "/anywhere/NOTEEVENTS.csv" + (".gz" if packed else "")
    filesystem.pipe(name, gzip.compress(source.read_bytes()) if packed else source.read_bytes())
    values = {"input": f"memory:/{name}", "output": "memory://anywhere/shards"} | SETTINGS
    try:
        corpus = run(validate(ShardRecipe, values, "test"))
        assert content("memory://anywhere/shards") == made
        assert verify("memory://anywhere/shards") == []
        assert corpus.split("train").n_notes > 100
    finally:
        filesystem.rm("/anywhere", recursive=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """A real S3 server with an empty bucket `notes`; what a process must know to reach it."""
    with object_store("notes") as environment:
        yield environment


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_s3_gives_the_same_bytes(
    packed: bool, source: Path, made: dict[str, str], s3: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "gz" if packed else "plain"
    stored = f"s3://notes/{kind}/NOTEEVENTS.csv" + (".gz" if packed else "")
    storage.write_bytes(stored, gzip.compress(source.read_bytes()) if packed else source.read_bytes())
    output = f"s3://notes/{kind}/shards"
    shard(stored, output, "workers=2")
    assert content(output) == made
    assert verify(output) == []
    main([f"input={stored}", f"output={output}", *WORDS])
    assert "nothing left to do" in capsys.readouterr().out


def events(output: Path) -> int:
    """How much of the job can be seen in its directory."""
    with contextlib.suppress(FileNotFoundError):
        return sum(len(files) for _, _, files in os.walk(output))
    return 0


def kill_tree(pid: int) -> None:
    """SIGKILL to a driver; then, as on a machine that went down, to all that it started."""
    root = psutil.Process(pid)
    family = root.children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def a_worker(pid: int, draw: random.Random) -> psutil.Process | None:
    """A worker process of the job. Ray's own agents have such titles too, and take the machine's Ray with them."""
    busy = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.cmdline()[:1] and process.cmdline()[0].split("(")[0] in TITLES:
                busy.append(process)
    return draw.choice(busy) if busy else None


@pytest.mark.parametrize(
    ("drivers", "workers"), [(1, 2), pytest.param(12, 18, marks=pytest.mark.slow)], ids=["small", "30 kills"]
)
@pytest.mark.timeout(1200)
def test_killed_at_random_points_and_run_again_gives_the_same_bytes(
    drivers: int, workers: int, source: Path, made: dict[str, str], tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    whole = 4 * len(made)  # at least as many files as the directory ever holds; soon known better
    killed = {"driver": 0, "worker": 0}
    number = 0
    while killed["driver"] < drivers or killed["worker"] < workers:
        output = tmp_path / f"out-{number}"
        number += 1
        for _ in range(4):  # the same output again, until a run is left alone
            # Two files come before Ray does. A worker that dies while Ray starts makes Ray wait for it for good.
            started = events(output) + 3
            job = start(str(source), str(output), "workers=2", RAY_task_retry_delay_ms="0")
            at = draw.randrange(whole)
            driver = killed["driver"] < drivers and (drivers == 1 or draw.random() < 0.5)
            left = 0 if driver else min(2, workers - killed["worker"])
            most = 0
            while job.poll() is None:
                most = max(most, events(output))
                if (driver or left) and events(output) >= (at if driver else max(at, started)):
                    if driver:
                        kill_tree(job.pid)
                        killed["driver"] += 1
                        break
                    if worker := a_worker(job.pid, draw):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            worker.kill()
                            killed["worker"] += 1
                            left -= 1
                            at += draw.randrange(whole // 3)
                time.sleep(0.002)
            said, _ = job.communicate(timeout=300)
            if job.returncode == 0:
                whole = max(min(whole, most), 3)  # a point behind the end is a run for nothing
                break
            # Ray may give a task up after too many deaths; that is one line, and the same command goes on.
            given_up = job.returncode == 3 and "the same command goes on" in said and "Traceback" not in said
            assert job.returncode == -signal.SIGKILL or given_up, said
        else:
            shard(str(source), str(output), "workers=2")
        assert content(str(output)) == made
        manifest = json.loads((output / "manifest.json").read_text())
        kept = sum(split["notes"] for split in manifest["splits"].values())
        assert kept + sum(manifest["drops"].values()) == manifest["rows_read"]
        assert not (output / "work").exists()
        assert [path.name for path in output.glob(".*")] == [".lock"]
    print(f"killed {killed}, {number} corpora")
