"""Loss heads: the same loss and gradients, in less memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import ConfigError
from pretrain import heads
from pretrain.models.output import Level
from pretrain.streams import IGNORED

N, E, V = 50, 7, 31


def problem(dtype: torch.dtype, n: int = N) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((n, E), (V, E), (V,))]
    targets = torch.randint(V, (n,), generator=generator)
    targets[3] = targets[n - 1] = IGNORED
    return tensors, targets


@pytest.mark.parametrize("name", ["chunked", "dense"])
def test_loss_and_gradients_are_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.CHUNK_ELEMENTS, "cpu", 16 * V)  # the last chunk is not whole
    tensors, targets = problem(torch.float64)
    output, weight, bias = tensors
    log_probs = torch.log_softmax(output @ weight.T + bias, 1)
    kept = targets != IGNORED
    expected = -log_probs[kept, targets[kept]].sum()
    found = heads.HEADS[name](output, weight, bias, targets)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if name == "chunked" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    for a, b in zip(
        torch.autograd.grad(found * 0.3, tensors), torch.autograd.grad(expected * 0.3, tensors), strict=True
    ):
        torch.testing.assert_close(a, b, **tolerance)


def test_bf16_sums_over_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small chunks lose no more than one: with sums in bf16 the bias' gradient would be off by percents."""
    tensors, targets = problem(torch.bfloat16, 4000)
    exact, _ = problem(torch.float32, 4000)
    wanted = torch.autograd.grad(heads.dense(*exact, targets), exact)
    monkeypatch.setitem(heads.CHUNK_ELEMENTS, "cpu", 16 * V)
    found = torch.autograd.grad(heads.chunked(*tensors, targets), tensors)
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_scores_are_of_each_target_and_ignored_ones_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.CHUNK_ELEMENTS, "cpu", 16 * V)
    tensors, targets = problem(torch.float32)
    output, weight, bias = tensors
    with torch.no_grad():
        nll_N, hits_N = heads.score(output, [Level(weight, bias)], targets)
        logits = functional.linear(output, weight, bias)
    torch.testing.assert_close(nll_N.sum(), heads.dense(output, weight, bias, targets).detach())
    assert nll_N[3] == nll_N[-1] == 0
    assert torch.equal(hits_N, logits.argmax(1) == targets)


@pytest.mark.parametrize("n", [2_000, pytest.param(18_000, marks=pytest.mark.slow)])
def test_60k_vocabulary_at_18k_tokens_needs_less_than_300_mb_beside_the_gradients(n: int) -> None:
    """What PyTorch holds at most while loss and gradients are made, beyond inputs and the gradients themselves."""
    from torch.profiler import ProfilerActivity, profile

    width, vocab = 8, 60_000  # a narrow model: only the logits' size is at stake
    output, weight = torch.randn(n, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    bias, targets = torch.zeros(vocab, requires_grad=True), torch.randint(vocab, (n,))

    def peak(head: heads.Head, n: int) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            head(output[:n], weight, bias, targets[:n]).backward()
        held = most = 0
        for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    gradients = 4 * (n * width + vocab * width + vocab)
    assert peak(heads.chunked, n) - 2 * gradients < 300e6
    assert peak(heads.dense, 2_000) > 300e6  # the measure sees what it should


def test_liger_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    tensors, targets = problem(torch.float32)
    with pytest.raises(ConfigError, match=r"chartlm\[gpu\]"):
        heads.liger(*tensors, targets)


@pytest.mark.gpu
def test_liger_is_the_same_loss() -> None:
    pytest.importorskip("liger_kernel")
    tensors, targets = problem(torch.float32)
    tensors, targets = [tensor.detach().cuda().requires_grad_() for tensor in tensors], targets.cuda()
    a, b = heads.liger(*tensors, targets), heads.dense(*tensors, targets)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for x, y in zip(torch.autograd.grad(a, tensors), torch.autograd.grad(b, tensors), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
