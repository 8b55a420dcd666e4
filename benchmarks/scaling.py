"""How training scales: two workers measured here and, by a model of their messages, up to 1,024 GPUs.

    .venv/bin/python benchmarks/scaling.py corpus=SHARDS [rounds=3] [steps=8] [png=FILE] [key=value…]

Measured: tokens/s of whole steps of chartlm's loop (streams, masks, DeepSpeed's engine at ZeRO-1, clipping, AdamW) by
one worker and by two over gloo, with as many lanes in all (strong scaling) and with as many a worker (weak). A worker
has one thread, so that the second brings a core as a second GPU would: one worker on both cores would leave nothing to
gain. Two that train side by side without a word to each other (`1_beside`) show what the machine allows. The sides
take turns in every round, the first round warms up, numbers are medians over rounds. Every collective is timed, its
message counted. `communication_share` includes waiting for the slower peer; per call, the time of the worker that came
last is the transfer alone. A ping of all_reduce in every round gives latency and bandwidth; what they predict for the
counted messages is set beside the transfer.

Modelled: the bf16 messages of a step, grown with the parameters, over nodes of eight GPUs. What is assumed is printed;
other numbers by key. The same model is set beside what NVIDIA measured on 8 and on 128 GPUs.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as every verb does, before torch comes
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
from matplotlib import pyplot

from pretrain import optim
from pretrain.engine import Engine, EngineConfig, Workers
from pretrain.models import MODELS
from pretrain.models.awd_lstm import AwdLstmConfig
from pretrain.models.dropout import Masks
from pretrain.models.transformer_xl import TransformerXlConfig
from pretrain.plot import COLOURS  # it has Matplotlib draw without a screen
from pretrain.streams import Prefetch, Streams, lanes_of
from sharding.shards import Corpus

MEASURED = {"corpus": "", "rounds": 3, "steps": 8, "png": "", "lanes": 32, "bptt": 70, "embedding": 128, "hidden": 256}
# Not measured here. Rates are high on purpose: the faster a GPU, the more its communication weighs.
ASSUMED = {"tokens_per_s_gpu_awd": 200e3, "tokens_per_s_gpu_xl": 150e3, "fixed_ms": 5.0, "vocab": 32_000}
ASSUMED |= {"nvlink_gb_s": 300.0, "network_gb_s": 25.0, "latency_us": 10.0, "lanes_gpu": 64, "lanes_strong": 4096}
DEFAULTS: dict[str, Any] = MEASURED | ASSUMED
MODELLED = {  # tokens of a segment and the published sizes
    "awd": ("AWD-LSTM classic", 70, AwdLstmConfig(preset="awd-classic")),
    "xl": ("Transformer-XL base", 150, TransformerXlConfig(preset="xl-base")),
}
GPUS = [8, 16, 32, 64, 128, 256, 512, 1024]
PING_BYTES = [8] * 30 + [1 << 16] * 30 + [1 << 20] * 20 + [4 << 20] * 20 + [16 << 20] * 10
SENT = {1: 2, 2: 2, 3: 3}  # by theory, in sizes of the parameters, a step at a ZeRO stage: arXiv:1910.02054 §7
PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1, "broadcast": 1}  # round the ring
NAMES = {kind: kind for kind in PASSES} | {"all_gather_into_tensor": "all_gather", "all_gather_single": "all_gather"}
NAMES |= {"reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_single": "reduce_scatter"}
NOTES = """
bf16 weights and gradients; links are a GPU's own, each way, and reached; no GPU is late; a GPU's rate is that of
lanes_gpu lanes, and fixed_ms of a step stay however few they are. At ZeRO-1 chartlm's engine overlaps nothing: of two
numbers the first is what it does. How well a larger batch learns is not asked."""
Messages = list[tuple[str, float]]  # kind and bytes of every collective of a step
# Bytes/s of a GPU each way inside a node and outside, seconds of a hop, GPUs of a node.
Links = collections.namedtuple("Links", "nvlink network latency node", defaults=[8])
# NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/Transformer-XL/README.md, fp16, weak scaling: GPUs before and
# after, parameters, tokens a step and GPU, tokens/s before and after; links by the data sheets of DGX A100 and DGX-2H.
PUBLISHED = {
    "xl_base_8_a100": (1, 8, 192e6, 32 * 192, 59_961, 449_890, Links(300e9, 25e9, 10e-6)),
    "xl_large_128_v100": (16, 128, 257e6, 4 * 384, 154_950, 1_189_700, Links(150e9, 6.25e9, 10e-6, 16)),
}


def collective(kind: str, workers: int, size: float, bandwidth: float, latency: float) -> float:
    """Seconds in a ring of p workers: (p-1)/p · bytes / bandwidth + (p-1) · latency, for an all-reduce twice that; an
    all-reduce of few bytes is sooner done by recursive doubling: log2 p · (latency + bytes / bandwidth)
    (Thakur, Rabenseifner, Gropp 2005, Optimization of Collective Communication Operations in MPICH, §4).
    """
    ring = PASSES[kind] * (workers - 1) * (size / workers / bandwidth + latency)
    doubling = math.ceil(math.log2(workers)) * (latency + size / bandwidth)
    return min(ring, doubling) if kind == "all_reduce" else ring


def communication(gpus: int, step: Messages, links: Links) -> float:
    """Seconds of all collectives of a step, one after the other. The GPUs of a node exchange over NVLink, and those of
    one place in all nodes over the network their part of the message, each on its own link.
    """
    inside, total = min(gpus, links.node), 0.0
    for kind, size in step:
        total += collective(kind, inside, size, links.nvlink, links.latency)
        total += collective(kind, gpus // inside, size / inside, links.network, links.latency)
    return total


def compute(lanes: float, length: int, tokens_per_s: float, fixed: float, full: int) -> float:
    """Seconds of a step's work: `fixed` (launching kernels), the rest with the lanes, `full` giving `tokens_per_s`."""
    return fixed + lanes / full * (full * length / tokens_per_s - fixed)


def sent(step: Messages) -> float:
    """Bytes that one of many workers sends in a step."""
    return sum(PASSES[kind] * size for kind, size in step)


def fitted(pings: list[tuple[float, float]]) -> tuple[float, float]:
    """(latency, bandwidth) from (bytes, seconds) of all_reduce between two, by least squares of relative errors."""
    sizes, seconds = np.array(pings).T
    (latency, inverse), *_ = np.linalg.lstsq(np.stack([1 / seconds, sizes / seconds], 1), np.ones(len(sizes)))
    return float(latency), float(1 / inverse)


def modelled(given: dict[str, Any], step: Messages, measured: float) -> list[dict[str, Any]]:
    """A row for every model, way of scaling and number of GPUs, from a step of `measured` parameters. Pairs are without
    overlap and with full overlap. Efficiency is tokens/s as a share of so many times those of one GPU, which has as
    many lanes as each of them (weak) or all lanes (strong).
    """
    links = Links(given["nvlink_gb_s"] * 1e9, given["network_gb_s"] * 1e9, given["latency_us"] / 1e6)
    rows = []
    for name, (_, length, config) in MODELLED.items():
        with torch.device("meta"):
            parameters = sum(one.numel() for one in MODELS[config.name](config, given["vocab"]).parameters())
        messages = [(kind, size * parameters / measured) for kind, size in step]
        of_gpu = (length, given[f"tokens_per_s_gpu_{name}"], given["fixed_ms"] / 1e3, given["lanes_gpu"])
        for scaling, gpus in itertools.product(("weak", "strong"), GPUS):
            lanes = given["lanes_gpu"] * gpus if scaling == "weak" else given["lanes_strong"]
            alone = given["lanes_gpu"] if scaling == "weak" else lanes
            busy, sending = compute(lanes / gpus, *of_gpu), communication(gpus, messages, links)
            rates = [lanes * length / seconds for seconds in (busy + sending, max(busy, sending))]
            shares = [rate / gpus / (alone * length / compute(alone, *of_gpu)) for rate in rates]
            row = {"model": name, "scaling": scaling, "gpus": gpus, "lanes": lanes, "tokens_per_s": rates}
            rows.append(row | {"efficiency": shares, "communication": sending / (busy + sending)})
    return rows


def count_collectives(made: list[tuple[str, int, float]]) -> None:
    """From now on torch.distributed adds (kind, bytes, seconds) of every collective to `made`. What returns before it
    is done is waited for: only ZeRO-3, whose time is not measured, would go on meanwhile.
    """
    within: list[str] = []

    def call(kind: str, original: Any, *args: Any, **named: Any) -> Any:
        if within:  # one collective made of another
            return original(*args, **named)
        within.append(kind)
        begun = time.perf_counter()
        work = original(*args, **named)
        if work is not None:
            work.wait()
        seconds = time.perf_counter() - begun
        given = [value if isinstance(value, list) else [value] for value in (*args, *named.values())]
        message = max(sum(one.nbytes for one in several if torch.is_tensor(one)) for several in given)
        made.append((within.pop(), message, seconds))
        return work

    for name, kind in NAMES.items():
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, partial(call, kind, getattr(module, name)))


def training(given: dict[str, Any], workers: Workers, lanes: int, stage: Any, precision: Any) -> Any:
    """(what trains so many steps of this worker's share of the lanes, parameters)."""
    torch.manual_seed(1)
    corpus, told, at = Corpus.open(given["corpus"]), optim.OptimConfig(), itertools.count()
    settings = AwdLstmConfig(embedding=given["embedding"], hidden=given["hidden"], layers=3)
    config = EngineConfig(zero_stage=stage, precision=precision, timeout_seconds=600, whole_below=0)
    module = MODELS["awd-lstm"](settings, corpus.vocab_size)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    engine = Engine(module, lambda m: optim.build(m, told), config, workers, lanes, 0.25)
    mine = lanes_of(workers.rank, workers.world, lanes)
    streams = Streams(corpus.split("train"), lanes, given["bptt"], 1)
    batches, carry = Prefetch(streams, mine, workers.device), engine.initial_carry(len(mine))

    def train(steps: int) -> None:
        nonlocal carry
        for step in itertools.islice(at, steps):
            masks, targets = Masks(1, step, mine, workers.device), streams.targets_in(step)
            nll, carry = engine.forward_backward(batches.get(step), carry, masks, targets)
            workers.total(nll)
            engine.update(optim.knobs(step, 10_000, told))

    return train, parameters


def worker(given: dict[str, Any]) -> None:
    """One process: does what a line of stdin tells, (steps, side), and answers by a line of stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    made: list[tuple[str, int, float]] = []
    count_collectives(made)  # before DeepSpeed, which keeps some of the functions
    workers = Workers(600)
    sides: dict[Any, Any] = {(): (lambda _: [dist.all_reduce(torch.ones(size // 4)) for size in PING_BYTES], 0)}
    for line in sys.stdin:
        steps, side = json.loads(line)
        if tuple(side) not in sides:
            sides[tuple(side)] = training(given, workers, *side)
        turn, parameters = sides[tuple(side)]
        dist.barrier()
        made.clear()
        begun = time.perf_counter()
        turn(steps)
        answer = {"seconds": time.perf_counter() - begun, "calls": made, "parameters": parameters}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # when Python finalizes, threads of torch's that wait for the interpreter can abort the process


def start(world: int, given: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """Workers that train together, as torchrun would start them. Between turns they wait on their pipes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    env |= {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command, pipe = [sys.executable, __file__, "--worker", json.dumps(given)], subprocess.PIPE
    envs = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [subprocess.Popen(command, env=one, stdin=pipe, stdout=pipe, text=True) for one in envs]


def turn_of(group: list[subprocess.Popen[str]], steps: int, *side: Any) -> list[dict[str, Any]]:
    """Has workers train so many steps of a side (lanes, ZeRO stage, precision), or ping; returns their answers."""
    for one in group:
        print(json.dumps((steps, side)), file=one.stdin, flush=True)
    lines = [one.stdout.readline() for one in group if one.stdout is not None]
    if not all(lines):
        sys.exit("a worker failed; what it said is above")
    return [json.loads(line) for line in lines]


def transfers(answers: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(bytes, seconds) of every collective, on the worker that came to it last and so did not wait."""
    return [(same[0][1], min(call[2] for call in same)) for same in zip(*(a["calls"] for a in answers), strict=True)]


def measured(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[float, Messages]]]:
    """(numbers of the run; by ZeRO stage, bytes of the parameters and the messages of a step)."""
    alone, beside, two = start(1, given), start(1, given), start(2, given)
    lanes, steps, found, rounds = given["lanes"], given["steps"], {}, []
    sides = {"1": (alone, 1, lanes), "1_beside": (alone + beside, 2, lanes)}
    sides |= {"2_strong": (two, 1, lanes), "2_weak": (two, 1, 2 * lanes)}
    for _ in range(given["rounds"] + 1):
        pings, sizes = transfers(turn_of(two, 0)), sorted(set(PING_BYTES))
        latency, bandwidth = fitted([(n, statistics.median(t for size, t in pings if size == n)) for n in sizes])
        numbers = {"gloo_latency_us": latency * 1e6, "gloo_gb_s": bandwidth / 1e9}
        for name, (group, groups, in_all) in sides.items():
            answers = turn_of(group, steps, in_all, 1, "fp32")
            seconds = max(answer["seconds"] for answer in answers)
            numbers[f"tokens_per_s_{name}"] = groups * steps * in_all * given["bptt"] / seconds
            if group != alone:
                numbers[f"speedup_{name}"] = numbers[f"tokens_per_s_{name}"] / numbers["tokens_per_s_1"]
            if group == two:
                kind, transfer = name[2:], sum(t for _, t in transfers(answers)) / steps
                spent = statistics.mean(sum(call[2] for call in answer["calls"]) for answer in answers)
                predicted = sum(collective(of, 2, n, bandwidth, latency) for of, n, _ in answers[0]["calls"]) / steps
                numbers |= {f"communication_share_{kind}": spent / seconds, f"transfer_ms_{kind}": 1e3 * transfer}
                numbers[f"predicted_over_measured_communication_{kind}"] = predicted / transfer
        rounds.append(numbers)
    for stage, precision in ((1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")):
        for _ in range(2):  # ZeRO-3 learns the order of the parameters in its first steps
            answer = turn_of(two, 2, lanes, stage, precision)[0]
        of_step = [(kind, size) for kind, size, _ in answer["calls"][len(answer["calls"]) // 2 :]]
        name, width = (f"zero{stage}", 4) if precision == "fp32" else (f"zero{stage}_{precision}", 2)
        found[name] = answer["parameters"] * width, of_step
    return {key: statistics.median(one[key] for one in rounds[1:]) for key in rounds[0]}, found


def draw(rows: list[dict[str, Any]], given: dict[str, Any]) -> None:
    """Efficiency over GPUs: a band from no overlap to full overlap."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), dpi=120, sharey=True, layout="constrained")
    titles = f"weak: {given['lanes_gpu']:,} lanes a GPU", f"strong: {given['lanes_strong']:,} lanes in all"
    for axes, title in zip(panels, titles, strict=True):
        for (name, (label, *_)), colour in zip(MODELLED.items(), COLOURS, strict=False):
            mine = [row for row in rows if row["model"] == name and title.startswith(row["scaling"])]
            none, full = ([100 * row["efficiency"][i] for row in mine] for i in (0, 1))
            axes.fill_between(GPUS, none, full, color=colour, alpha=0.2, linewidth=0)
            axes.plot(GPUS, none, "o-", color=colour, linewidth=1.4, markersize=4, label=f"{label}, no overlap")
            axes.plot(GPUS, full, "--", color=colour, linewidth=1, label="full overlap")
        axes.set_xscale("log", base=2)
        axes.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
        axes.set(xlabel="GPUs", ylim=(0, 104), title=title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("modelled efficiency (% of GPUs × one GPU)")
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper left", fontsize="small", frameon=False)
    figure.savefig(given["png"], metadata={"Software": None})


def main() -> None:
    """Prints tables, and as the last line one JSON object."""
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if not words.get("corpus") or set(words) - set(DEFAULTS):
        sys.exit(str(__doc__).split("\n\n")[1].strip())
    given = DEFAULTS | {key: type(DEFAULTS[key])(value) for key, value in words.items()}
    result, found = measured(given)
    for key, value in result.items():
        print(f"{key:46} {value:10,.3f}")
    print("\nmessages of a step, bytes (calls)    all_reduce      all_gather  reduce_scatter     sent  theory")
    for name, (size, step) in found.items():
        parts = [[n for of, n in step if of == kind] for kind in ("all_reduce", "all_gather", "reduce_scatter")]
        columns = "".join(f"{f'{sum(part):,.0f} ({len(part)})':>16}" for part in parts)
        print(f"{name:30}{columns} {sent(step) / size:6.2f} × {SENT[int(name[4])]:5} ×")
        result |= {f"bytes_per_step_{name}": sum(map(sum, parts)), f"sent_{name}": sent(step) / size}
    rows = modelled(given, found["zero1_bf16"][1], found["zero1_bf16"][0] / 2)
    print("\nmodel  scaling   GPUs    lanes   tokens/s, no to full overlap        efficiency  communication")
    for row in rows:
        rates, shares = "{:,.0f} to {:,.0f}".format(*row["tokens_per_s"]), "{:.1%} to {:.1%}".format(*row["efficiency"])
        about = f"{row['model']:6} {row['scaling']:6} {row['gpus']:7,} {row['lanes']:8,} {rates:>30} {shares:>17}"
        print(about, f"{row['communication']:13.1%}")
        of = row["model"] if row["scaling"] == "weak" else f"{row['model']}_strong"
        result[f"efficiency_{row['gpus']}_{of}"] = row["efficiency"][0]
    print("\nassumed: " + ", ".join(f"{key}={given[key]:,g}" for key in ASSUMED) + NOTES)
    for name, (before, gpus, parameters, tokens, rate, rate_after, links) in PUBLISHED.items():
        few, many = (communication(p, [("all_reduce", 2 * parameters)], links) for p in (before, gpus))
        true, model = rate_after / rate * before / gpus, 1 / (1 + (many - few) * rate / (tokens * before))
        print(f"{name}: efficiency {true:.1%} as NVIDIA measured; by this model {model:.1%} without overlap")
        result |= {f"published_{name}": true, f"modelled_{name}": model}
    if given["png"]:
        draw(rows, given)
    result |= {key: value for key, value in given.items() if key not in ("corpus", "png")}
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}))


if __name__ == "__main__":
    worker(json.loads(sys.argv[2])) if sys.argv[1:2] == ["--worker"] else main()
