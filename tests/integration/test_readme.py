"""The README's commands, run as written, at tiny scale: what a newcomer types must work."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# What makes a command of the README small. Everything else of it stays as written.
SMALL = {
    "pretrain": ["epochs=0.05", "eval_every=1000", "model.embedding=32", "model.hidden=48"],
    "generate": ["tokens=20"],
    "finetune": ["seeds=[1]", "stages.epochs_head=2", "stages.epochs_all=0", "bootstrap_draws=50"],
}


def commands(heading: str) -> list[list[str]]:
    """The ./launch.sh lines of the first `sh` block under a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.S)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].strip().splitlines()]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder that looks like a checkout, with the data beside it, so that runs/ does not land in ours."""
    data = os.environ.get("CHARTLM_DATA")
    if data is None:
        pytest.skip("CHARTLM_DATA names no folder with mtsamples")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data").symlink_to(data)
    desk = tmp_path / "checkout"
    desk.mkdir()
    for name in ("launch.sh", "recipes"):
        (desk / name).symlink_to(ROOT / name)
    return desk


def test_the_recipes_of_own_notes_can_be_read(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every run of the tests, where the whole story (below) is too long; the demo runs all of these verbs."""
    from cluster import config
    from downstream.finetune import FinetuneRecipe
    from pretrain.train import TrainRecipe
    from sharding.job import ShardRecipe

    monkeypatch.chdir(desk)
    recipes = {"shard": ShardRecipe, "pretrain": TrainRecipe, "finetune": FinetuneRecipe}
    read = [config.load(recipes[line[1]], line[2:]) for line in commands("Your own notes") if line[1] in recipes]
    assert len(read) == 3


@pytest.mark.slow
def test_own_notes(desk: Path) -> None:
    """The mtsamples story, on the whole real file; only the model and its training are small."""
    lines = commands("Your own notes")
    assert [line[1] for line in lines] == ["shard", "pretrain", "evaluate", "generate", "finetune"]
    for line in lines:
        done = subprocess.run([*line, *SMALL.get(line[1], [])], cwd=desk, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(line)}\n{done.stdout}{done.stderr}"
    run = desk / "runs/mtsamples"
    scores = json.loads((run / "evaluation-valid.json").read_text())
    untrained = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert scores["perplexity"] < untrained["valid_perplexity"] / 2
    assert (run / "plots/loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "samples").iterdir())
    assert json.loads((run / "finetune/classify/results.json").read_text())["macro_f1"] > 0


def test_every_verb_stands_in_the_readme() -> None:
    from cluster.cli import VERBS

    told = README.split("\n## Verbs\n")[1].split("\n## ")[0]
    assert [verb for verb in VERBS if verb not in told] == []


def test_every_source_file_stands_in_the_map() -> None:
    told = README.split("\n## Where things are\n")[1]
    names = {
        path.name
        for folder in ("cluster", "sharding", "pretrain", "downstream")
        for path in (ROOT / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    assert [name for name in sorted(names) if name not in told] == []
