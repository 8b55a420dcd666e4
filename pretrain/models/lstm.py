"""An LSTM layer over a segment in bf16 on a CPU, its backward by hand.

oneDNN's (torch 2.13.0, oneDNN 3.12, a CPU with AMX) gives wrong gradients from 1,024 units on, where its outputs are
right: those of the input are off by more than their size, those of the weights by a fifth.

    forward    x W_ihᵀ + b for all positions, one by one h W_hhᵀ;  i, f, o = σ;  g = tanh;  c = f c + i g;  h = o tanh c
    backward   one by one only what comes back through time, dh = dgates W_hh;  the rest for all positions

Products are of bf16, gates and cells fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WRONG_FROM = 1024  # units


def _product(weight_GH: Tensor, lanes: int) -> Callable[[Tensor], Tensor]:
    """x ↦ x weightᵀ, for many x of few rows: laid out for the kernel once, not at every call."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return lambda rows_BH: rows_BH @ weight_GH.t()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_GH.contiguous(), lanes)
    return lambda rows_BH: torch.ops.mkldnn._linear_pointwise(rows_BH, packed, None, "none", [], "")


class Lstm(torch.autograd.Function):
    """(output [B, T, H], h, c) of input [B, T, D], h, c [B, H], weights [4H, D], [4H, H] and bias, gates ifgo."""

    @staticmethod
    def forward(
        ctx: Any, input_BTD: Tensor, h_BH: Tensor, c_BH: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lanes, length, _ = input_BTD.shape
        width = h_BH.shape[1]
        input_ND = input_BTD.transpose(0, 1).flatten(0, 1)
        gates_TBG = torch.addmm(bias, input_ND, weight_ih.t()).float().view(length, lanes, 4 * width)
        h_TBH = h_BH.new_empty(length + 1, lanes, width)
        c_TBH = h_TBH.new_empty(h_TBH.shape, dtype=torch.float32)
        h_TBH[0], c_TBH[0] = h_BH, c_BH
        of_h = _product(weight_hh, lanes)
        tanh_BH = c_TBH.new_empty(lanes, width)
        for t in range(length):
            i, f, g, o = gates_TBG[t].add_(of_h(h_TBH[t])).chunk(4, 1)
            torch.mul(f.sigmoid_(), c_TBH[t], out=c_TBH[t + 1]).addcmul_(i.sigmoid_(), g.tanh_())
            torch.mul(o.sigmoid_(), torch.tanh(c_TBH[t + 1], out=tanh_BH), out=h_TBH[t + 1])
        ctx.save_for_backward(input_ND, gates_TBG, h_TBH, c_TBH, weight_ih, weight_hh)
        return h_TBH[1:].transpose(0, 1), h_TBH[length].clone(), c_TBH[length].to(c_BH.dtype)

    @staticmethod
    def backward(ctx: Any, d_output_BTH: Tensor, d_h_BH: Tensor, d_c_BH: Tensor) -> tuple[Tensor | None, ...]:
        input_ND, gates_TBG, h_TBH, c_TBH, weight_ih, weight_hh = ctx.saved_tensors
        length, lanes, _ = gates_TBG.shape
        i, f, g, o = gates_TBG.chunk(4, 2)
        tanh_TBH = c_TBH[1:].tanh()
        # What a gradient of h is to the output gate and to the cell, and one of the cell to the other gates.
        o_of_h = tanh_TBH * o * (1 - o)
        c_of_h = o * (1 - tanh_TBH * tanh_TBH)
        i_of_c = g * i * (1 - i)
        f_of_c = c_TBH[:-1] * f * (1 - f)
        g_of_c = i * (1 - g * g)
        d_gates_TBG = input_ND.new_empty(gates_TBG.shape)
        d_i, d_f, d_g, d_o = d_gates_TBG.chunk(4, 2)
        d_output_TBH = d_output_BTH.transpose(0, 1).to(torch.float32, copy=True)
        back_BH, d_c_BH = d_h_BH, d_c_BH.to(torch.float32, copy=True)
        back = _product(weight_hh.t(), lanes)
        for t in range(length - 1, -1, -1):
            d_h = d_output_TBH[t].add_(back_BH)
            torch.mul(d_h, o_of_h[t], out=d_o[t])
            d_c_BH.addcmul_(d_h, c_of_h[t])
            torch.mul(d_c_BH, i_of_c[t], out=d_i[t])
            torch.mul(d_c_BH, f_of_c[t], out=d_f[t])
            torch.mul(d_c_BH, g_of_c[t], out=d_g[t])
            d_c_BH.mul_(f[t])
            back_BH = back(d_gates_TBG[t])
        d_gates_NG = d_gates_TBG.flatten(0, 1)
        d_input_BTD = (d_gates_NG @ weight_ih).view(length, lanes, -1).transpose(0, 1)
        d_weight_hh = d_gates_NG.t() @ h_TBH[:-1].flatten(0, 1)
        return (
            d_input_BTD,
            back_BH,
            d_c_BH.to(input_ND.dtype),
            d_gates_NG.t() @ input_ND,
            d_weight_hh,
            d_gates_NG.sum(0),
        )
