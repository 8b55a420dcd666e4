"""The recipes that are shipped load, and say what the job would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load
from sharding.job import ShardRecipe

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*/shard.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_recipe_loads_and_takes_overrides(path: Path) -> None:
    recipe = load(ShardRecipe, [str(path), "block_mib=1.5", "input=elsewhere.csv"])
    assert recipe.output == f"runs/{path.parent.name}/shards"
    assert (recipe.block_mib, recipe.input) == (1.5, "elsewhere.csv")


def test_the_recipes_of_the_readme_are_there() -> None:
    assert {"demo", "mimic3", "mtsamples", "wiki-then-mimic"} <= {path.parent.name for path in RECIPES}
