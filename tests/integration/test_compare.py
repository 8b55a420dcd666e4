"""compare and evaluate of several runs, on trained runs of the real engine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from corpora import tiny_corpus
from ranks import run_on_ranks

from cluster import config
from cluster.errors import ConfigError
from pretrain import compare, evaluate, train
from pretrain.train import TrainRecipe


def trained(run: str, corpus: str, seed: int, steps: int) -> None:
    torch.set_num_threads(1)
    values = {
        "run_dir": run,
        "seed": seed,
        "steps": steps,
        "data": {"corpus": corpus, "lanes": 4, "bptt": 12},
        "model": {"embedding": 12, "hidden": 16, "layers": 2},
        "cluster": {"workers": 0},
        "tracking": {"wandb": "disabled"},
    }
    train.train(config.validate(TrainRecipe, values, "test"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two runs of one corpus, one of the same notes with other word pieces, and one of other notes."""
    folder = tmp_path_factory.mktemp("runs")
    corpora = {
        "same": tiny_corpus(folder / "same"),
        "other pieces": tiny_corpus(folder / "pieces", vocab_size=300),
        "other notes": tiny_corpus(folder / "notes", seed=9),
    }
    found = {}
    for name, corpus, seed, steps in [
        ("little", "same", 1, 2),
        ("more", "same", 2, 40),
        ("pieces", "other pieces", 1, 4),
        ("notes", "other notes", 1, 2),
    ]:
        found[name] = str(folder / f"run-{name}")
        run_on_ranks(1, trained, found[name], corpora[corpus], seed, steps)
    return found


def test_the_best_comes_first(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([runs["little"], runs["more"]])
    out = capsys.readouterr().out
    assert out.index("run-more") < out.index("run-little")
    assert "vocabularies differ" not in out


def test_other_vocabularies_are_compared_by_bytes_and_it_says_so(
    runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    compare.main([runs["more"], runs["pieces"]])
    assert "must not be compared" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="only scores on the same notes compare"):
        compare.main([runs["more"], runs["notes"]])
    with pytest.raises(ConfigError, match="two or more"):
        compare.main([runs["more"]])


def test_several_runs_are_evaluated_as_one(runs: dict[str, str], tmp_path: Path) -> None:
    first = shutil.copytree(runs["little"], tmp_path / "first")
    evaluate.main([str(first), runs["more"]])
    scores = json.loads((first / "evaluation-valid-ensemble.json").read_text())
    assert scores["runs"] == {str(first): 2, runs["more"]: 40}
    evaluate.main([str(first)])
    alone = json.loads((first / "evaluation-valid.json").read_text())
    assert scores["loss"] < alone["loss"]
    with pytest.raises(ConfigError, match="another vocabulary"):
        evaluate.main([str(first), runs["pieces"]])
    with pytest.raises(ConfigError, match="needs a run directory"):
        evaluate.main(["split=test"])
