"""The LSTM by hand: that of torch in fp32, and its gradients in bf16 at every width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.models.awd_lstm import LstmLayer
from pretrain.models.lstm import Lstm


def inputs(width: int, input_width: int, lanes: int = 4, length: int = 6) -> list[Tensor]:
    """Input, h, c, weights, bias."""
    torch.manual_seed(0)
    bound = width**-0.5
    sizes = [(4 * width, input_width), (4 * width, width), (4 * width,)]
    weights = [torch.empty(size).uniform_(-bound, bound) for size in sizes]
    states = [torch.randn(lanes, width) / 5 for _ in range(2)]
    return [torch.randn(lanes, length, input_width), *states, *weights]


def by_torch(x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    weights = [weight_ih, weight_hh, bias, torch.zeros_like(bias)]
    y, h, c = torch.lstm(x, (h[None], c[None]), weights, True, 1, 0.0, True, False, True)
    return y, h[0], c[0]


def gradients(made: tuple[Tensor, ...], given: list[Tensor]) -> list[Tensor]:
    """Of an uneven mixture of all outputs."""
    torch.manual_seed(1)
    loss = sum((part.float() * torch.randn(part.shape)).sum() for part in made)
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, given))


@pytest.mark.parametrize("onednn", [True, False])
def test_it_is_the_lstm_of_torch(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    given = [one.requires_grad_() for one in inputs(24, 10)]
    ours, theirs = Lstm.apply(*given), by_torch(*given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "input_width"), [(256, 64), (1024, 64), (96, 1030)])  # torch's, and by hand
def test_gradients_in_bf16(width: int, input_width: int) -> None:
    """From 1,024 units on oneDNN's own are wrong."""
    exact = [one.bfloat16().float().requires_grad_() for one in inputs(width, input_width)]
    wanted = gradients(by_torch(*exact), exact)
    layer = LstmLayer(input_width, width).bfloat16()
    half = [one.detach().bfloat16().requires_grad_() for one in exact]
    x, h, c, layer.weight_ih.data, layer.weight_hh.data, layer.bias_ih.data = half
    found = gradients(layer(x, h, c, None), [x, h, c, layer.weight_ih, layer.weight_hh, layer.bias_ih])
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()
