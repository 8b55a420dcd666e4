"""Runs side by side, also of different vocabularies: by bits per byte of the same text."""

from __future__ import annotations

from pydantic import Field

from cluster import config, logs
from cluster.errors import ConfigError
from pretrain.evaluate import Evaluation, evaluated
from pretrain.run import Trained, load_trained


class CompareRecipe(config.Section):
    """`./launch.sh compare RUN RUN… [split=valid]`."""

    split: str = Field("valid", description="of the corpus that each run was trained on")


def main(args: list[str]) -> None:
    """Verb `compare`: evaluates every run on its own shards of the same notes, best first."""
    runs = list(dict.fromkeys(word.rstrip("/") or word for word in args if "=" not in word))
    recipe = config.load(CompareRecipe, [word for word in args if "=" in word], None)
    if len(runs) < 2:
        raise ConfigError("compare needs two or more run directories: ./launch.sh compare RUN RUN…")
    found: list[tuple[Trained, Evaluation]] = []
    text: tuple[str, int] | None = None
    for run in runs:
        trained = load_trained(run)
        scores, split = evaluated([trained], recipe.split, None)
        if text is None:
            text = run, split.n_bytes
        elif split.n_bytes != text[1]:
            raise ConfigError(
                f"{run}: its {recipe.split} notes have {split.n_bytes:,} bytes, those of {text[0]} {text[1]:,}; only "
                "scores on the same notes compare: shard both with the same input, clean, dedup and splits"
            )
        found.append((trained, scores))
    one_vocabulary = len({trained.tokenizer.sha256 for trained, _ in found}) == 1
    one_cut = len({trained.tokenizer.kind == "word" for trained, _ in found}) == 1
    names = {run: run.rpartition("/")[2] for run in runs}
    short = len(set(names.values())) == len(runs)
    rows = []
    for trained, scores in sorted(found, key=lambda pair: pair[1].bits_per_byte):
        rows.append(
            (
                names[trained.run] if short else trained.run,
                f"{scores.bits_per_byte:.4f}",
                _perplexity(scores.word_perplexity, one_cut),
                _perplexity(scores.perplexity, one_vocabulary),
                f"{trained.tokenizer.vocab_size:,}",
                f"{sum(parameter.numel() for parameter in trained.model.parameters()) / 1e6:.2f}M",
                f"{trained.step:,}",
            )
        )
    headings = ("run", "bits/byte", "ppl/word", "ppl/token", "vocab", "size", "steps")
    logs.table(f"{recipe.split} patients, best first", headings, rows)
    if not one_vocabulary:
        logs.say(
            "The vocabularies differ: what stands in brackets must not be compared, bits a byte can be. (The words of "
            "a word-level model are its tokens: words, numbers and signs.)"
        )


def _perplexity(value: float, comparable: bool) -> str:
    text = f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"
    return text if comparable else f"({text})"
