"""find-lr with the real engine: a suggestion between too little and too much, and a run that is left untouched."""

import json
from pathlib import Path
from typing import Any

import pytest
from corpora import tiny_corpus
from ranks import run_on_ranks

from cluster.errors import TrainingError
from pretrain import find_lr


def search(run: str, corpus: str) -> None:
    words = ["steps=50", "data.lanes=4", "data.bptt=12", "model.embedding=12", "model.hidden=16", "model.layers=2"]
    find_lr.main([f"run_dir={run}", f"data.corpus={corpus}", *words])


def test_a_learning_rate_is_suggested_and_the_run_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_on_ranks(1, search, str(run), tiny_corpus(tmp_path / "corpus"))
    assert sorted(path.name for path in run.rglob("*") if path.is_file()) == ["find-lr.json", "find-lr.png"]
    found: dict[str, Any] = json.loads((run / "plots/find-lr.json").read_text())
    assert 1e-5 < found["middle of the valley"] < 1
    rates = [lr for lr, _ in found["curve"]]
    assert rates == sorted(rates)


def test_the_valley_is_the_middle_of_the_longest_fall() -> None:
    flat, falling, exploding = [9.0] * 10, [9.0 - 0.5 * step for step in range(10)], [50.0] * 10
    curve = [(10.0 ** (index - 30), loss) for index, loss in enumerate(flat + falling + exploding)]
    assert find_lr.valley(curve) in [lr for lr, _ in curve[13:16]]
    assert find_lr.tenth_of_lowest(curve) == pytest.approx(curve[19][0] / 10)
    with pytest.raises(TrainingError, match="does not fall"):
        find_lr.valley([(lr, 5.0) for lr, _ in curve])
