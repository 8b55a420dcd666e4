"""Evaluation: every token of a split, with the carry kept over the stream.

Perplexity is per token and only comparable under one tokenizer; bits per byte of the cleaned text compares models of
any vocabulary. Sums are taken first and divided once, so the numbers do not depend on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field

from cluster import config, logs, storage
from cluster.errors import ConfigError
from pretrain.ensemble import Ensemble, of_one_kind
from pretrain.run import Trained, load_trained
from pretrain.scoring import Plain, Scorer
from pretrain.streams import IGNORED, StreamConfig, Streams
from sharding.shards import Corpus, Split


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split."""

    loss: float  # nats a token
    perplexity: float
    word_perplexity: float  # all nats over the words of the cleaned text; of a word-level tokenizer, its tokens
    bits_per_byte: float
    accuracy: float  # share of tokens that were the most likely one
    tokens: int
    loss_of_category: dict[str, float]  # nats a token by category of note


def evaluate(
    scorer: Scorer,
    split: Split,
    data: StreamConfig,
    mine: range | None = None,
    total: Callable[..., list[float]] | None = None,
    advance: logs.Advance | None = None,
    interrupted: Callable[[], bool] | None = None,
    *,
    begins_word_V: np.ndarray,
) -> Evaluation | None:
    """Scores of a model on every token of `split`, read in corpus order in the lanes and segments of `data`.

    With several workers each gives its lanes as `mine` and a sum over workers as `total`; the carry is this
    evaluation's own, so training is not touched. `begins_word_V` is the tokenizer's. None where `interrupted` (a
    collective, asked now and then) says so.
    """
    streams = streams_of(split, data)
    mine = range(data.lanes) if mine is None else mine
    names = [str(name) for name in split.column("category")]
    categories, code_of_note = np.unique(names, return_inverse=True)
    nll_C = torch.zeros(len(categories), dtype=torch.float64)
    hits_C, tokens_C = torch.zeros_like(nll_C), torch.zeros_like(nll_C)
    begins = torch.from_numpy(begins_word_V)
    words = torch.zeros(1, dtype=torch.float64)
    carry = scorer.initial_carry(len(mine))
    for step in range(streams.steps or 0):
        batch = streams.batch(step, mine)
        nll_N, hits_N, carry = scorer.score(batch, carry)
        targets_N = batch.targets_BT.flatten()
        wanted_N = targets_N != IGNORED
        words += begins[targets_N[wanted_N]].sum()
        assert batch.notes_BT is not None
        code_N = torch.from_numpy(code_of_note)[batch.notes_BT.flatten()[wanted_N]]
        nll_C.index_add_(0, code_N, nll_N.double().cpu()[wanted_N])
        hits_C.index_add_(0, code_N, hits_N.double().cpu()[wanted_N])
        tokens_C.index_add_(0, code_N, torch.ones(len(code_N), dtype=torch.float64))
        if advance is not None:
            advance(step + 1, "")
        if interrupted is not None and step % 16 == 15 and interrupted():
            return None
    sums = torch.cat([nll_C, hits_C, tokens_C, words])
    if total is not None:
        sums = torch.tensor(total(*sums), dtype=torch.float64)
    words, (nll_C, hits_C, tokens_C) = sums[-1:], sums[:-1].chunk(3)
    nll, tokens = nll_C.sum().item(), int(tokens_C.sum())
    return Evaluation(
        loss=nll / tokens,
        perplexity=math.exp(min(nll / tokens, 700.0)),
        word_perplexity=math.exp(min(nll / max(words.item(), 1.0), 700.0)),
        bits_per_byte=nll / math.log(2) / split.n_bytes,
        accuracy=hits_C.sum().item() / tokens,
        tokens=tokens,
        loss_of_category={
            str(name): (nll_C[code] / tokens_C[code]).item() for code, name in enumerate(categories) if tokens_C[code]
        },
    )


def streams_of(split: Split, data: StreamConfig) -> Streams:
    """One pass over a split in corpus order, as a model trained by `data` reads."""
    return Streams(
        split,
        data.lanes,
        data.bptt,
        0,
        shuffle=False,
        backward=data.backward,
        carry_across=data.carry_across,
        passes=1,
        with_notes=True,
    )


class EvaluateRecipe(config.Section):
    """`./launch.sh evaluate RUN [RUN…] [split=test] [bptt=64] [model.memory=640 model.same_length=true]`."""

    split: str = "valid"
    corpus: str | None = Field(None, description="shard directory; the one the run was trained on if not given")
    bptt: int | None = Field(None, ge=1, description="positions read at a time; as in training if not given")
    model: dict[str, Any] = Field({}, description="changes to the model that leave its weights as they are")


def evaluated(
    runs: Sequence[Trained], name: str, corpus_url: str | None, bptt: int | None = None
) -> tuple[Evaluation, Split]:
    """Scores of a run, or of several mixed, on the split `name` of a corpus (of the first run's own, if None), read
    `bptt` positions at a time, and the split. Raises ConfigError where they cannot be mixed or the corpus is of another
    tokenizer.
    """
    of_one_kind(runs)
    first = runs[0]
    data = config.validate(StreamConfig, first.recipe["data"], f"{first.run}/recipe.toml: data")
    data = data.model_copy(update={"bptt": bptt or data.bptt})
    if corpus_url is None and len(data.urls) > 1:
        raise ConfigError(f"{first.run}: was trained on several corpora; give corpus=, one of {', '.join(data.urls)}")
    corpus = Corpus.open(corpus_url or data.urls[0])
    if corpus.tokenizer.sha256 != first.tokenizer.sha256:
        raise ConfigError(
            f"{corpus.url}: was tokenized by another tokenizer than {first.run}; give the corpus of that run"
        )
    split = corpus.split(name)
    scorer = Plain(first.model) if len(runs) == 1 else Ensemble([run.model for run in runs])
    with logs.progress(f"evaluate {name}", streams_of(split, data).steps or 0) as advance:
        scores = evaluate(scorer, split, data, advance=advance, begins_word_V=corpus.tokenizer.begins_word)
    assert scores is not None
    return scores, split


def main(args: list[str]) -> None:
    """Verb `evaluate`: prints the scores of a run's newest checkpoint, or of several runs mixed in probability, and
    keeps them in `RUN/evaluation-SPLIT.json`, of several in `RUN/evaluation-SPLIT-ensemble.json` of the first. What was
    done otherwise than in training is in the file's name.
    """
    places = list(dict.fromkeys(word.rstrip("/") or word for word in args if "=" not in word))
    recipe = config.load(EvaluateRecipe, [word for word in args if "=" in word], None)
    if not places:
        raise ConfigError("evaluate needs a run directory: ./launch.sh evaluate RUN [RUN…]")
    runs = [load_trained(place, recipe.model) for place in places]
    scores, _ = evaluated(runs, recipe.split, recipe.corpus, recipe.bptt)
    many = len(runs) > 1
    steps: dict[str, Any] = {"runs": {run.run: run.step for run in runs}} if many else {"step": runs[0].step}
    otherwise = recipe.model | ({"bptt": recipe.bptt} if recipe.bptt else {})
    marks = [recipe.split, *(["ensemble"] if many else []), *(f"{key}={otherwise[key]}" for key in sorted(otherwise))]
    kept = f"evaluation-{'-'.join(marks)}.json"
    storage.write_json(storage.join(places[0], kept), steps | asdict(scores))
    rows = [
        ("perplexity (a token)", f"{scores.perplexity:.2f}"),
        ("perplexity (a word)", f"{scores.word_perplexity:.2f}"),
        ("bits per byte", f"{scores.bits_per_byte:.3f}"),
        ("next-token accuracy", f"{scores.accuracy:.1%}"),
        ("tokens", f"{scores.tokens:,}"),
        *((f"perplexity: {name}", f"{math.exp(loss):.2f}") for name, loss in scores.loss_of_category.items()),
    ]
    title = " + ".join(f"{run.run}, step {run.step:,}" for run in runs)
    logs.table(f"{title}, {recipe.split} patients", ("", "value"), rows)
