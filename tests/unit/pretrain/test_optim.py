import pytest

from cluster import config
from cluster.errors import ConfigError
from pretrain.optim import SCHEDULES, OptimConfig, build, learning_rate


@pytest.mark.parametrize("name", SCHEDULES)
def test_peak_is_reached_and_never_passed(name: str) -> None:
    settings = OptimConfig(lr=0.1, schedule=name, warmup=0.25)
    rates = [learning_rate(step, 400, settings) for step in range(400)]
    assert max(rates) == pytest.approx(0.1)
    assert all(rate > 0 for rate in rates)
    assert rates[:100] == sorted(rates[:100])


@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
def test_ends_at_the_final_ratio(name: str) -> None:
    settings = OptimConfig(lr=0.1, schedule=name, final_lr_ratio=0.01)
    assert learning_rate(399, 400, settings) == pytest.approx(0.001)


def test_unknown_schedule_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"optim|schedule"):
        config.validate(OptimConfig, {"schedule": "cosin"}, "r.toml")


def test_no_weight_decay_on_vectors() -> None:
    from pretrain.models.awd_lstm import AwdLstm, AwdLstmConfig

    model = AwdLstm(AwdLstmConfig(embedding=4, hidden=4, layers=1), 11)
    matrices, vectors = build(model, OptimConfig(weight_decay=0.3)).param_groups
    assert matrices["weight_decay"] == 0.3
    assert vectors["weight_decay"] == 0.0
    assert all(parameter.dim() == 1 for parameter in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
