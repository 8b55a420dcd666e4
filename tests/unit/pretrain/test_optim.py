import math

import pytest
import torch

from cluster import config
from cluster.errors import ConfigError
from pretrain.models.awd_lstm import AwdLstm, AwdLstmConfig
from pretrain.optim import AVERAGE, SCHEDULES, OptimConfig, build, knobs, no_longer_improves


def rates(steps: int, **values: object) -> list[float]:
    settings = config.validate(OptimConfig, {"lr": 0.1, **values}, "test")
    return [knobs(step, steps, settings).lr for step in range(steps)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_peak_is_reached_and_never_passed(name: str) -> None:
    found = rates(400, schedule=name)
    assert max(found) == pytest.approx(0.1)
    assert all(rate > 0 for rate in found)
    assert found[:100] == sorted(found[:100])


@pytest.mark.parametrize("name", ["one-cycle", "cosine", "linear", "wsd"])
def test_ends_at_the_final_ratio(name: str) -> None:
    found = rates(400, schedule=name, final_lr_ratio=0.01)
    assert found[-1] == pytest.approx(0.001)
    assert found[100:] == sorted(found[100:], reverse=True)


def test_linear_is_half_way_down_half_way() -> None:
    assert rates(400, schedule="linear", final_lr_ratio=0.0)[249] == pytest.approx(0.05)


def test_wsd_is_flat_until_it_falls_as_one_minus_the_root() -> None:
    found = rates(1000, schedule="wsd", warmup=0.1, decay=0.2, final_lr_ratio=0.0)
    assert found[99:800] == pytest.approx([0.1] * 701)
    assert found[849] == pytest.approx(0.1 * (1 - math.sqrt(0.25)))


def test_unknown_schedule_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"optim|schedule"):
        config.validate(OptimConfig, {"schedule": "cosin"}, "r.toml")


def test_one_cycle_lowers_the_momentum_while_the_rate_is_high() -> None:
    settings = OptimConfig(schedule="one-cycle", warmup=0.25, beta1=0.8, beta1_at_peak=0.7)
    found = [knobs(step, 400, settings) for step in range(400)]
    assert [found[at].beta1 for at in (0, 99, 399)] == pytest.approx([0.8, 0.7, 0.8], abs=1e-3)
    assert min(found, key=lambda at: at.beta1 or 0).lr == max(at.lr for at in found)
    assert {knobs(step, 400, OptimConfig(schedule="cosine")).beta1 for step in range(400)} == {0.8}


def test_no_weight_decay_on_vectors() -> None:
    model = AwdLstm(AwdLstmConfig(embedding=4, hidden=4, layers=1), 11)
    matrices, vectors = build(model, OptimConfig(weight_decay=0.3)).param_groups
    assert matrices["weight_decay"] == 0.3
    assert vectors["weight_decay"] == 0.0
    assert all(parameter.dim() == 1 for parameter in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_each_layer_below_the_top_learns_slower() -> None:
    model = AwdLstm(AwdLstmConfig(embedding=4, hidden=4, layers=2), 11)
    groups = build(model, OptimConfig(layer_decay=2.6)).param_groups
    scale_of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert [scale_of[id(layer[0])] for layer in model.layer_groups()] == pytest.approx([2.6**-2, 2.6**-1, 1.0])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([5, 4, 3, 2], False), ([5, 4, 4.5, 4.6], False), ([5, 4, 4.5, 4.6, 4.1], True), ([5, 4, 4.5, 4.6, 3.9], False)],
)
def test_nt_asgd_waits_for_patience_validations_without_a_best(losses: list[float], expected: bool) -> None:
    assert no_longer_improves(losses, patience=3) is expected


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("average", ["ema", "nt-asgd"])
def test_the_average_is_that_of_the_weights_passed_through(name: str, average: str) -> None:
    """NT-ASGD: the mean of all since its trigger; EMA: decays by its rate once as many were seen."""
    settings = OptimConfig(name=name, average=average, ema_decay=0.9, lr=0.1, weight_decay=0.0)  # type: ignore[arg-type]
    weight = torch.nn.Linear(1, 1, bias=False).weight
    optimizer = build(torch.nn.ParameterList([weight]), settings)  # type: ignore[arg-type]
    seen: list[float] = []
    found = 0.0
    for step in range(30):
        told = knobs(step, 30, settings, 12 if average == "nt-asgd" and step >= 12 else None)
        optimizer.param_groups[0]["newest"] = told.newest
        weight.grad = torch.full_like(weight, math.sin(step))
        optimizer.step()
        seen.append(weight.item())
        before, found = found, optimizer.state[weight][AVERAGE].item()
        if average == "nt-asgd":
            expected = sum(seen[12:]) / len(seen[12:]) if step >= 12 else seen[-1]
        else:
            expected = sum(seen) / len(seen) if step < 10 else 0.9 * before + 0.1 * seen[-1]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
