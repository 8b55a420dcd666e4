"""What a user can get wrong: one line that says what, where and what to do; exit code ≠ 0; no traceback, and nothing
left behind that a later run would take for whole."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corpora import tiny_corpus

from cluster import cli, ray_runtime

ROOT = Path(__file__).resolve().parents[2]
HEADER = "note_id,transcription,medical_specialty\n"


Way = Callable[..., str]


def one_line(code: object, out: str, err: str) -> str:
    assert code in (2, 3), out + err
    assert "Traceback" not in out + err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("chartlm: ")
    return lines[0]


def launch(desk: Path, *words: str) -> str:
    """Runs a verb that must fail; returns its one line."""
    done = subprocess.run([ROOT / "launch.sh", *words], cwd=desk, capture_output=True, text=True, timeout=300)
    return one_line(done.returncode, done.stdout, done.stderr)


@pytest.fixture(params=["here", pytest.param("launched", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Way:
    """How a verb that must fail is run: in this process without Ray, which takes a tenth of the time, or as by a user.

    What needs a disk that is full, or an error out of a Ray task, is launched in every run of the tests.
    """

    def here(desk: Path, *words: str) -> str:
        capsys.readouterr()
        monkeypatch.chdir(desk)
        with pytest.raises(SystemExit) as caught:
            cli.run_verb(words[0], list(words[1:]))
        return one_line(caught.value.code, *capsys.readouterr())

    if request.param == "here":
        ray_runtime.stop()
        monkeypatch.setattr(ray_runtime, "start", lambda workers=0: None)
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    return here if request.param == "here" else launch


def shard(way: Way, desk: Path, text: str, *changes: str) -> str:
    (desk / "notes.csv").write_text(text)
    recipe = str(ROOT / "recipes/mtsamples/shard.toml")
    said = way(desk, "shard", recipe, "input=notes.csv", "output=shards", *changes)
    assert not (desk / "shards/manifest.json").exists()
    return said


def pretrain(way: Way, desk: Path, corpus: str, *changes: str) -> str:
    recipe = str(ROOT / "recipes/demo/awd_lstm.toml")
    return way(desk, "pretrain", recipe, f"data.corpus={corpus}", "run_dir=run", "cluster.workers=0", *changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


def test_missing_file(way: Way, tmp_path: Path) -> None:
    said = way(tmp_path, "shard", str(ROOT / "recipes/mtsamples/shard.toml"), "input=nowhere.csv", "output=shards")
    assert "nowhere.csv: no such file" in said
    assert not (tmp_path / "shards/manifest.json").exists()


def test_missing_column(way: Way, tmp_path: Path) -> None:
    said = shard(way, tmp_path, "note_id,text,medical_specialty\n1,a note,Surgery\n")
    assert "transcription" in said
    assert "notes.csv" in said


def test_header_only(way: Way, tmp_path: Path) -> None:
    assert "notes.csv" in shard(way, tmp_path, HEADER)


def test_every_note_empty(way: Way, tmp_path: Path) -> None:
    assert "empty" in shard(way, tmp_path, HEADER + "1,,Surgery\n2,  ,Surgery\n")


def test_tokenizer_larger_than_the_data_allows(way: Way, tmp_path: Path) -> None:
    rows = "".join(f"{number},note {number} of a few words,Surgery\n" for number in range(300))
    said = shard(way, tmp_path, HEADER + rows, "tokenizer.vocab_size=30000", "splits.valid=0.2", "splits.test=0.2")
    assert "tokenizer.vocab_size=30000 is more than the training notes allow; the largest possible is" in said


def test_a_quote_that_is_never_closed(tmp_path: Path) -> None:
    said = shard(launch, tmp_path, HEADER + '1,"a note that never ends,Surgery\n2,another,Surgery\n')
    assert "byte" in said
    assert "never ends" not in said  # no note text


def test_unknown_key(way: Way, tmp_path: Path, corpus: str) -> None:
    assert "no key 'optim.learning_rate'" in pretrain(way, tmp_path, corpus, "optim.learning_rate=1")
    assert "no key 'model.hiden'; the nearest is 'model.hidden'" in pretrain(way, tmp_path, corpus, "model.hiden=3")
    assert not (tmp_path / "run").exists()


def test_no_shards(way: Way, tmp_path: Path) -> None:
    assert "is not a finished shard directory; run ./launch.sh shard" in pretrain(
        way, tmp_path, str(tmp_path / "shards")
    )


def test_run_directory_of_another_recipe(way: Way, tmp_path: Path, corpus: str) -> None:
    small = ["epochs=0.01", "model.hidden=16", "model.embedding=8", "tracking.wandb=disabled"]
    recipe = str(ROOT / "recipes/demo/awd_lstm.toml")
    words = ["pretrain", recipe, f"data.corpus={corpus}", "run_dir=run", "cluster.workers=0", *small]
    subprocess.run([ROOT / "launch.sh", *words], cwd=tmp_path, check=True, capture_output=True)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    said = pretrain(way, tmp_path, corpus, *small, "model.hidden=24")
    assert "run: belongs to another run (recipe.model.hidden: 16 → 24); choose another run_dir=" in said
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_lanes_that_workers_cannot_share(way: Way, tmp_path: Path, corpus: str) -> None:
    assert "data.lanes=16 are too few for 17 workers" in pretrain(way, tmp_path, corpus, "cluster.workers=17")
    assert 'give a number of workers, or "4..16"' in pretrain(way, tmp_path, corpus, "workers=4..2")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 300 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_no_space_for_the_hospital(small_disk: Path, tmp_path: Path) -> None:
    said = launch(tmp_path, "hospital", f"out={small_disk}/hospital", "patients=200")
    assert "no space left while writing; free some space and run the same command again" in said
    assert list((small_disk / "hospital").iterdir()) == []


def test_no_space_for_shards(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(
        [ROOT / "launch.sh", "hospital", "out=hospital", "patients=80"], cwd=tmp_path, check=True, capture_output=True
    )
    recipe, small = str(ROOT / "recipes/demo/shard.toml"), "tokenizer.vocab_size=1000"
    said = launch(tmp_path, "shard", recipe, "input=hospital/NOTEEVENTS.csv.gz", f"output={small_disk}/shards", small)
    assert "no space left while writing" in said
    assert not (small_disk / "shards/manifest.json").exists()


def test_no_space_for_a_checkpoint(small_disk: Path, tmp_path: Path, corpus: str) -> None:
    said = pretrain(launch, tmp_path, corpus, f"run_dir={small_disk}/run", "epochs=0.1", "tracking.wandb=disabled")
    assert "no space left while writing" in said
    assert list((small_disk / "run/checkpoints").glob("*/manifest.json")) == []
