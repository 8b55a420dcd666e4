"""The engine on real DeepSpeed and gloo: every ZeRO stage trains the same, and what is thrown away leaves no trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

LANES, LENGTH, VOCAB, STEPS = 4, 9, 61, 6
BROKEN = 3  # the step whose gradient is thrown away


def batch_of(step: int, lanes: range) -> Any:
    from pretrain.streams import Batch

    tokens = torch.randint(VOCAB, (LANES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return Batch(tokens[lanes.start : lanes.stop, :-1], tokens[lanes.start : lanes.stop, 1:])


def run(out: str, stage: int, ways: list[tuple[str, int]]) -> None:
    """Trains a few steps in each of the ways (what happens, accumulation); the first worker writes what came out."""
    from pretrain.engine import Workers

    torch.set_num_threads(1)
    workers = Workers(60)
    found = {f"{how}/{groups}": trained(workers, stage, how, groups) for how, groups in ways}
    if workers.first:
        Path(out).write_text(json.dumps(found))
    workers.close()


def trained(workers: Any, stage: int, how: str, accumulation: int, lr: float = 1e-2) -> dict[str, Any]:
    """Losses and norms of every step, a weighted sum of every tensor, and scores of the trained model."""
    from pretrain import optim
    from pretrain.engine import Engine, EngineConfig
    from pretrain.models import MODELS
    from pretrain.models.dropout import Masks
    from pretrain.streams import lanes_of

    torch.manual_seed(1)
    kind = MODELS["awd-lstm"]
    model = kind(kind.Config(embedding=13, hidden=17, layers=2), VOCAB)
    lanes = lanes_of(workers.rank, workers.world, LANES)
    config = EngineConfig(zero_stage=stage, accumulation=accumulation, whole_below=0, timeout_seconds=60)
    engine = Engine(model, lambda m: optim.build(m, optim.OptimConfig()), config, workers, LANES, clip=0.25)
    carry, said = engine.initial_carry(len(lanes)), []
    for step in range(STEPS):
        if how == "without" and step == BROKEN:
            continue
        batch = batch_of(step, lanes)
        masks = Masks(1, step, lanes, workers.device)
        nll, after = engine.forward_backward(batch, carry, masks, LANES * LENGTH)
        if how in ("discard", "gradient") and step == BROKEN:
            if how == "discard":
                engine.discard()
            else:
                spoil(engine)
                assert engine.update(optim.Knobs(lr)) == (float("inf"), False)
            continue
        norm, applied = engine.update(optim.Knobs(lr))
        assert applied
        carry = after
        said.append([*workers.total(nll), norm])
    parts = {f"{name}/{key}": 0.0 for name in engine.shapes() for key in ("parameter", "exp_avg", "exp_avg_sq")}
    for name, key, start, part in engine.parts():
        parts[f"{name}/{key}"] += (part.double() * torch.arange(start + 1, start + 1 + part.numel())).sum().item()
    sums = dict(zip(parts, workers.total(*parts.values()), strict=True))
    nll_N, hits_N, _ = engine.score(batch_of(99, lanes), engine.initial_carry(len(lanes)))
    scores = workers.total(nll_N.double().sum(), hits_N.double().sum())
    return {"steps": said, "sums": sums, "scores": scores}


def spoil(engine: Any) -> None:
    """Makes the gradient of one worker's last weight infinite, where DeepSpeed keeps it."""
    stage, optimizer = engine.config.zero_stage, engine._deepspeed.optimizer
    if stage == 0:  # every worker holds all of it
        next(engine.model.parameters()).grad.view(-1)[0] = float("inf")
    elif engine.workers.rank == 0:
        optimizer.averaged_gradients[0][0].view(-1)[0] = float("inf")


def result(folder: Path, world: int, stage: int, ways: list[tuple[str, int]]) -> dict[str, Any]:
    run_on_ranks(world, run, str(folder / "out.json"), stage, ways)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = result(tmp_path_factory.mktemp("alone"), 1, 0, [("plain", 1)])["plain/1"]
    return found


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    for x, y in zip(a["steps"], b["steps"], strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    assert a["scores"] == pytest.approx(b["scores"], rel=1e-5)
    assert a["sums"].keys() == b["sums"].keys()
    for name, value in a["sums"].items():
        assert b["sums"][name] == pytest.approx(value, rel=1e-3, abs=1e-2), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_the_same_and_what_is_thrown_away_leaves_no_trace(
    tmp_path: Path, alone: dict[str, Any], stage: int
) -> None:
    """Two workers as one, however their lanes are cut; a step whose gradient is discarded, or not finite, is as if it
    had never been, to the last bit.
    """
    ways = [("plain", 1), ("plain", 2), ("discard", 2), ("without", 2), ("gradient", 1), ("without", 1)]
    found = result(tmp_path, 2, stage, ways)
    assert_close(alone, found["plain/1"])
    assert_close(alone, found["plain/2"])
    assert found["discard/2"] == found["without/2"]
    assert found["gradient/1"] == found["without/1"]
    assert found["without/1"]["steps"] != found["plain/1"]["steps"][:-1]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_workers_with_unequal_lanes_train_the_same(tmp_path: Path, alone: dict[str, Any], stage: int) -> None:
    """Three workers with 1, 1 and 2 of 4 lanes."""
    assert_close(alone, result(tmp_path, 3, stage, [("plain", 1)])["plain/1"])


def averaging(out: str, stage: int) -> None:
    """Trains with averages of the weights; writes, of every optimizer, what `averaged` gives."""
    from pretrain.engine import Workers

    torch.set_num_threads(1)
    workers = Workers(60)
    found = {name: with_average(workers, stage, name) for name in ("adamw", "sgd")}
    if workers.first:
        Path(out).write_text(json.dumps(found))
    workers.close()


def with_average(workers: Any, stage: int, name: str) -> dict[str, Any]:
    from pretrain import optim
    from pretrain.engine import Engine, EngineConfig
    from pretrain.models import MODELS
    from pretrain.models.dropout import Masks
    from pretrain.streams import lanes_of

    kind = MODELS["awd-lstm"]
    lanes = lanes_of(workers.rank, workers.world, LANES)
    config = EngineConfig(zero_stage=stage, whole_below=0, timeout_seconds=60)
    told = optim.OptimConfig(name=name, average="nt-asgd", layer_decay=2.6, lr=0.5 if name == "sgd" else 1e-2)

    def made() -> Engine:
        torch.manual_seed(1)
        model = kind(kind.Config(embedding=13, hidden=17, layers=2), VOCAB)
        return Engine(model, lambda m: optim.build(m, told), config, workers, LANES, clip=0.25)

    def score(engine: Engine) -> list[float]:
        nll_N, _, _ = engine.score(batch_of(99, lanes), engine.initial_carry(len(lanes)))
        return workers.total(nll_N.double().sum())

    def sums(engine: Engine, key: str) -> list[float]:
        """A weighted sum of every parameter (or of the average of it) over all workers."""
        found = dict.fromkeys(engine.shapes(), 0.0)
        for parameter, kind_of, start, part in engine.parts():
            if kind_of == key:
                weights = torch.arange(start + 1, start + 1 + part.numel())
                found[parameter] += (part.double() * weights).sum().item()
        return workers.total(*found.values())

    engine, carry, since = made(), None, []
    for step in range(STEPS):
        carry = carry or engine.initial_carry(len(lanes))
        masks = Masks(1, step, lanes, workers.device)
        _, carry = engine.forward_backward(batch_of(step, lanes), carry, masks, LANES * LENGTH)
        engine.update(optim.knobs(step, STEPS, told, 2 if step >= 2 else None))
        if step >= 2:
            since.append(sums(engine, "parameter"))
    average, newest = sums(engine, "average"), score(engine)
    for found, *passed in zip(average, *since, strict=True):
        assert found == pytest.approx(sum(passed) / len(passed), rel=1e-3, abs=1e-3)
    with engine.averaged():
        of_average = score(engine)
        assert sums(engine, "parameter") == average
    assert score(engine) == newest  # to the last bit
    assert of_average != newest
    return {"newest": newest, "average": of_average, "sums": average}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_average_of_the_weights_is_kept_in_every_stage(tmp_path: Path, stage: int) -> None:
    """Two workers as one at ZeRO-0; `averaged` computes with the mean of the weights, and leaves no trace."""
    run_on_ranks(1, averaging, str(tmp_path / "alone.json"), 0)
    run_on_ranks(2, averaging, str(tmp_path / "two.json"), stage)
    alone, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "two"))
    for name, numbers in alone.items():
        for key, value in numbers.items():
            assert two[name][key] == pytest.approx(value, rel=1e-4, abs=1e-3), f"{name} {key}"
