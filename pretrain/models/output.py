"""From tokens to vectors and back: what the top layer says, the softmax over it, and the embedding it is tied to.

N positions, D width of the model, V vocabulary, E width of an embedding.

A softmax is a list of levels. One level is the plain softmax. In an adaptive one (Grave et al. 2017, arXiv:1609.04309;
tied to the embedding: Baevski and Auli 2019, arXiv:1809.10853) the first holds the most frequent tokens and, in its
last rows, the further levels; each of these holds rarer tokens, in narrower embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Hidden(NamedTuple):
    """What the top layer says: after output dropout (for the softmax) and before it (for TAR, pooling)."""

    output_BTE: Tensor
    raw_BTE: Tensor


class Level(NamedTuple):
    """A softmax over some of the tokens."""

    weight_VE: Tensor
    bias_V: Tensor
    projection_DE: Tensor | None = None  # of the model's output to the width of the level

    def given(self, output_ND: Tensor) -> Tensor:
        """The output as this level reads it [N, E]."""
        return output_ND if self.projection_DE is None else output_ND @ self.projection_DE


def logits(output_ND: Tensor, levels: Sequence[Level]) -> Tensor:
    """Scores of all tokens [N, V]; of several levels they are log-probabilities."""
    first, *others = (functional.linear(level.given(output_ND), *level[:2]) for level in levels)
    if not others:
        return first
    exact = torch.promote_types(first.dtype, torch.float32)
    first = first.to(exact).log_softmax(-1)
    short = first.shape[-1] - len(others)
    inner = [scores.to(exact).log_softmax(-1) + first[..., [short + i]] for i, scores in enumerate(others)]
    return torch.cat([first[..., :short], *inner], -1)


class AdaptiveEmbedding(nn.Module):
    """Embeddings of width D // div_val^i for the tokens of level i, brought to D, times √D; and the softmax tied to
    them. Without cutoffs it is the plain embedding.
    """

    def __init__(self, vocab_size: int, width: int, cutoffs: Sequence[int], div_val: int):
        super().__init__()
        self.edges = (0, *(cutoff for cutoff in cutoffs if cutoff < vocab_size), vocab_size)
        self.width = width
        sizes = [b - a for a, b in pairwise(self.edges)]
        widths = [max(width // div_val**i, 1) for i in range(len(sizes))]
        self.weights = nn.ParameterList(torch.empty(size, wide) for size, wide in zip(sizes, widths, strict=True))
        self.projections = nn.ParameterList(torch.empty(width, wide) for wide in widths if div_val > 1)
        # As published, the first level's projection is not that of its embedding; all others are tied.
        self.first_projection = nn.Parameter(torch.empty(width, widths[0])) if div_val > 1 else None
        further = len(sizes) - 1
        self.levels_weight = nn.Parameter(torch.empty(further, widths[0])) if further else None
        self.bias = nn.ParameterList([torch.zeros(sizes[0] + further), *map(torch.zeros, sizes[1:])])

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Vectors [B, T, D]. Every token passes every level, so that shapes do not depend on the text."""
        x_BTD: Tensor | None = None
        for index, (first, end) in enumerate(pairwise(self.edges)):
            rows = tokens_BT if len(self.weights) == 1 else (tokens_BT - first).clamp(0, end - first - 1)
            own_BTD = functional.embedding(rows, self.weights[index])
            if len(self.projections):
                own_BTD = functional.linear(own_BTD, self.projections[index])
            x_BTD = own_BTD if x_BTD is None else torch.where((tokens_BT >= first)[..., None], own_BTD, x_BTD)
        assert x_BTD is not None
        return x_BTD * math.sqrt(self.width)

    def levels(self) -> list[Level]:
        """The softmax that is tied to the embedding."""
        weights = list(self.weights)
        if self.levels_weight is not None:
            weights[0] = torch.cat([weights[0], self.levels_weight])
        projections = [self.first_projection, *(list(self.projections) or [None] * len(weights))[1:]]
        return [Level(*level) for level in zip(weights, self.bias, projections, strict=True)]

    def by_token(self, prefix: str) -> tuple[str, ...]:
        """Names of the parameters whose axis 0 is the vocabulary: none where levels divide it."""
        return () if len(self.weights) > 1 else (f"{prefix}weights.0", f"{prefix}bias.0")
