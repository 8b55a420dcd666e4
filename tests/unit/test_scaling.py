"""The arithmetic of benchmarks/scaling.py: what messages cost and how efficiency follows."""

from typing import Any

import pytest

from benchmarks import scaling

STEP = [("all_reduce", 2.0e6), ("all_reduce", 8.0), ("all_gather", 2.0e6)]  # of a million parameters in bf16
LINKS = scaling.Links(nvlink=300e9, network=25e9, latency=10e-6)


def rows(model: str, scaled: str, **given: Any) -> list[dict[str, Any]]:
    made = scaling.modelled(scaling.DEFAULTS | given, STEP, 1e6)
    return [row for row in made if (row["model"], row["scaling"]) == (model, scaled)]


@pytest.mark.parametrize("kind", scaling.PASSES)
def test_one_worker_sends_nothing(kind: str) -> None:
    assert scaling.collective(kind, 1, 1e9, 1e9, 1e-3) == 0
    assert scaling.communication(1, [(kind, 1e9)], LINKS) == 0


def test_a_ring() -> None:
    # 8 workers, 80 bytes at 10 bytes/s: 7 hops of a part of 10 bytes, a second each, and half a second of latency
    assert scaling.collective("all_gather", 8, 80, 10, 0.5) == pytest.approx(7 * 1.5)
    assert scaling.collective("reduce_scatter", 8, 80, 10, 0.5) == pytest.approx(7 * 1.5)
    assert scaling.collective("all_reduce", 8, 80, 10, 0.5) == pytest.approx(2 * 7 * 1.5)


def test_few_bytes_are_reduced_in_a_logarithm_of_hops() -> None:
    assert scaling.collective("all_reduce", 1024, 8, 1e9, 1e-5) == pytest.approx(10 * (1e-5 + 8e-9))


def test_between_nodes_goes_a_part_of_the_message() -> None:
    inside = scaling.collective("all_gather", 8, 8e6, LINKS.nvlink, LINKS.latency)
    between = scaling.collective("all_gather", 4, 1e6, LINKS.network, LINKS.latency)
    assert scaling.communication(8, [("all_gather", 8e6)], LINKS) == pytest.approx(inside)
    assert scaling.communication(32, [("all_gather", 8e6)], LINKS) == pytest.approx(inside + between)


def test_bytes_sent_are_those_of_the_paper() -> None:
    """arXiv:1910.02054 §7: twice the parameters at ZeRO-1 and 2, three times at ZeRO-3; thrice where an all-reduce
    does the work of a reduce-scatter.
    """
    size = 4.0
    assert scaling.sent([("reduce_scatter", size), ("all_gather", size)]) == scaling.SENT[1] * size
    assert scaling.sent([("all_gather", size)] * 2 + [("reduce_scatter", size)]) == scaling.SENT[3] * size
    assert scaling.sent([("all_reduce", size), ("all_gather", size)]) == 3 * size


def test_a_gpu_computes_its_rate_at_the_lanes_it_is_given_for() -> None:
    assert scaling.compute(64, 70, 200e3, 0.005, 64) == pytest.approx(64 * 70 / 200e3)
    assert scaling.compute(0, 70, 200e3, 0.005, 64) == 0.005


def test_latency_and_bandwidth_are_found_again() -> None:
    pings = [(size, 3e-4 + size / 2e9) for size in (8, 1 << 16, 1 << 24)]
    assert scaling.fitted(pings) == pytest.approx((3e-4, 2e9))


def test_a_transfer_is_the_time_of_the_worker_that_came_last() -> None:
    answers = [{"calls": [["all_reduce", 8, 0.5], ["all_gather", 16, 0.1]]}]
    answers += [{"calls": [["all_reduce", 8, 0.2], ["all_gather", 16, 0.3]]}]
    assert scaling.transfers(answers) == [(8, 0.2), (16, 0.1)]


@pytest.mark.parametrize("model", scaling.MODELLED)
@pytest.mark.parametrize("scaled", ["weak", "strong"])
def test_efficiency_falls_with_gpus_and_overlap_helps(model: str, scaled: str) -> None:
    made = rows(model, scaled)
    assert [row["gpus"] for row in made] == scaling.GPUS
    without, overlapped = zip(*(row["efficiency"] for row in made), strict=True)
    assert list(without) == sorted(without, reverse=True)
    assert all(0 < a < b <= 1 + 1e-9 for a, b in zip(without, overlapped, strict=True))
    assert [row["communication"] for row in made] == sorted(row["communication"] for row in made)


def test_lanes_grow_or_stay() -> None:
    assert [row["lanes"] for row in rows("awd", "weak")] == [64 * gpus for gpus in scaling.GPUS]
    assert {row["lanes"] for row in rows("awd", "strong")} == {4096}


def test_without_anything_to_send_nothing_is_lost() -> None:
    made = scaling.modelled(scaling.DEFAULTS | {"fixed_ms": 0.0}, [], 1e6)
    assert all(row["efficiency"] == pytest.approx([1, 1]) for row in made)


def test_a_slower_network_costs() -> None:
    for fast, slow in zip(rows("xl", "weak"), rows("xl", "weak", network_gb_s=2.5), strict=True):
        assert slow["efficiency"][0] < fast["efficiency"][0] or fast["gpus"] == 8
