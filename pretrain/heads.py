"""Loss heads: from the top layer's output to the negative log-likelihood, behind one interface. All are exact.

N positions, E width, V vocabulary. `Head(output_NE, weight_VE, bias_V, targets_N)` is the sum over targets, in nats;
positions whose target is IGNORED count nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import ConfigError
from pretrain.models.output import Level, logits
from pretrain.streams import IGNORED

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Logits in memory at once: more of them are fewer sums over the vocabulary (on a CPU a third of the time of 2^20 in
# bf16, a tenth in fp32), and on a GPU a kernel should be filled.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}


def _rows(output_NE: Tensor, vocab_size: int) -> int:
    """Positions of a chunk."""
    return max(CHUNK_ELEMENTS[output_NE.device.type] // vocab_size, 256)


def dense(output_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """All logits at once: three tensors of N·V floats."""
    logits_NV = functional.linear(output_NE, weight_VE, bias_V).float()
    return functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")


class _Chunked(torch.autograd.Function):
    """Softmax and its gradient a chunk of positions at a time, both in the forward: logits are never all there, and
    are computed once. (The gradient in the forward is Liger's idea, arXiv:2410.10989 §3.2.)
    """

    @staticmethod
    def forward(ctx: Any, output_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        nll = torch.zeros((), dtype=torch.float64, device=output_NE.device)
        d_output_NE = torch.empty_like(output_NE)
        exact = torch.promote_types(weight_VE.dtype, torch.float32)  # sums over chunks are never of less
        d_weight_VE = torch.zeros_like(weight_VE, dtype=exact)
        d_bias_V = torch.zeros_like(bias_V, dtype=exact)
        ignored = output_NE.is_cuda or bool((targets_N == IGNORED).any())  # a GPU would have to be waited for
        rows = _rows(output_NE, len(weight_VE))
        for begin in range(0, len(output_NE), rows):
            part = slice(begin, begin + rows)
            output_CE, targets_C1 = output_NE[part], targets_N[part, None]
            counts_C1 = targets_C1 != IGNORED
            targets_C1 = targets_C1.clamp(min=0)
            logits_CV = torch.addmm(bias_V, output_CE, weight_VE.T).to(exact)
            log_probs_CV = functional.log_softmax(logits_CV, 1)
            nll -= (log_probs_CV.gather(1, targets_C1) * counts_C1).sum()
            if wanted:
                d_logits_CV = log_probs_CV.exp_()
                d_logits_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1, dtype=exact))
                if ignored:
                    d_logits_CV *= counts_C1
                d_bias_V += d_logits_CV.sum(0)
                d_logits_CV = d_logits_CV.to(output_NE.dtype)
                torch.mm(d_logits_CV, weight_VE, out=d_output_NE[part])
                if exact == weight_VE.dtype:
                    d_weight_VE.addmm_(d_logits_CV.T, output_CE)
                else:
                    d_weight_VE += d_logits_CV.T @ output_CE
        if wanted:
            ctx.save_for_backward(d_output_NE, d_weight_VE.to(weight_VE.dtype), d_bias_V.to(bias_V.dtype))
        return nll.to(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradients[0].to(saved.dtype) * saved for saved in ctx.saved_tensors), None)


def chunked(output_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """A chunk of positions at a time; beside the gradients it needs memory for one chunk's logits."""
    nll: Tensor = _Chunked.apply(output_NE, weight_VE, bias_V, targets_N)
    return nll


def liger(output_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy (arXiv:2410.10989), for GPUs. Raises ConfigError where it is not installed."""
    try:
        kernels = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as exc:
        raise ConfigError(f"engine.head=liger: {exc}; run pip install 'chartlm[gpu]', or take head=chunked") from exc
    nll: Tensor = kernels.liger_fused_linear_cross_entropy(
        output_NE, weight_VE, targets_N, bias=bias_V, ignore_index=IGNORED, reduction="sum"
    )
    return nll


HEADS: dict[str, Head] = {"chunked": chunked, "dense": dense, "liger": liger}


def nll(head: Head, output_NE: Tensor, levels: Sequence[Level], targets_N: Tensor) -> Tensor:
    """Sum over targets of the negative log-likelihood by a softmax of one or more levels, in nats."""
    first, *others = levels
    if not others:
        return head(first.given(output_NE), first.weight_VE, first.bias_V, targets_N)
    edge = begin = len(first.weight_VE) - len(others)
    of_first_N, total = targets_N, output_NE.new_zeros(())
    for place, level in enumerate(others):
        edge, begin = begin, begin + len(level.weight_VE)
        inside_N = (targets_N >= edge) & (targets_N < begin)
        of_first_N = torch.where(inside_N, len(first.weight_VE) - len(others) + place, of_first_N)
        rows = inside_N.nonzero().squeeze(1)
        total = total + head(level.given(output_NE[rows]), level.weight_VE, level.bias_V, targets_N[rows] - edge)
    return total + head(first.given(output_NE), first.weight_VE, first.bias_V, of_first_N)


def score(output_NE: Tensor, levels: Sequence[Level], targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(nll of every target in nats [N], 0 where it is IGNORED; whether it was the most likely token [N])."""
    nlls, hits = [], []
    rows = _rows(output_NE, sum(len(level.weight_VE) for level in levels))
    for output_CE, targets_C in zip(output_NE.split(rows), targets_N.split(rows), strict=True):
        logits_CV = logits(output_CE, levels)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        nlls.append(functional.cross_entropy(logits_CV, targets_C, ignore_index=IGNORED, reduction="none"))
        hits.append(logits_CV.argmax(1) == targets_C)
    return torch.cat(nlls), torch.cat(hits)
