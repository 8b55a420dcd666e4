"""Attention of a segment over itself and the memory before it.

B lanes, T positions of the segment, M of the memory, K = M + T keys, H heads, E width of a head. Keys lie in order of
time, the newest last: query i of the segment stands at place M + i.

The relative form (Dai et al. 2019, arXiv:1901.02860 §3.3) scores key j for query i with
    (q_i + u)·k_j + (q_i + v)·r_{i−j}.
The second term is one product of queries with all K distances; as row i of it wants to be read from place T−1−i on,
the shift is a view with one stride less (`_shifted`), not a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from pretrain.models.dropout import dropped

# Scores of a chunk on a CPU: what stays within its caches; and queries that share the keys they may see.
CHUNK_ELEMENTS = 1 << 19
CHUNK_QUERIES = 128


def visible(live_BM: Tensor, starts_BT: Tensor | None, length: int, window: int | None) -> Tensor:
    """What is added to scores [B, T, K], of the type of `live_BM`: 0 where a query sees a key, else −∞. It sees itself
    and those before it, in memory only what is live, nothing before a start, and of all that the `window` newest.
    """
    memory = live_BM.shape[1]
    places_K = torch.arange(memory + length, device=live_BM.device)
    query_T1 = places_K[memory:, None]
    seen_TK = places_K <= query_T1
    if window is not None:
        seen_TK = seen_TK & (places_K > query_T1 - window)
    seen_BTK = seen_TK & functional.pad(live_BM.bool(), (0, length), value=True)[:, None]
    if starts_BT is not None:
        first_BT = torch.where(starts_BT, query_T1[:, 0], 0).cummax(1).values
        seen_BTK = seen_BTK & (places_K >= first_BT[:, :, None])
    return torch.zeros_like(seen_BTK, dtype=live_BM.dtype).masked_fill_(~seen_BTK, float("-inf"))


def sinusoids(length: int, width: int, clamp: int | None, like: Tensor) -> Tensor:
    """Embeddings of the distances length−1, …, 0 [length, width] (Vaswani et al. 2017, sines first); greater ones
    than `clamp` count as `clamp`.
    """
    distance_K = torch.arange(length - 1, -1, -1, device=like.device, dtype=torch.float64)
    if clamp is not None:
        distance_K = distance_K.clamp(max=clamp)
    rates = 10_000.0 ** -(torch.arange(0, width, 2, device=like.device, dtype=torch.float64) / width)
    angles = distance_K[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width].to(like.dtype)


def rotated(x_BLHE: Tensor, first: int) -> Tensor:
    """Rotary positions first, first + 1, … (Su et al. 2021, arXiv:2104.09864): the product of two vectors that are
    turned so depends on the distance of their positions only.
    """
    _, length, _, width = x_BLHE.shape
    rates = 10_000.0 ** -(torch.arange(0, width, 2, device=x_BLHE.device, dtype=torch.float64) / width)
    angles = torch.arange(first, first + length, device=x_BLHE.device)[:, None, None] * rates
    cos, sin = angles.cos().to(x_BLHE.dtype), angles.sin().to(x_BLHE.dtype)
    a, b = x_BLHE.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _shifted(scores_HTK: Tensor) -> Tensor:
    """The view in which column j of row i is column j + T−1−i. Where that is beyond the row's end (keys of the
    future), it is a number of the next row.
    """
    *heads, length, keys = scores_HTK.shape
    *strides, row, column = scores_HTK.stride()
    return scores_HTK.as_strided(
        (*heads, length, keys), (*strides, row - column, column), scores_HTK.storage_offset() + (length - 1) * column
    )


def _unshifted(into_HTK: Tensor, gradient_HTK: Tensor) -> None:
    """The gradient of the scores before `_shifted`, written over `into_HTK`; that of keys of the future must be 0."""
    into_HTK.zero_()
    view = _shifted(into_HTK)
    # The last column of a row lies where the next row begins; it is of the future, but for the last row.
    view[..., :-1].copy_(gradient_HTK[..., :-1])
    view[..., -1, -1].copy_(gradient_HTK[..., -1, -1])


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return _shifted(scores.contiguous()).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        before = torch.empty_like(gradients[0], memory_format=torch.contiguous_format)
        _unshifted(before, gradients[0])
        return before


class _Relative(torch.autograd.Function):
    """Relative attention of some queries and heads of a lane at a time, over the keys up to the last of these queries.
    Scores are made again in the backward, so memory never holds more of them than a chunk: on a CPU faster than the
    whole of them at once, and B·H·T·K numbers a layer less.

    Queries are scaled. Shapes: content and position [B, T, H, E], keys and values [B, K, H, E], distances [K, H, E],
    bias [B, T, K].
    """

    @staticmethod
    def forward(
        ctx: Any, content: Tensor, position: Tensor, keys: Tensor, values: Tensor, distances: Tensor, bias: Tensor
    ) -> Tensor:
        output = torch.empty(content.shape, dtype=content.dtype, device=content.device)
        for chunk in _chunks(content, keys, 2):
            weights = chunk.weights(content, position, keys, distances, bias)
            chunk.queries(output).copy_(torch.bmm(weights, chunk.keys(values)))
        ctx.save_for_backward(content, position, keys, values, distances, bias, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        content, position, keys, values, distances, bias, output = ctx.saved_tensors
        d_content, d_position = torch.empty_like(content), torch.empty_like(position)
        exact = torch.promote_types(distances.dtype, torch.float32)  # sums over chunks are never of less
        d_keys, d_values, d_distances = (torch.zeros_like(x, dtype=exact) for x in (keys, values, distances))
        for chunk in _chunks(content, keys, 3):
            weights = chunk.weights(content, position, keys, distances, bias)
            d_output = chunk.queries(gradients[0])
            d_scores = torch.bmm(d_output, chunk.keys(values).transpose(1, 2), out=chunk.buffers[0])
            d_scores -= (d_output * chunk.queries(output)).sum(-1, keepdim=True)
            d_scores *= weights
            _unshifted(chunk.buffers[2], d_scores)
            chunk.queries(d_content).copy_(torch.bmm(d_scores, chunk.keys(keys)))
            chunk.queries(d_position).copy_(torch.bmm(chunk.buffers[2], chunk.distances(distances)))
            for total, of_keys, of_queries in (
                (chunk.keys(d_values), weights, d_output),
                (chunk.keys(d_keys), d_scores, chunk.queries(content)),
                (chunk.distances(d_distances), chunk.buffers[2], chunk.queries(position)),
            ):
                total += torch.bmm(of_keys.transpose(1, 2), of_queries)
        d_keys, d_values, d_distances = (x.to(keys.dtype) for x in (d_keys, d_values, d_distances))
        return d_content, d_position, d_keys, d_values, d_distances, None


class _Chunk(NamedTuple):
    """Some neighbouring queries and heads of a lane, and the keys that these may see."""

    lane: int
    heads: slice
    rows: slice  # of the queries
    seen: int  # keys, from the first
    buffers: list[Tensor]  # for scores [heads, rows, seen]; used again by the next chunk

    def queries(self, x_BTHE: Tensor) -> Tensor:
        """A view [heads, rows, E]."""
        return x_BTHE[self.lane, self.rows, self.heads].transpose(0, 1)

    def keys(self, x_BKHE: Tensor) -> Tensor:
        """A view [heads, seen, E]."""
        return x_BKHE[self.lane, : self.seen, self.heads].transpose(0, 1)

    def distances(self, x_KHE: Tensor) -> Tensor:
        """A view [heads, seen, E], of the nearest."""
        return x_KHE[len(x_KHE) - self.seen :, self.heads].transpose(0, 1)

    def weights(self, content: Tensor, position: Tensor, keys: Tensor, distances: Tensor, bias: Tensor) -> Tensor:
        """softmax of the scores, in buffer 1; buffer 0 is overwritten."""
        scores, other = self.buffers[:2]
        added = bias[self.lane, self.rows, : self.seen].expand_as(scores)
        torch.baddbmm(added, self.queries(content), self.keys(keys).transpose(1, 2), out=scores)
        scores += _shifted(torch.bmm(self.queries(position), self.distances(distances).transpose(1, 2), out=other))
        if scores.dtype == torch.bfloat16:
            return other.copy_(scores.float().softmax(-1))
        return torch.softmax(scores, -1, out=other)


def _chunks(queries_BTHE: Tensor, keys_BKHE: Tensor, buffers: int) -> Iterator[_Chunk]:
    """All of a segment."""
    lanes, length, heads, _ = queries_BTHE.shape
    memory = keys_BKHE.shape[1] - length
    rows = min(length, CHUNK_QUERIES)
    at_once = min(max(CHUNK_ELEMENTS // (rows * keys_BKHE.shape[1]), 1), heads)
    scratch = queries_BTHE.new_empty(buffers, at_once * rows * keys_BKHE.shape[1])
    for lane in range(lanes):
        for head in range(0, heads, at_once):
            for begin in range(0, length, rows):
                end = min(begin + rows, length)
                shape = (min(at_once, heads - head), end - begin, memory + end)
                pieces = [flat[: math.prod(shape)].view(shape) for flat in scratch]
                yield _Chunk(lane, slice(head, head + shape[0]), slice(begin, end), memory + end, pieces)


def relative(
    content_BTHE: Tensor,
    position_BTHE: Tensor,
    keys_BKHE: Tensor,
    values_BKHE: Tensor,
    distances_KHE: Tensor,
    bias_BTK: Tensor,
    drop: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Attention with relative positions, [B, T, H, E]. The queries have their biases u and v; `distances_KHE` are W_r·R
    from the farthest, K−1, to 0. `drop` drops attention weights: a key a lane and a threshold (see `dropped`).
    """
    scale = content_BTHE.shape[-1] ** -0.5
    content_BTHE, position_BTHE = content_BTHE * scale, position_BTHE * scale
    if content_BTHE.device.type == "cpu" and drop is None:
        output: Tensor = _Relative.apply(content_BTHE, position_BTHE, keys_BKHE, values_BKHE, distances_KHE, bias_BTK)
        return output
    return biased(content_BTHE, position_BTHE, keys_BKHE, values_BKHE, distances_KHE, bias_BTK, drop)


def biased(
    content_BTHE: Tensor,
    position_BTHE: Tensor,
    keys_BKHE: Tensor,
    values_BKHE: Tensor,
    distances_KHE: Tensor,
    bias_BTK: Tensor,
    drop: tuple[Tensor, int] | None,
) -> Tensor:
    """The same of scaled queries with the position term as the bias of fused attention: B·H·T·K numbers a layer."""
    q_BHTE, p_BHTE, k_BHKE, v_BHKE = (x.transpose(1, 2) for x in (content_BTHE, position_BTHE, keys_BKHE, values_BKHE))
    bias_BHTK: Tensor = _Shift.apply(p_BHTE @ distances_KHE.permute(1, 2, 0))
    return _attend(q_BHTE, k_BHKE, v_BHKE, bias_BHTK + bias_BTK[:, None], drop).transpose(1, 2)


def rotary(
    queries_BTHE: Tensor,
    keys_BKHE: Tensor,
    values_BKHE: Tensor,
    bias_BTK: Tensor | None,
    drop: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Attention with rotary positions, [B, T, H, E]. Without `bias_BTK`, where all that came before is seen, it runs on
    flash attention.
    """
    memory = keys_BKHE.shape[1] - queries_BTHE.shape[1]
    scale = queries_BTHE.shape[-1] ** -0.5
    q_BHTE = rotated(queries_BTHE * scale, memory).transpose(1, 2)
    k_BHKE, v_BHKE = rotated(keys_BKHE, 0).transpose(1, 2), values_BKHE.transpose(1, 2)
    length, keys = q_BHTE.shape[2], k_BHKE.shape[2]
    if bias_BTK is None and drop is None:
        mask: Any = causal_lower_right(length, keys)
        return functional.scaled_dot_product_attention(q_BHTE, k_BHKE, v_BHKE, mask, scale=1.0).transpose(1, 2)
    if bias_BTK is None:
        bias_BTK = visible(q_BHTE.new_ones(1, memory), None, length, None)
    return _attend(q_BHTE, k_BHKE, v_BHKE, bias_BTK[:, None], drop).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, drop: tuple[Tensor, int] | None) -> Tensor:
    if drop is None:
        return functional.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    exact = torch.promote_types(q.dtype, torch.float32)
    weights = (q @ k.transpose(2, 3) + bias).to(exact).softmax(-1).to(q.dtype)
    return dropped(weights.flatten(1, 2), *drop).view_as(weights) @ v
