"""Training speed and memory of Transformer-XL beside the original code.

    .venv/bin/python benchmarks/transformer_xl.py --peer-dir DIR [rounds=3] [steps=4] [key=value…]

DIR is a checkout of kimiyoung/transformer-xl; its masks are made bool, as today's PyTorch refuses bytes, and nothing
else is changed. Both train the published base model (16 layers of 410, dropout 0.1; other sizes by key) with the plain
tied softmax, at segments and memories of 128 and of 512, on the same token ids, `tokens` a step, on all cores. The
original takes the steps of its `train.py`: forward, backward, clipping, Adam. chartlm takes those of its loop: masks,
DeepSpeed's engine at ZeRO-0 (bf16: 1), clipping, AdamW; on a CPU glibc keeps freed memory, as for its workers.

Every side trains in a process of its own, in turns; the first step warms up. First both get the same weights and must
find the same loss on two segments without dropout. Ratios are medians over rounds; memory is the peak of the process.
Where bf16 is computed by the hardware the sides are compared in it, too (the original under autocast); on a GPU the
table has the share of the peak FLOP/s.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from cluster.cli import settle_threads  # noqa: E402

settle_threads()  # as every verb does

import torch  # noqa: E402

from pretrain import heads, optim  # noqa: E402
from pretrain.engine import Engine, EngineConfig, Workers  # noqa: E402
from pretrain.loop import PEAK_FLOPS  # noqa: E402
from pretrain.models.dropout import Masks  # noqa: E402
from pretrain.models.transformer_xl import TransformerXl, TransformerXlConfig  # noqa: E402
from pretrain.streams import Batch  # noqa: E402

DEFAULTS: dict[str, Any] = {"rounds": 3, "steps": 4, "tokens": 4096, "vocab": 32_000, "preset": "xl-base", "layers": 0}
LENGTHS = (128, 512)
DROP = 0.1


def config_of(given: dict[str, Any], length: int, **changes: Any) -> TransformerXlConfig:
    sizes = {"preset": given["preset"], "memory": length, "drop": DROP, "drop_attention": 0.0, **changes}
    return TransformerXlConfig(**sizes | ({"layers": given["layers"]} if given["layers"] else {}))


def lanes_of(given: dict[str, Any], length: int) -> int:
    return max(int(given["tokens"]) // length, 1)


def text_of(given: dict[str, Any], length: int, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets [lanes, length]."""
    made = torch.Generator().manual_seed(step)
    tokens = torch.randint(given["vocab"], (lanes_of(given, length), length + 1), generator=made).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def original(place: str, given: dict[str, Any], config: TransformerXlConfig, length: int) -> Any:
    """The peer's model."""
    folder = Path(place) / "pytorch"
    sys.path[1:1] = [str(folder), str(folder / "utils")]
    torch.version.cuda = torch.version.cuda or "0.0"  # it asks for the number where there is no GPU, too
    module = types.ModuleType("mem_transformer")
    source = (folder / "mem_transformer.py").read_text().replace(".byte()", ".bool()")
    exec(compile(source, "mem_transformer.py", "exec"), module.__dict__)
    return module.MemTransformerLM(
        *(given["vocab"], config.layers, config.heads, config.width, config.head_width, config.inner),
        **{"dropout": config.drop, "dropatt": 0.0, "tgt_len": length, "ext_len": 0, "mem_len": length},
    )


def hand_over(ours: TransformerXl, theirs: Any) -> None:
    """Gives the peer our weights."""
    found = {"r_w_bias": ours.content_bias, "r_r_bias": ours.position_bias}
    found |= {"word_emb.emb_layers.0.weight": ours.embedding.weights[0]}
    found |= {"crit.out_layers.0.weight": ours.embedding.weights[0], "crit.out_layers.0.bias": ours.embedding.bias[0]}
    for index, layer in enumerate(ours.layers):
        of = f"layers.{index}."
        found[of + "dec_attn.qkv_net.weight"] = torch.cat([layer.query, layer.key_value])
        found |= {of + "dec_attn.r_net.weight": layer.distance, of + "dec_attn.o_net.weight": layer.out}
        for kind in ("weight", "bias"):
            for name, module in (
                ("dec_attn.layer_norm", layer.norm_attention),
                ("pos_ff.CoreNet.0", layer.feed_in),
                ("pos_ff.CoreNet.3", layer.feed_out),
                ("pos_ff.layer_norm", layer.norm_feed),
            ):
                found[f"{of}{name}.{kind}"] = getattr(module, kind)
    left = theirs.load_state_dict(found, strict=False)
    assert left.missing_keys == ["pos_emb.inv_freq"]
    assert not left.unexpected_keys


def check(place: str, given: dict[str, Any]) -> float:
    """Largest relative difference of the two losses of two segments, in fp64, of a model of two layers."""
    small = given | {"tokens": 48, "vocab": 500}
    config = config_of(small, 24, layers=2, init_std=0.1)
    ours, theirs = TransformerXl(config, 500).double(), original(place, small, config, 24).double()
    hand_over(ours, theirs)
    theirs.eval()
    carry, memory, worst = ours.initial_carry(2), [], 0.0
    with torch.no_grad():
        for step in range(2):
            tokens_BT, targets_BT = text_of(small, 24, step, torch.device("cpu"))
            hidden, carry = ours(tokens_BT, carry, None)
            a = heads.chunked(hidden.output_BTE.flatten(0, 1), *ours.softmax()[0][:2], targets_BT.flatten()) / 48
            loss, *memory = theirs(tokens_BT.T.contiguous(), targets_BT.T.contiguous(), *memory)
            worst = max(worst, abs(a / loss.mean() - 1).item())
    return worst


def ours_steps(given: dict[str, Any], length: int, precision: str) -> Callable[[int], None]:
    workers = Workers(600)
    torch.manual_seed(1)
    told, lanes = optim.OptimConfig(schedule="cosine", lr=2.5e-4), range(lanes_of(given, length))
    model = TransformerXl(config_of(given, length), given["vocab"])
    stage = 0 if precision == "fp32" else 1  # one worker has nobody to share with, but bf16 needs the fp32 weights
    settings = EngineConfig(zero_stage=stage, precision=precision, timeout_seconds=600)
    engine = Engine(model, lambda m: optim.build(m, told), settings, workers, len(lanes), 0.25)
    carry = engine.initial_carry(len(lanes))

    def step(number: int) -> None:
        nonlocal carry
        batch = Batch(*text_of(given, length, number, workers.device))
        masks = Masks(1, number, lanes, workers.device)
        nll, carry = engine.forward_backward(batch, carry, masks, batch.targets_BT.numel())
        workers.total(nll)
        engine.update(optim.knobs(number, 10_000, told))

    return step


def their_steps(place: str, given: dict[str, Any], length: int, precision: str) -> Callable[[int], None]:
    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = original(place, given, config_of(given, length), length).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-4)
    memory: list[torch.Tensor] = []

    def step(number: int) -> None:
        nonlocal memory
        tokens_BT, targets_BT = text_of(given, length, number, device)
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss, *memory = model(tokens_BT.T.contiguous(), targets_BT.T.contiguous(), *memory)
            loss = loss.float().mean()
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    return step


def side(name: str, place: str, given: dict[str, Any], length: int) -> dict[str, float]:
    """Trains one side in this process: tokens a second and peak memory."""
    who, precision = name.split()
    ours = who == "chartlm"
    step = ours_steps(given, length, precision) if ours else their_steps(place, given, length, precision)
    on_gpu = torch.cuda.is_available()
    for number in range(given["steps"] + 2):
        if number == 2:
            begun = time.perf_counter()
        step(number)
        if on_gpu:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mib = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else kib / 2**10
    rate = given["steps"] * lanes_of(given, length) * length / seconds
    return {"tokens_per_s": rate, "peak_mib": peak_mib}


def fast_bf16() -> bool:
    """Whether bf16 is computed by the hardware: a GPU, or a CPU with AMX."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()


def main() -> None:
    """Prints a table, and as the last line one JSON object."""
    words, given = sys.argv[1:], dict(DEFAULTS)
    for word in words:
        key, _, value = word.partition("=")
        if value and key in DEFAULTS:
            given[key] = type(DEFAULTS[key])(value)
    if "--peer-dir" not in words:
        sys.exit(str(__doc__).split("\n\n")[1].strip())
    place = words[words.index("--peer-dir") + 1]
    if "--side" in words:
        at = words.index("--side")
        print(json.dumps(side(words[at + 1], place, given, int(words[at + 2]))))
        return
    print(f"largest difference of losses with the same weights: {check(place, given):.1e}", flush=True)
    names = ["chartlm fp32", "original fp32"] + (["chartlm bf16", "original bf16"] if fast_bf16() else [])
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(given["rounds"]):
        for length in LENGTHS:
            for name in names:
                command = [sys.executable, __file__, *words, "--side", name, str(length)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name} at {length}: {done.stderr[-1500:]}")
                found.setdefault((name, length), []).append(json.loads(done.stdout.splitlines()[-1]))

    def median(name: str, length: int, key: str) -> float:
        return statistics.median(one[key] for one in found[name, length])

    model = TransformerXl(config_of(given, 128), given["vocab"])
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in kind), None)
    for (name, length), _ in found.items():
        rate = median(name, length, "tokens_per_s")
        model.config = config_of(given, length)
        share = (
            f", {model.flops(length) * rate / peak:.1%} of peak"
            if peak
            else f", {model.flops(length) * rate / 1e9:,.0f} GFLOP/s"
        )
        print(f"{name:14} {length:4} {rate:9,.0f} tokens/s {median(name, length, 'peak_mib'):8,.0f} MiB{share}")
    result: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        for length in LENGTHS:
            if (f"chartlm {precision}", length) in found:
                pairs = zip(found[f"chartlm {precision}", length], found["original fp32", length], strict=True)
                result[f"speedup_{precision}_{length}"] = statistics.median(
                    a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs
                )
    for length in LENGTHS:
        result[f"memory_ratio_{length}"] = median("chartlm fp32", length, "peak_mib") / median(
            "original fp32", length, "peak_mib"
        )
    best = names[-2]
    result["tokens_per_s"] = median(best, LENGTHS[0], "tokens_per_s")
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in (result | given).items()}))


if __name__ == "__main__":
    main()
