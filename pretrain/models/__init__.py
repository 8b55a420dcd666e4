"""The language models, by name. A new one is one file and one line here; the contract tests then run on it.

A model has `Config`, `width`, `initial_carry(lanes)`, `forward(tokens_BT, carry, masks) → (hidden, carry)`,
`logits(output)`, `penalty(hidden)` and `layer_groups()`. Axis 0 of every tensor of a carry is the lane.
"""

from pretrain.models.awd_lstm import AwdLstm

MODELS = {"awd-lstm": AwdLstm}
