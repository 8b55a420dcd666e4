"""Transformer-XL (Dai, Yang et al. 2019, arXiv:1901.02860): layers of attention that see a memory of what was read.

B lanes, T positions, M of the memory, K = M + T, D width, H heads, E width of a head, V vocabulary.

    tokens_BT → √D·embedding → layer (attention over memory and segment, feed-forward) → … → output_BTD
    logits_BTV = output_BTD · embeddingᵀ + bias           (tied weights)

The memory of a layer is what it read in earlier segments, without gradient. It has M places from the first segment on,
so that shapes never change, and says which of them are live: none at the beginning, nor those before a start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cluster.config import Section
from pretrain.models import attention
from pretrain.models.carry import Carry, forgotten
from pretrain.models.dropout import Masks, dropped, keep_out_of_graphs, relu_dropped
from pretrain.models.output import AdaptiveEmbedding, Hidden, Level, logits

# As published: WikiText-103's sizes, the norm after the residual, and little initial weights.
_PUBLISHED = {"norm": "post", "init_std": 0.02}
PRESETS: dict[str, dict[str, Any]] = {
    "xl-small": {},  # for a CPU: what the keys are where nothing is given
    "xl-base": _PUBLISHED | {"width": 410, "layers": 16, "heads": 10, "head_width": 41, "inner": 2100, "memory": 150},
    # the same as NVIDIA trains it: widths that fit tensor cores (192 million parameters with 267,735 words)
    "xl-base-192m": _PUBLISHED
    | {"width": 512, "layers": 16, "heads": 8, "head_width": 64, "inner": 2048, "memory": 192},
    "xl-large": _PUBLISHED
    | {"width": 1024, "layers": 18, "heads": 16, "head_width": 64, "inner": 4096, "memory": 384}
    | {"drop": 0.2, "drop_attention": 0.2, "init_std": 0.005},
}


class TransformerXlConfig(Section):
    """Sizes, positions and dropouts. Sizes that are given win over the preset's."""

    name: Literal["transformer-xl"] = "transformer-xl"
    preset: Literal["xl-small", "xl-base", "xl-base-192m", "xl-large"] = "xl-small"
    width: int = Field(128, ge=1, description="D, of the embedding and between layers")
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    head_width: int = Field(32, ge=1)
    inner: int = Field(512, ge=1, description="width of the feed-forward layers")
    memory: int = Field(64, ge=0, description="positions before the segment that it sees")
    position: Literal["relative", "rotary"] = Field("relative", description="as published, or for flash attention")
    clamp: int | None = Field(None, ge=0, description="greater distances count as this one")
    same_length: bool = Field(False, description="every position sees as many: itself and memory - 1 before it")
    share_biases: bool = Field(True, description="one u and v for all layers, as published, or one a layer")
    norm: Literal["pre", "post"] = Field("pre", description="before attention and feed-forward, or after (published)")
    drop: float = Field(0.1, ge=0, lt=1)
    drop_attention: float = Field(0.0, ge=0, lt=1, description="attention weights; needs memory for all of them")
    init_std: float = Field(0.08, gt=0, description="of the first weights")
    cutoffs: list[int] = Field([], description="adaptive softmax: first token of every cluster but the first")
    div_val: int = Field(1, ge=1, description="by how much embeddings narrow from cluster to cluster")
    checkpoint_activations: bool = Field(False, description="compute layers again in the backward, to save memory")
    compile: bool = Field(False, description="compile layers with torch.compile; needs a C++ compiler")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        return PRESETS.get(str(values.get("preset")), {}) | values

    @model_validator(mode="after")
    def _fits(self) -> TransformerXlConfig:
        if self.position == "rotary" and (self.head_width % 2 or self.clamp is not None):
            raise ValueError("position='rotary' needs an even head_width and has no clamp")
        if self.width % 2:
            raise ValueError("width must be even, half of a position's embedding are sines")
        if self.same_length and not self.memory:
            raise ValueError("same_length says how much of the memory is seen; memory is 0")
        if self.cutoffs != sorted(set(self.cutoffs)) or min(self.cutoffs, default=1) < 1:
            raise ValueError("cutoffs must be positive and rise")
        return self


class XlLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a norm. No biases in the projections, as published."""

    def __init__(self, config: TransformerXlConfig):
        super().__init__()
        self.config = config
        width, inner, wide = config.width, config.inner, config.heads * config.head_width
        relative = config.position == "relative"
        self.query = nn.Parameter(torch.empty(wide, width))
        self.key_value = nn.Parameter(torch.empty(2 * wide, width))
        self.distance = nn.Parameter(torch.empty(wide, width)) if relative else None
        self.out = nn.Parameter(torch.empty(width, wide))
        self.norm_attention = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, inner)
        self.feed_out = nn.Linear(inner, width)
        self.norm_feed = nn.LayerNorm(width)
        own = relative and not config.share_biases
        self.content_bias = nn.Parameter(torch.empty(config.heads, config.head_width)) if own else None
        self.position_bias = nn.Parameter(torch.empty(config.heads, config.head_width)) if own else None

    def forward(
        self,
        x_BTD: Tensor,
        memory_BMD: Tensor,
        distances_KD: Tensor | None,
        biases: tuple[Tensor, Tensor] | None,
        bias_BTK: Tensor | None,
        drops: tuple[Tensor, int, int] | None,
    ) -> Tensor:
        """The layer's output [B, T, D]. `biases` are u and v [H, E], `bias_BTK` is added to scores (None: each sees all
        before it), `drops` the keys of its dropouts [4, B] and their thresholds.
        """
        config = self.config
        pre = config.norm == "pre"
        heads = (config.heads, config.head_width)
        before_BKD = torch.cat([memory_BMD, x_BTD], 1) if memory_BMD.shape[1] else x_BTD
        if pre:
            before_BKD = self.norm_attention(before_BKD)
        queries_BTHE = functional.linear(before_BKD[:, -x_BTD.shape[1] :], self.query).unflatten(-1, heads)
        keys_values = functional.linear(before_BKD, self.key_value).unflatten(-1, (2, *heads))
        keys_BKHE, values_BKHE = keys_values.unbind(2)
        weights_drop = (drops[0][0], drops[2]) if drops is not None and drops[2] else None
        if self.distance is not None:
            assert distances_KD is not None
            assert bias_BTK is not None
            u_HE, v_HE = biases or (cast(Tensor, self.content_bias), cast(Tensor, self.position_bias))
            distances_KHE = functional.linear(distances_KD, self.distance).unflatten(-1, heads)
            attended_BTHE = attention.relative(
                queries_BTHE + u_HE, queries_BTHE + v_HE, keys_BKHE, values_BKHE, distances_KHE, bias_BTK, weights_drop
            )
        else:
            attended_BTHE = attention.rotary(queries_BTHE, keys_BKHE, values_BKHE, bias_BTK, weights_drop)
        x_BTD = x_BTD + _dropped(functional.linear(attended_BTHE.flatten(2), self.out), drops, 1)
        if not pre:
            x_BTD = self.norm_attention(x_BTD)
        inner_BTI = self.feed_in(self.norm_feed(x_BTD) if pre else x_BTD)
        inner_BTI = functional.relu(inner_BTI) if drops is None else relu_dropped(inner_BTI, drops[0][2], drops[1])
        x_BTD = x_BTD + _dropped(self.feed_out(inner_BTI), drops, 3)
        return x_BTD if pre else self.norm_feed(x_BTD)


def _dropped(x_BTD: Tensor, drops: tuple[Tensor, int, int] | None, place: int) -> Tensor:
    return x_BTD if drops is None else dropped(x_BTD, drops[0][place], drops[1])


class TransformerXl(nn.Module):
    """The language model. Carry: `memory0`, … [lanes, M, D], what every layer read, and `live` [lanes, M], 1 or 0."""

    Config = TransformerXlConfig

    def __init__(self, config: TransformerXlConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.width = config.width
        self.embedding = AdaptiveEmbedding(vocab_size, config.width, config.cutoffs, config.div_val)
        self.BY_TOKEN = self.embedding.by_token("embedding.")
        self.layers = cast(Sequence[XlLayer], nn.ModuleList(XlLayer(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else None
        shared = config.position == "relative" and config.share_biases
        self.content_bias = nn.Parameter(torch.empty(config.heads, config.head_width)) if shared else None
        self.position_bias = nn.Parameter(torch.empty(config.heads, config.head_width)) if shared else None
        for name, parameter in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.normal_(parameter, 1.0, config.init_std)
            elif name.endswith(".bias") or ".bias." in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, config.init_std)
        layer: Callable[..., Tensor] = XlLayer.__call__
        if config.compile:
            keep_out_of_graphs()
        self._layer = torch.compile(layer, dynamic=False) if config.compile else layer

    def initial_carry(self, lanes: int) -> Carry:
        """Zeros, of the device and type of the parameters; nothing of it is live."""
        config, like = self.config, self.layers[0].feed_in.bias
        if not config.memory:
            return {}
        carry = {f"memory{i}": like.new_zeros(lanes, config.memory, config.width) for i in range(config.layers)}
        return carry | {"live": like.new_zeros(lanes, config.memory)}

    def forward(
        self, tokens_BT: Tensor, carry: Carry, masks: Masks | None, starts_BT: Tensor | None = None
    ) -> tuple[Hidden, Carry]:
        """Hidden states of every position and the carry after the last one (detached: truncated backpropagation).

        Where `starts_BT` is True, what was read before is forgotten: neither seen from there on nor kept.
        """
        config = self.config
        length = tokens_BT.shape[1]
        x_BTD = self.embedding(tokens_BT)
        if starts_BT is not None:
            carry = forgotten(carry, starts_BT)
        live_BM = carry["live"] if config.memory else x_BTD.new_zeros(len(tokens_BT), 0)
        nothing_BMD = x_BTD.new_zeros(len(tokens_BT), 0, config.width)
        bias_BTK = None
        if config.position == "relative" or not self._sees_all(live_BM, starts_BT):
            window = config.memory if config.same_length else None
            bias_BTK = attention.visible(live_BM, starts_BT, length, window)
        distances_KD = None
        if config.position == "relative":
            distances_KD = attention.sinusoids(config.memory + length, config.width, config.clamp, x_BTD)
        ends, drops = None, [None] * config.layers
        if masks is not None:
            ends, distances_KD, drops = self._drops(masks, distances_KD)
            x_BTD = dropped(x_BTD, *ends[0])
        biases = None if self.content_bias is None else (self.content_bias, cast(Tensor, self.position_bias))
        after: Carry = {}
        for index, layer in enumerate(self.layers):
            memory_BMD = carry[f"memory{index}"] if config.memory else nothing_BMD
            if config.memory:
                after[f"memory{index}"] = torch.cat([memory_BMD, x_BTD.detach()], 1)[:, -config.memory :]
            given = (layer, x_BTD, memory_BMD, distances_KD, biases, bias_BTK, drops[index])
            if config.checkpoint_activations and torch.is_grad_enabled():
                x_BTD = checkpoint(self._layer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = self._layer(*given)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        raw_BTD = x_BTD
        if ends is not None:
            x_BTD = dropped(x_BTD, *ends[1])
        return Hidden(x_BTD, raw_BTD), self._kept(after, live_BM, starts_BT, length)

    def _sees_all(self, live_BM: Tensor, starts_BT: Tensor | None) -> bool:
        """Whether every position sees all that was read before it."""
        return starts_BT is None and not self.config.same_length and bool(live_BM.all())

    def _drops(self, masks: Masks, distances_KD: Tensor | None) -> tuple[Any, Tensor | None, list[Any]]:
        """Keys and threshold of the first and the last dropout, dropped distances (the same in all lanes), and what
        every layer drops.
        """
        config = self.config
        threshold, of_weights = masks.threshold(config.drop), masks.threshold(config.drop_attention)
        sites = [f"layer{i}/{site}" for i in range(config.layers) for site in ("weights", "attention", "inner", "feed")]
        keys = masks.keys(["input", *sites, "output"])
        if distances_KD is not None:
            near_first = dropped(distances_KD.flip(0)[None], masks.shared_key("distances"), threshold)
            distances_KD = near_first[0].flip(0)  # however many there are, one distance has one mask
        drops = [(four, threshold, of_weights) for four in keys[1:-1].unflatten(0, (config.layers, 4))]
        return ((keys[0], threshold), (keys[-1], threshold)), distances_KD, drops

    def _kept(self, after: Carry, live_BM: Tensor, starts_BT: Tensor | None, length: int) -> Carry:
        """The carry: of what was read, only what is live."""
        memory = self.config.memory
        if not memory:
            return {}
        live_BK = functional.pad(live_BM, (0, length), value=1.0)
        if starts_BT is not None:
            places_T = torch.arange(1, length + 1, device=starts_BT.device)
            last_B1 = torch.where(starts_BT, places_T, 0).amax(1, keepdim=True)  # 0: no start
            places_K = torch.arange(1 - live_BM.shape[1], length + 1, device=starts_BT.device)
            kept_BK = (places_K >= last_B1) | (last_B1 == 0)
            live_BK = live_BK * kept_BK
            kept_BM1 = kept_BK[:, -memory:, None]
            after = {name: value * kept_BM1 for name, value in after.items()}
        return after | {"live": live_BK[:, -memory:]}

    def softmax(self) -> list[Level]:
        """What a loss head makes logits with; the weights are the embedding's."""
        return self.embedding.levels()

    def logits(self, output_BTD: Tensor) -> Tensor:
        """Scores of the next token [B, T, V]."""
        return logits(output_BTD, self.softmax())

    def penalty(self, hidden: Hidden) -> Tensor:
        """Nothing: the objective is the cross-entropy."""
        return hidden.output_BTE.new_zeros(())

    def flops(self, length: int) -> float:
        """Floating-point operations of a training step a token, in segments of `length`: a weight takes two forward and
        four backward, the tied embedding counts once, as softmax; keys and values are made of the memory too, and
        every query meets all keys.
        """
        config = self.config
        wide, keys = config.heads * config.head_width, config.memory + length
        products = 3 if config.position == "relative" else 2
        per_layer = 2 * wide * config.width * config.memory / length + products * wide * keys
        return 6.0 * (sum(parameter.numel() for parameter in self.parameters()) + config.layers * per_layer)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Parameters from the bottom (embedding, tied softmax, shared biases) to the top layer, for discriminative
        learning rates.
        """
        shared = [bias for bias in (self.content_bias, self.position_bias) if bias is not None]
        groups = [[*self.embedding.parameters(), *shared], *(list(layer.parameters()) for layer in self.layers)]
        if self.norm is not None:
            groups[-1] += self.norm.parameters()
        return groups
