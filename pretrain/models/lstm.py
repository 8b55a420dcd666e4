"""An LSTM layer over a segment in bf16 on a CPU, by hand.

oneDNN's (torch 2.13.0, oneDNN 3.12, a CPU with AMX) gives wrong gradients from 1,024 units on, where its outputs are
right: those of the input are off by more than their size, those of the weights by a fifth. With few lanes this one is
also faster there, and where the input is as wide (20 lanes: a quarter; with 64 it is a tenth slower).

    forward    x W_ihᵀ + b for all positions, one by one h W_hhᵀ;  i, f, o = σ;  g = tanh;  c = f c + i g;  h = o tanh c
    backward   one by one only what comes back through time, dh = dgates W_hh;  the rest for all positions

Products are of bf16, gates and cells fp32. What is done one by one is of tensors so small that torch takes one thread
for them: to wake a second costs more. tanh, which would wake it, is 1 − 2 σ(−2·); what is kept is σ(−2·).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FROM = 1024  # units, or width of the input
_ROWS = 512  # of a matrix to transpose at a time

Product = Callable[[Tensor, Tensor], Tensor]


def _product(weight_GH: Tensor, lanes: int) -> Product:
    """(x, y) ↦ x weightᵀ + y, for many x of few rows: the weight is laid out for the kernel once, not at every call."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return lambda rows_BH, plus_BG: torch.addmm(plus_BG, rows_BH, weight_GH.t())
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_GH, lanes)
    return lambda rows_BH, plus_BG: torch.ops.mkldnn._linear_pointwise.binary(rows_BH, plus_BG, packed, None, "add")


def _transposed(matrix_NM: Tensor) -> Tensor:
    """A contiguous copy, some rows at a time: at once it takes three times as long."""
    turned_MN = matrix_NM.new_empty(matrix_NM.shape[1], matrix_NM.shape[0])
    for turned, rows in zip(turned_MN.split(_ROWS, 1), matrix_NM.split(_ROWS), strict=True):
        turned.copy_(rows.t())
    return turned_MN


def _slope(sigmoid: Tensor) -> Tensor:
    """σ(1 − σ)."""
    return torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1)


class Lstm(torch.autograd.Function):
    """(output [B, T, H], h, c) of input [B, T, D], h, c [B, H], weights [4H, D], [4H, H] and bias, gates ifgo."""

    @staticmethod
    def forward(
        ctx: Any, input_BTD: Tensor, h_BH: Tensor, c_BH: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lanes, length, _ = input_BTD.shape
        width = h_BH.shape[1]
        input_ND = input_BTD.transpose(0, 1).flatten(0, 1)
        x_TBG = torch.addmm(bias, input_ND, weight_ih.t()).view(length, lanes, 4 * width)
        h_TBH = h_BH.new_empty(length + 1, lanes, width)
        c_TBH = h_TBH.new_empty(h_TBH.shape, dtype=torch.float32)
        gates_5TBH = c_TBH.new_empty(5, length, lanes, width)  # σ of i, f, −2g, o and −2c
        h_TBH[0], c_TBH[0] = h_BH, c_BH
        h, c = h_TBH[0], c_TBH[0]
        of_h = _product(weight_hh, lanes)
        steps = zip(*map(torch.unbind, (x_TBG, *gates_5TBH, h_TBH[1:], c_TBH[1:])), strict=True)
        for x, i, f, g, o, tanh, h_next, c_next in steps:
            i_in, f_in, g_in, o_in = of_h(h, x).chunk(4, 1)
            i.copy_(i_in).sigmoid_()
            f.copy_(f_in).sigmoid_()
            g.copy_(g_in).mul_(-2).sigmoid_()
            o.copy_(o_in).sigmoid_()
            torch.mul(f, c, out=c_next).addcmul_(i, g, value=-2).add_(i)
            torch.mul(c_next, -2, out=tanh).sigmoid_()
            h, c = torch.addcmul(o, o, tanh, value=-2, out=h_next), c_next
        ctx.save_for_backward(input_ND, gates_5TBH, h_TBH, c_TBH, weight_ih, weight_hh)
        return h_TBH[1:].transpose(0, 1), h.clone(), c.to(c_BH.dtype)

    @staticmethod
    def backward(ctx: Any, d_output_BTH: Tensor, d_h_BH: Tensor, d_c_BH: Tensor) -> tuple[Tensor | None, ...]:
        input_ND, gates_5TBH, h_TBH, c_TBH, weight_ih, weight_hh = ctx.saved_tensors
        i, f, g, o, tanh = gates_5TBH
        length, lanes, width = i.shape
        # What a gradient of h is to the output gate and to the cell, and one of the cell to the other gates.
        o_of_h = _slope(o).mul_(torch.rsub(tanh, 1, alpha=2))
        c_of_h = _slope(tanh).mul_(o).mul_(4)
        i_of_c = _slope(i).mul_(torch.rsub(g, 1, alpha=2))
        f_of_c = _slope(f).mul_(c_TBH[:-1])
        g_of_c = _slope(g).mul_(i).mul_(4)
        d_gates_TBG = input_ND.new_empty(length, lanes, 4 * width)
        d_gates_4TBH = d_gates_TBG.view(length, lanes, 4, width).unbind(2)
        d_output_TBH = d_output_BTH.transpose(0, 1)
        d_h, d_c = (d_output_TBH[-1] + d_h_BH).float(), d_c_BH.to(torch.float32, copy=True)
        back = _product(_transposed(weight_hh), lanes)
        d_before_TBH = torch.cat([torch.zeros_like(d_output_TBH[:1]), d_output_TBH[:-1]])
        of_gates = (d_gates_TBG, *d_gates_4TBH, d_before_TBH, i_of_c, f_of_c, g_of_c, o_of_h, c_of_h, f)
        for gates, d_i, d_f, d_g, d_o, before, of_i, of_f, of_g, of_o, of_c, f_t in reversed(
            list(zip(*map(torch.unbind, of_gates), strict=True))
        ):
            torch.mul(d_h, of_o, out=d_o)
            d_c.addcmul_(d_h, of_c)
            torch.mul(d_c, of_i, out=d_i)
            torch.mul(d_c, of_f, out=d_f)
            torch.mul(d_c, of_g, out=d_g)
            d_c.mul_(f_t)
            d_h.copy_(back(gates, before))
        d_gates_NG = d_gates_TBG.flatten(0, 1)
        d_gates_GN = _transposed(d_gates_NG)
        return (
            (d_gates_NG @ weight_ih).view(length, lanes, -1).transpose(0, 1),
            d_h.to(input_ND.dtype),
            d_c.to(input_ND.dtype),
            d_gates_GN @ input_ND,
            d_gates_GN @ h_TBH[:-1].flatten(0, 1),
            d_gates_NG.sum(0),
        )
