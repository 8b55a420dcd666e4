"""AWD-LSTM (Merity, Keskar, Socher 2017, arXiv:1708.02182): a stack of LSTMs with every dropout of the paper.

B lanes, T positions, E embedding width, H hidden width, V vocabulary.

    tokens_BT → embedding (row dropout) → input dropout → LSTM (weight drop) → hidden dropout → … → LSTM → output_BTE
    logits_BTV = output_BTE · embeddingᵀ + bias           (tied weights, §4.5)

The recurrent state goes in and comes out as the carry; nothing hides on the module. Weight drop is a masked copy of
`weight_hh` handed to the fused kernel within the forward of the module that owns the parameter: no renamed
parameters, no decay in place, and it works where ZeRO-3 partitions the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from cluster.config import Section
from pretrain.models.carry import Carry, Pieces, forgotten
from pretrain.models.dropout import Masks
from pretrain.models.lstm import FROM, Lstm
from pretrain.models.output import Hidden, Level, logits

PRESETS: dict[str, dict[str, int]] = {
    "awd-small": {"embedding": 128, "hidden": 256, "layers": 3},  # for a CPU
    "awd-classic": {"embedding": 400, "hidden": 1152, "layers": 3},  # the published size, as fastai rounds it
    # cuDNN's persistent kernel takes fp16 layers of up to 1024, multiples of 128.
    "awd-fast": {"embedding": 512, "hidden": 1024, "layers": 3},
}


class AwdLstmConfig(Section):
    """Sizes and dropouts; the defaults are fastai's for language models (drop_mult 1). Sizes that are given win over
    the preset's.
    """

    name: Literal["awd-lstm"] = "awd-lstm"
    preset: Literal["awd-small", "awd-classic", "awd-fast"] = "awd-small"
    embedding: int = Field(128, ge=1, description="width E of the embedding and of the last LSTM layer")
    hidden: int = Field(256, ge=1, description="width H of the other LSTM layers")
    layers: int = Field(3, ge=1)
    drop_embedding: float = Field(0.02, ge=0, lt=1, description="whole words (rows of the embedding)")
    drop_input: float = Field(0.25, ge=0, lt=1)
    drop_hidden: float = Field(0.15, ge=0, lt=1, description="between layers")
    drop_output: float = Field(0.1, ge=0, lt=1)
    drop_weight: float = Field(0.2, ge=0, lt=1, description="recurrent weights (DropConnect)")
    alpha: float = Field(2.0, ge=0, description="activation regularization, on the dropped output")
    beta: float = Field(1.0, ge=0, description="temporal activation regularization, on the undropped output")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        return PRESETS.get(str(values.get("preset")), {}) | values


class _Together(torch.autograd.Function):
    """The identity. The gradients of all inputs come at once, in this order, whatever pieces the text was cut into:
    ZeRO-2 sums gradients over workers in the order in which they come, which must be everywhere the same.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class LstmLayer(nn.Module):
    """One LSTM layer with weight drop. State `h`, `c` [B, H]."""

    def __init__(self, input_width: int, width: int):
        super().__init__()
        self.width = width
        bound = 1 / math.sqrt(width)
        self.weight_ih = nn.Parameter(torch.empty(4 * width, input_width).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(4 * width, width).uniform_(-bound, bound))
        self.bias_ih = nn.Parameter(torch.zeros(4 * width))
        self.bias_hh = nn.Parameter(torch.zeros(4 * width))

    def forward(
        self, input_BTD: Tensor, h_BH: Tensor, c_BH: Tensor, weight_mask: Tensor | None, pieces: Pieces | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(output [B, T, H], h [B, H], c [B, H]); `weight_mask` [4H, H] scales the recurrent weights (§2); between
        `pieces` the state begins anew.
        """
        weight_ih, weight_hh, bias_ih, bias_hh = _Together.apply(
            self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        )
        if weight_mask is not None:
            weight_hh = weight_hh * weight_mask.to(weight_hh.dtype)
        weights = [weight_ih, weight_hh, bias_ih, bias_hh]
        if pieces is not None:
            lanes, length, _ = input_BTD.shape
            keeps = pieces.keeps_P1.to(h_BH.dtype)
            state = ((h_BH[pieces.lane_P] * keeps).unsqueeze(0), (c_BH[pieces.lane_P] * keeps).unsqueeze(0))
            packed = input_BTD.flatten(0, 1)[pieces.into_N]
            output, h, c = torch.lstm(packed, pieces.batch_sizes, state, weights, True, 1, 0.0, self.training, False)
            return output[pieces.back_N].view(lanes, length, -1), h[0][pieces.last_B], c[0][pieces.last_B]
        wide = max(self.width, input_BTD.shape[-1]) >= FROM
        if wide and input_BTD.dtype == torch.bfloat16 and not input_BTD.is_cuda:
            output_BTH, h, c = Lstm.apply(input_BTD, h_BH, c_BH, weight_ih, weight_hh, bias_ih + bias_hh)
            return output_BTH, h, c
        state = (h_BH.unsqueeze(0), c_BH.unsqueeze(0))
        # biases, one layer, no dropout inside, training mode, one direction, batch first
        output_BTH, h, c = torch.lstm(input_BTD, state, weights, True, 1, 0.0, self.training, False, True)
        return output_BTH, h.squeeze(0), c.squeeze(0)


class AwdLstm(nn.Module):
    """The language model. Carry: `h0`, `c0`, `h1`, … each [lanes, width of the layer]."""

    Config = AwdLstmConfig
    BY_TOKEN = ("embedding.weight", "bias")

    def __init__(self, config: AwdLstmConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.width = config.embedding
        self.embedding = nn.Embedding(vocab_size, config.embedding)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        # Tied weights: the last layer is as wide as the embedding.
        widths = [config.embedding] + [config.hidden] * (config.layers - 1) + [config.embedding]
        layers = [LstmLayer(a, b) for a, b in pairwise(widths)]
        self.layers = cast(Sequence[LstmLayer], nn.ModuleList(layers))

    def initial_carry(self, lanes: int) -> Carry:
        """Zeros, of the device and type of the parameters."""
        zeros = {}
        for index, layer in enumerate(self.layers):
            for part in ("h", "c"):
                zeros[f"{part}{index}"] = self.bias.new_zeros(lanes, layer.width)
        return zeros

    def forward(
        self, tokens_BT: Tensor, carry: Carry, masks: Masks | None, starts_BT: Tensor | None = None
    ) -> tuple[Hidden, Carry]:
        """Hidden states of every position and the carry after the last one (detached: truncated backpropagation).

        Where `starts_BT` is True, what was read before is forgotten: the state is zeros there.
        """
        config = self.config
        pieces = None
        if starts_BT is not None:
            carry, pieces = forgotten(carry, starts_BT), Pieces.of(starts_BT)
        x_BTD = functional.embedding(tokens_BT, self.embedding.weight)
        if masks is not None:
            rows_V1 = masks.shared("embedding", config.drop_embedding, (self.vocab_size, 1))
            if rows_V1 is not None:
                x_BTD = _dropped(x_BTD, rows_V1[tokens_BT])
            x_BTD = _dropped(x_BTD, masks.per_lane("input", config.drop_input, config.embedding))
        after: Carry = {}
        for index, layer in enumerate(self.layers):
            weight_mask = None
            if masks is not None:
                shape, dtype = (4 * layer.width, layer.width), x_BTD.dtype
                weight_mask = masks.shared(f"weight{index}", config.drop_weight, shape, dtype)
                if index > 0:
                    x_BTD = _dropped(x_BTD, masks.per_lane(f"hidden{index}", config.drop_hidden, x_BTD.shape[-1]))
            x_BTD, h, c = layer(x_BTD, carry[f"h{index}"], carry[f"c{index}"], weight_mask, pieces)
            after[f"h{index}"], after[f"c{index}"] = h.detach(), c.detach()
        raw_BTE = x_BTD
        if masks is not None:
            x_BTD = _dropped(x_BTD, masks.per_lane("output", config.drop_output, self.width))
        return Hidden(x_BTD, raw_BTE), after

    def softmax(self) -> list[Level]:
        """What a loss head makes logits with; the weight is the embedding's."""
        return [Level(self.embedding.weight, self.bias)]

    def logits(self, output_BTE: Tensor) -> Tensor:
        """Scores of the next token [B, T, V]."""
        return logits(output_BTE, self.softmax())

    def penalty(self, hidden: Hidden) -> Tensor:
        """AR + TAR (§4.3): alpha·mean(output²) + beta·mean((h_t − h_{t−1})²); part of the objective, not of the nll."""
        exact = torch.promote_types(hidden.raw_BTE.dtype, torch.float32)
        penalty = self.config.alpha * hidden.output_BTE.to(exact).pow(2).mean()
        if hidden.raw_BTE.shape[1] > 1:
            penalty = penalty + self.config.beta * hidden.raw_BTE.to(exact).diff(dim=1).pow(2).mean()
        return penalty

    def flops(self, length: int) -> float:
        """Floating-point operations of a training step a token: a weight takes two forward and four backward; the tied
        embedding counts once, as softmax.
        """
        return 6.0 * sum(parameter.numel() for parameter in self.parameters())

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Parameters from the bottom (embedding, tied softmax) to the top layer, for discriminative learning rates."""
        return [
            [cast(nn.Parameter, self.embedding.weight), self.bias],
            *(list(layer.parameters()) for layer in self.layers),
        ]


def _dropped(x_BTD: Tensor, mask_B1D: Tensor | None) -> Tensor:
    return x_BTD if mask_B1D is None else x_BTD * mask_B1D.to(x_BTD.dtype)
