from pathlib import Path

import pytest

from cluster import config
from cluster.errors import ConfigError


class Tokenizer(config.Section):
    vocab_size: int = 8000
    kind: str = "unigram"


class Recipe(config.Section):
    input: str
    seed: int = 1
    share: float = 0.5
    tokenizer: Tokenizer = Tokenizer()


def load(*args: str) -> Recipe:
    return config.load(Recipe, args)


def test_file_then_overrides(tmp_path: Path) -> None:
    place = tmp_path / "r.toml"
    place.write_text('input = "a.csv"\n[tokenizer]\nvocab_size = 100\n')
    recipe = load(str(place), "tokenizer.vocab_size=200", "input=b=c.csv", "share=1")
    assert recipe == Recipe(input="b=c.csv", share=1.0, tokenizer=Tokenizer(vocab_size=200))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("tokenizer.vocab_sise=3", "no key 'tokenizer.vocab_sise'; the nearest is 'tokenizer.vocab_size'"),
        ("vocab_size=3", "no key 'vocab_size'; the nearest is 'tokenizer.vocab_size'"),
        ("sede=3", "no key 'sede'; the nearest is 'seed'"),
        ("qqqq=3", "the keys here are input, seed, share, tokenizer"),
        ("seed=many", "seed: Input should be a valid integer"),
    ],
)
def test_errors_name_path_and_nearest_key(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("input=a.csv", word)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key_and_word_too_many() -> None:
    with pytest.raises(ConfigError, match="key 'input' is needed"):
        load()
    with pytest.raises(ConfigError, match="one word too many"):
        load("a.toml", "b.toml")


def test_bad_toml_names_file_and_line(tmp_path: Path) -> None:
    place = tmp_path / "bad.toml"
    place.write_text("input = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML.*line 1"):
        load(str(place))


def test_frozen_and_round_trip() -> None:
    recipe = Recipe(input="a", seed=7)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 8  # type: ignore[misc]
    import tomllib

    assert config.validate(Recipe, tomllib.loads(config.to_toml(recipe).decode()), "x") == recipe


def test_fingerprint_does_not_depend_on_order_of_keys() -> None:
    assert config.fingerprint({"a": 1, "b": {"c": 2.5}}) == config.fingerprint({"b": {"c": 2.5}, "a": 1})
    assert config.fingerprint({"a": 1}) != config.fingerprint({"a": 2})


def test_differences_name_dotted_keys() -> None:
    assert config.differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ["a.b: 1 → 3"]
