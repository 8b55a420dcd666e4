"""What the engine looks at in gradients."""

import math

import pytest
import torch

from pretrain.engine import _squares


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_sum_of_squares_is_exact_over_millions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(size).to(dtype) for size in ((1500, 2001), (4096,), (3,), (0,))]
    wanted = sum(float(gradient.double().square().sum()) for gradient in gradients)
    assert _squares(gradients) == pytest.approx(wanted, rel=1e-5)
    assert _squares([]) == 0
    gradients[0][-1, -1] = math.inf
    assert not math.isfinite(_squares(gradients))
    gradients[0][-1, -1] = math.nan
    assert math.isnan(_squares(gradients))
