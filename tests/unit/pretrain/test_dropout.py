import pytest
import torch

from pretrain.models.dropout import Masks

CPU = torch.device("cpu")


def test_a_lane_draws_the_same_mask_on_any_worker() -> None:
    together = Masks(1, 7, range(8), CPU).per_lane("hidden1", 0.3, 50)
    apart = [Masks(1, 7, range(rank * 4, rank * 4 + 4), CPU).per_lane("hidden1", 0.3, 50) for rank in range(2)]
    assert together is not None
    assert torch.equal(torch.cat(apart), together)
    assert not torch.equal(together[0], together[1])


def test_masks_depend_on_seed_step_and_name() -> None:
    base = Masks(1, 7, [0], CPU).shared("weight0", 0.5, (30, 20))
    for other in (Masks(2, 7, [0], CPU), Masks(1, 8, [0], CPU)):
        assert not torch.equal(base, other.shared("weight0", 0.5, (30, 20)))
    assert not torch.equal(base, Masks(1, 7, [0], CPU).shared("weight1", 0.5, (30, 20)))
    assert torch.equal(base, Masks(1, 7, [5], CPU).shared("weight0", 0.5, (30, 20)))


@pytest.mark.parametrize("p", [0.02, 0.15, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    mask = Masks(3, 1, [0], CPU).shared("weight0", p, (1000, 1000))
    assert mask is not None
    assert float((mask == 0).double().mean()) == pytest.approx(round(256 * p) / 256, abs=2e-3)
    assert float(mask.double().mean()) == pytest.approx(1, abs=0.01)  # expectation is kept


def test_nothing_drops_at_zero_and_scale_multiplies() -> None:
    assert Masks(1, 1, [0], CPU).shared("w", 0.0, (3,)) is None
    assert Masks(1, 1, [0], CPU, scale=0.0).per_lane("w", 0.5, 3) is None
    halved = Masks(1, 1, [0], CPU, scale=0.5).shared("w", 0.5, (100_000,))
    assert halved is not None
    assert float((halved == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
