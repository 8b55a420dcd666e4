"""Evaluation: every token of a split, with the carry kept over the stream.

Perplexity is per token and only comparable under one tokenizer; bits per byte of the cleaned text compares models of
any vocabulary. Sums are taken first and divided once, so the numbers do not depend on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from cluster import config, logs, storage
from cluster.errors import ConfigError
from pretrain.run import load_trained
from pretrain.streams import IGNORED, Streams
from sharding.shards import Corpus, Split


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split."""

    loss: float  # nats a token
    perplexity: float
    bits_per_byte: float
    accuracy: float  # share of tokens that were the most likely one
    tokens: int


def evaluate(
    model: nn.Module,
    split: Split,
    lanes: int,
    bptt: int,
    mine: range | None = None,
    total: Callable[..., list[float]] | None = None,
    advance: logs.Advance | None = None,
) -> Evaluation:
    """Scores of `model` on every token of `split`, read in corpus order in `lanes` lanes.

    With several workers each gives its lanes as `mine` and a sum over workers as `total`; the carry is this
    evaluation's own, so training is not touched.
    """
    streams = Streams(split, lanes, bptt, seed=0, shuffle=False)
    mine = range(lanes) if mine is None else mine
    device = next(model.parameters()).device
    nll = torch.zeros((), dtype=torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        carry = model.initial_carry(len(mine))  # type: ignore[operator]
        for step in range(streams.steps_per_epoch):
            batch = streams.batch(step, mine)
            targets_N = batch.targets_BT.flatten().to(device)
            hidden, carry = model(batch.tokens_BT.to(device), carry, None)
            logits_NV = model.logits(hidden.output_BTE).float().flatten(0, 1)  # type: ignore[operator]
            losses_N = functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")
            nll += losses_N.double().sum()
            hits += (logits_NV.argmax(1) == targets_N).sum()
            if advance is not None:
                advance(step + 1, "")
    model.train(was_training)
    nll_sum, hit_sum = total(nll, hits) if total is not None else (nll.item(), hits.item())
    tokens = split.n_tokens - 1
    return Evaluation(
        loss=nll_sum / tokens,
        perplexity=math.exp(min(nll_sum / tokens, 700.0)),
        bits_per_byte=nll_sum / math.log(2) / split.n_bytes,
        accuracy=hit_sum / tokens,
        tokens=tokens,
    )


class EvaluateRecipe(config.Section):
    """`./launch.sh evaluate RUN [split=test]`."""

    run: str = Field(description="run directory")
    split: str = "valid"
    corpus: str | None = Field(None, description="shard directory; the one the run was trained on if not given")


def main(args: list[str]) -> None:
    """Verb `evaluate`: prints the scores of a run's newest checkpoint and keeps them in `RUN/evaluation-SPLIT.json`."""
    recipe = config.load(EvaluateRecipe, args, positional="run")
    trained = load_trained(recipe.run)
    data = trained.recipe["data"]
    corpus = Corpus.open(recipe.corpus or data["corpus"])
    if corpus.tokenizer.sha256 != trained.tokenizer.sha256:
        raise ConfigError(
            f"{corpus.url}: was tokenized by another tokenizer than {recipe.run}; give the corpus of that run"
        )
    split = corpus.split(recipe.split)
    steps = Streams(split, data["lanes"], data["bptt"], seed=0, shuffle=False).steps_per_epoch
    with logs.progress(f"evaluate {recipe.split}", steps) as advance:
        scores = evaluate(trained.model, split, data["lanes"], data["bptt"], advance=advance)
    storage.write_json(
        storage.join(recipe.run, f"evaluation-{recipe.split}.json"), {"step": trained.step, **asdict(scores)}
    )
    rows = [
        ("perplexity (a token)", f"{scores.perplexity:.2f}"),
        ("bits per byte", f"{scores.bits_per_byte:.3f}"),
        ("next-token accuracy", f"{scores.accuracy:.1%}"),
        ("tokens", f"{scores.tokens:,}"),
    ]
    logs.table(f"{recipe.run}, step {trained.step:,}, {recipe.split} patients", ("", "value"), rows)
