"""What the engine looks at in gradients."""

import math
import subprocess
import sys

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


@pytest.mark.parametrize(
    "opened",
    [
        "import pretrain.engine; pretrain.engine.Workers(60)",
        "import pretrain.run\ntry: pretrain.run.load_trained('nowhere')\nexcept pretrain.run.ConfigError: pass",
    ],
)
def test_a_process_with_a_model_takes_the_least_numbers_for_nothing(opened: str) -> None:
    """So do the threads that it starts, and those of large operations."""
    program = f"""
import threading, torch
torch.set_num_threads(2)
least = lambda numbers=1: print((torch.full((numbers,), 1e-38) * 0.1).max().item())
least()
{opened}
least(1 << 20)
thread = threading.Thread(target=least)
thread.start()
thread.join()
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert float(said[0]) == pytest.approx(1e-39, rel=1e-6, abs=0)
    assert said[1:] == ["0.0", "0.0"]
