"""`./launch.sh demo`: smaller than a newcomer's in every run of the tests, at its full size by `test slow`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wandb_files

from cluster import tracking

ROOT = Path(__file__).resolve().parents[2]


# What makes the demo small; each line stands in one of its recipes.
SMALL = {
    "hospital.toml": {"patients = 400": "patients = 80"},
    "shard.toml": {"vocab_size = 2000": "vocab_size = 1000"},
    "awd_lstm.toml": {
        "eval_every = 400": "eval_every = 100",
        "save_every = 100": "save_every = 30",
        "embedding = 128": "embedding = 48",
        "hidden = 256": "hidden = 96",
    },
    "finetune.toml": {"seeds = [1, 2, 3]": "seeds = [1]", "epochs_head = 15": "epochs_head = 3"},
}


@pytest.fixture(scope="module", params=["small", pytest.param("full", marks=pytest.mark.slow)])
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, size: str) -> Path:
    desk = tmp_path_factory.mktemp("demo")
    if size == "small":
        shutil.copytree(ROOT / "recipes/demo", desk / "recipes/demo")  # found before the one of the checkout
        for name, changes in SMALL.items():
            recipe = (desk / "recipes/demo" / name).read_text()
            for old, new in changes.items():
                assert recipe.count(old) == 1, old
                recipe = recipe.replace(old, new)
            (desk / "recipes/demo" / name).write_text(recipe)
    done = subprocess.run([ROOT / "launch.sh", "demo"], cwd=desk, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (desk / "said.txt").write_text(done.stdout)
    return desk


def test_summary(desk: Path, size: str) -> None:
    summary = json.loads((desk / "runs/demo/summary.json").read_text())
    if size == "full":
        assert summary["perplexity"] < summary["untrained_perplexity"] / 50
        assert 0 < summary["bits_per_byte"] < 1
        assert summary["accuracy"] > 0.5
        assert summary["readmission_auroc_low"] > 0.5
        assert 0.5 < summary["baseline_auroc"] < 1
    assert summary["perplexity"] < summary["untrained_perplexity"] / 5
    assert summary["readmission_auroc_low"] < summary["readmission_auroc"] < summary["readmission_auroc_high"]
    last = tracking.read(str(desk / "runs/demo"))[-1]["step"]
    assert 0 < summary["resumed_from_step"] <= summary["interrupted_at_step"] < last
    assert 0 < summary["peak_memory_bytes"] <= 4 << 30
    assert summary["seconds"] > 0


def test_the_curve_has_no_gap_and_no_repeat(desk: Path) -> None:
    lines = tracking.read(str(desk / "runs/demo"))
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [*range(10, steps[-1], 10), steps[-1]]
    tokens = [line["tokens"] for line in lines if "loss" in line]
    assert tokens == sorted(set(tokens))
    assert sum(line.get("event") == "resumed" for line in lines) == 1


def test_the_kill_has_lost_nothing(desk: Path, tmp_path: Path) -> None:
    """Every loss, and weights and optimizer at the end, to the last bit as by torchrun, without Ray and undisturbed."""
    killed, whole = desk / "runs/demo", tmp_path / "whole"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "pretrain.train", str(killed / "recipe.toml"), f"run_dir={whole}", "tracking.wandb=disabled"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=desk, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found, wanted = (
        [
            (line["step"], line.get("loss"), line.get("valid_loss"))
            for line in tracking.read(str(run))
            if "event" not in line
        ]
        for run in (killed, whole)
    )
    assert found == wanted
    last = f"checkpoints/step-{found[-1][0]:08d}"
    tensors = [sorted((run / last).glob("*.safetensors")) for run in (killed, whole)]
    assert len(tensors[0]) == 2
    assert [path.read_bytes() for path in tensors[0]] == [path.read_bytes() for path in tensors[1]]


def test_story_and_files(desk: Path) -> None:
    said = (desk / "said.txt").read_text()
    for number, stage in enumerate(["hospital", "shard", "pretrain", "evaluate", "finetune", "look"], 1):
        assert f"{number}/6 {stage}" in said
    assert "SIGKILL" in said
    assert "nothing left to do" in said
    run = desk / "runs/demo"
    for name in ("hospital/NOTEEVENTS.csv.gz", "shards/manifest.json", "metrics.jsonl", "plots/loss.png"):
        assert (run / name).stat().st_size > 0
    segments = wandb_files.segments(run)
    assert len(segments) == 2  # before and after the kill
    assert len({segment.name for segment in segments}) == 1  # under one id
    logged = {line["step"]: line["loss"] for line in tracking.read(str(run)) if "loss" in line}
    assert wandb_files.curve(run, "loss") == logged
    assert list((run / "samples").iterdir())


@pytest.mark.slow  # in every run: each verb's own test
@pytest.mark.parametrize("size", ["full"], indirect=True, scope="module")
def test_run_again_finds_nothing_to_do(desk: Path) -> None:
    before = json.loads((desk / "runs/demo/summary.json").read_text())
    metrics = (desk / "runs/demo/metrics.jsonl").read_bytes()
    done = subprocess.run([ROOT / "launch.sh", "demo"], cwd=desk, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = json.loads((desk / "runs/demo/summary.json").read_text())
    for changing in ("seconds", "peak_memory_bytes"):
        del before[changing], after[changing]
    assert after == before
    assert (desk / "runs/demo/metrics.jsonl").read_bytes() == metrics
