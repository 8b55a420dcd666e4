"""Every training recipe that is shipped loads, and its shards are those of a sharding recipe that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load
from pretrain.train import TrainRecipe
from sharding.job import ShardRecipe

RECIPES = Path(__file__).parents[3] / "recipes"
TRAINING = sorted(
    path for path in RECIPES.glob("*/*.toml") if "[model]" in path.read_text() and "[optim]" in path.read_text()
)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_loads_and_its_shards_are_made_by_another(path: Path) -> None:
    recipe = load(TrainRecipe, [str(path)])
    made = {load(ShardRecipe, [str(shard)]).output for shard in RECIPES.glob("*/shard.toml")}
    assert set(recipe.data.urls) <= made
    others = [other for other in TRAINING if other != path]
    assert recipe.run_dir not in {load(TrainRecipe, [str(other)]).run_dir for other in others}


def test_the_experiments_of_the_field_are_there() -> None:
    named = {f"{path.parent.name}/{path.stem}" for path in TRAINING}
    assert {"mimic3-word/awd_lstm", "mimic3-word-lower/awd_lstm", "mimic3-unigram-lower/awd_lstm"} <= named
    assert {"mimic3/awd_lstm", "mimic3/awd_lstm_backward", "wiki-then-mimic/awd_lstm", "wiki-then-mimic/mimic"} <= named
