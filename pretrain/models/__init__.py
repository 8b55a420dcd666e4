"""The language models, by name. A new one is one file and one line here; the contract tests then run on it.

A model has `Config`, `width`, `initial_carry(lanes)`, `forward(tokens_BT, carry, masks, starts_BT) → (hidden, carry)`,
`softmax()` (its levels), `logits(output)`, `penalty(hidden)`, `layer_groups()`, `flops(length)` and `BY_TOKEN`, the
parameters whose axis 0 is the vocabulary.
Axis 0 of every tensor of a carry is the lane. Where `starts_BT` is True, all that was read before is forgotten.
"""

from typing import Any

from pretrain.models.awd_lstm import AwdLstm
from pretrain.models.carry import Carry
from pretrain.models.transformer_xl import TransformerXl

__all__ = ["MODELS", "Carry"]

MODELS: dict[str, Any] = {"awd-lstm": AwdLstm, "transformer-xl": TransformerXl}
