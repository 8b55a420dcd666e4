"""Attention of a segment over itself and the memory before it.

B lanes, T positions of the segment, M of the memory, K = M + T keys, H heads, E width of a head. Keys lie in order of
time, the newest last: query i of the segment stands at place M + i.

The relative form (Dai et al. 2019, arXiv:1901.02860 §3.3) scores key j for query i with
    (q_i + u)·k_j + (q_i + v)·r_{i−j}.
The second term is one product of queries with all K distances, of which row i is wanted from place T−1−i on. That shift
is a matter of strides: see `_shifted` and `_skewed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.models.dropout import dropped

# Scores of a chunk on a CPU: what stays within its caches; and queries that share the keys they may see.
CHUNK_ELEMENTS = 1 << 21
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


def _shifted(scores_BHTK: Tensor) -> Tensor:
    """Column j of row i becomes column j + T−1−i; beyond the row, of the future, it is what comes next. (The paper's
    appendix B: one more column, and the rows cut anew.)
    """
    lanes, heads, length, keys = scores_BHTK.shape
    padded = functional.pad(scores_BHTK, (1, 0)).view(lanes, heads, keys + 1, length)
    return padded[:, :, 1:].reshape(scores_BHTK.shape)


class _Relative(torch.autograd.Function):
    """Relative attention of some queries and heads of a lane at a time, over the keys up to the last of these queries.
    Scores are made again in the backward, so memory never holds more of them than a chunk.

    Queries are scaled. Shapes: content and position [B, T, H, E], keys and values [B, K, H, E], distances [K, H, E],
    bias [B, T, K], which hides at least the future.
    """

    @staticmethod
    def forward(
        ctx: Any, content: Tensor, position: Tensor, keys: Tensor, values: Tensor, distances: Tensor, bias: Tensor
    ) -> Tensor:
        output = torch.empty(content.shape, dtype=content.dtype, device=content.device)
        log_sums = content.new_empty(*content.shape[:3], 1)
        for chunk in _chunks(content, keys, 1):
            scores = chunk.scores(chunk.queries(content), chunk.keys(keys), position, distances, bias)
            most = scores.amax(-1, keepdim=True)
            weights = scores.sub_(most).exp_()
            sums = weights.sum(-1, keepdim=True)
            chunk.queries(log_sums).copy_(most + sums.log())
            chunk.queries(output).copy_(torch.bmm(weights, chunk.keys(values)) / sums)
        ctx.save_for_backward(content, position, keys, values, distances, bias, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        content, position, keys, values, distances, bias, output, log_sums = ctx.saved_tensors
        d_content, d_position = torch.empty_like(content), torch.empty_like(position)
        d_keys, d_values, d_distances = (torch.zeros_like(x) for x in (keys, values, distances))
        # What is to be subtracted from every score of a row goes through the product, as one more column beside ones.
        content_and = torch.cat([content, -log_sums], -1)
        d_output_and = torch.cat([gradients[0], -(gradients[0] * output).sum(-1, keepdim=True)], -1)
        keys_and, values_and = (functional.pad(x, (0, 1), value=1.0) for x in (keys, values))
        for chunk in _chunks(content, keys, 2):
            weights = chunk.scores(chunk.queries(content_and), chunk.keys(keys_and), position, distances, bias).exp_()
            d_scores = chunk.buffers[1]
            torch.bmm(chunk.queries(d_output_and), chunk.keys(values_and).transpose(1, 2), out=d_scores)
            d_scores *= weights
            skewed = _skewed(d_scores)
            chunk.queries(d_content).copy_(torch.bmm(d_scores, chunk.keys(keys)))
            chunk.queries(d_position).copy_(torch.bmm(skewed, chunk.distances(distances)))
            for total, of_keys, of_queries in (
                (chunk.keys(d_values), weights, chunk.queries(gradients[0])),
                (chunk.keys(d_keys), d_scores, chunk.queries(content)),
                (chunk.distances(d_distances), skewed, chunk.queries(position)),
            ):
                total += torch.bmm(of_keys.transpose(1, 2), of_queries)
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

    def scores(self, q: Tensor, k: Tensor, position: Tensor, distances: Tensor, bias: Tensor) -> Tensor:
        """q·k and the position term, −∞ where the bias is; in buffer 0."""
        scores = self.buffers[0]
        scores.copy_(bias[self.lane, self.rows, : self.seen])
        scores.baddbmm_(q, k.transpose(1, 2))
        # Adds what is before a row's beginning to the future of the row before, which is −∞ and stays so.
        _skewed(scores).baddbmm_(self.queries(position), self.distances(distances).transpose(1, 2))
        return scores


def _skewed(scores_HTK: Tensor) -> Tensor:
    """The view in which column j + T−1−i of row i is column j: of scores by key, those by distance. Its first columns
    are those of the future of the row before, and for the first row numbers before its head's, see `_chunks`.
    """
    _, length, _ = scores_HTK.shape
    of_head, row, column = scores_HTK.stride()
    place = scores_HTK.storage_offset() - (length - 1)
    return scores_HTK.as_strided(scores_HTK.shape, (of_head, row + 1, column), place)


def _chunks(queries_BTHE: Tensor, keys_BKHE: Tensor, buffers: int) -> Iterator[_Chunk]:
    """All of a segment. Before every head's scores in a buffer there are as many zeros as it has rows."""
    lanes, length, heads, _ = queries_BTHE.shape
    memory = keys_BKHE.shape[1] - length
    most = min(length, CHUNK_QUERIES)
    at_once = min(max(CHUNK_ELEMENTS // (most * keys_BKHE.shape[1]), 1), heads)
    scratch = queries_BTHE.new_empty(buffers, at_once * most * (keys_BKHE.shape[1] + 1))
    for begin in range(0, length, most):
        end = min(begin + most, length)
        rows, seen = end - begin, memory + end
        scratch.zero_()
        for lane in range(lanes):
            for head in range(0, heads, at_once):
                some = min(at_once, heads - head)
                pieces = [
                    flat.as_strided((some, rows, seen), (rows * (seen + 1), seen, 1), flat.storage_offset() + rows)
                    for flat in scratch
                ]
                yield _Chunk(lane, slice(head, head + some), slice(begin, end), seen, pieces)


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
    # A CPU has its caches full of more scores than that; fewer are faster at once.
    many = bias_BTK.numel() * content_BTHE.shape[2] > CHUNK_ELEMENTS
    if many and content_BTHE.device.type == "cpu" and drop is None:
        given = (content_BTHE, position_BTHE, keys_BKHE, values_BKHE, distances_KHE, bias_BTK)
        exact = torch.promote_types(content_BTHE.dtype, torch.float32)
        output: Tensor = _Relative.apply(*(x.to(exact) for x in given))
        return output.to(content_BTHE.dtype)
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
    bias_BHTK = _shifted(p_BHTE @ distances_KHE.permute(1, 2, 0))
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
        from torch.nn.attention.bias import causal_lower_right  # takes torch's compiler along, seconds of a start

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
