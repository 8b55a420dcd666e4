"""What numbers below the least normal one cost a training step on a CPU.

    .venv/bin/python benchmarks/denormals.py run=RUN corpus=SHARDS [rounds=5] [steps=4] [lanes=32] [bptt=64]

RUN is a Transformer-XL that was trained for a while: with first weights attention is not sharp, and there are none. The
same model goes on in one process, by turns as chartlm's workers calculate and as PyTorch does where nobody sets it, in
fp32 and, where the processor multiplies bf16, in bf16. One thread: one that was started before would keep its mode.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

BESIDE = sys.path[0]
sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(BESIDE)

import torch  # noqa: E402
from given import given  # noqa: E402

from pretrain import optim  # noqa: E402
from pretrain.engine import Engine, EngineConfig, Workers  # noqa: E402
from pretrain.models.dropout import Masks  # noqa: E402
from pretrain.run import load_trained  # noqa: E402
from pretrain.streams import Streams  # noqa: E402
from sharding.shards import Corpus  # noqa: E402


def main() -> None:
    """Prints a line for every precision, and as the last line one JSON object."""
    asked = given({"run": "", "corpus": "", "rounds": 5, "steps": 4, "lanes": 32, "bptt": 64}, "run", str(__doc__))
    torch.set_num_threads(1)
    workers, lanes = Workers(600), range(asked["lanes"])
    corpus = Corpus.open(asked["corpus"])
    streams = Streams(corpus.split("train"), asked["lanes"], asked["bptt"], 1)
    line: dict[str, float] = {}
    for precision in ("fp32", "bf16") if torch.cpu._is_amx_tile_supported() else ("fp32",):
        told = optim.OptimConfig(lr=1e-4)
        config = EngineConfig(zero_stage=1, precision=precision, timeout_seconds=600)
        module = load_trained(asked["run"]).model.requires_grad_(True)
        engine = Engine(module, lambda m, told=told: optim.build(m, told), config, workers, asked["lanes"], 0.25)
        carry, at, seconds = engine.initial_carry(asked["lanes"]), 0, {True: [], False: []}
        for number in range(asked["rounds"] + 1):
            for flushed, took in seconds.items():
                torch.set_flush_denormal(flushed)
                begun = time.perf_counter()
                for _ in range(asked["steps"]):
                    batch = streams.batch(at, lanes)
                    masks = Masks(1, at, lanes, workers.device)
                    _, carry = engine.forward_backward(batch, carry, masks, streams.targets_in(at))
                    engine.update(optim.knobs(at, 10_000, told))
                    at += 1
                if number:
                    took.append(time.perf_counter() - begun)
        tokens = asked["steps"] * asked["lanes"] * asked["bptt"]
        rates = {flushed: tokens / statistics.median(took) for flushed, took in seconds.items()}
        ratio = statistics.median(a / b for a, b in zip(seconds[False], seconds[True], strict=True))
        print(f"{precision}: {rates[True]:,.0f} tokens/s, with them {rates[False]:,.0f}; {ratio:.2f} times")
        line |= {f"speedup_{precision}": round(ratio, 3), f"tokens_per_s_{precision}": round(rates[True])}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
