"""The language models, by name. A new one is one file and one line here; the contract tests then run on it.

A model has `Config`, `width`, `initial_carry(lanes)`, `forward(tokens_BT, carry, masks, starts_BT) → (hidden, carry)`,
`softmax()` (its levels), `logits(output)`, `penalty(hidden)`, `layer_groups()`, `flops(length)` and `BY_TOKEN`, the
parameters whose axis 0 is the vocabulary.
Axis 0 of every tensor of a carry is the lane. Where `starts_BT` is True, all that was read before is forgotten.
"""

from typing import Any

import torch

from pretrain.models.awd_lstm import AwdLstm
from pretrain.models.carry import Carry
from pretrain.models.transformer_xl import TransformerXl

__all__ = ["MODELS", "Carry", "settle_numbers"]

MODELS: dict[str, Any] = {"awd-lstm": AwdLstm, "transformer-xl": TransformerXl}


def settle_numbers() -> None:
    """Takes numbers below the least normal one (1e-38 in single precision) for 0 in this thread and those it starts. In
    the layers of a trained Transformer-XL up to every eighth attention weight is one, and Intel's processors calculate
    with them so slowly that a step takes 1.6 times as long (docs/benchmarks.md). Who has a model calls it first.
    """
    torch.set_flush_denormal(True)
