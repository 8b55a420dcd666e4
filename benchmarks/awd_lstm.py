"""Training speed of AWD-LSTM beside fastai's and Salesforce's, in one process.

    PYTHON benchmarks/awd_lstm.py --peer-fastai [--peer-salesforce DIR] corpus=SHARDS [rounds=5] [key=value…]

PYTHON has chartlm's packages and fastai 2.8.12 (pip install --no-deps, for it asks for an older torch: fastai,
fastcore, fastprogress, fasttransform, fastdownload, plum-dispatch, beartype, python-fasthtml, cloudpickle); DIR is a
checkout of salesforce/awd-lstm-lm. All read the same token ids with the same sizes, lanes, bptt and dropouts, on all
cores; the sizes are the published ones unless given. A round trains `steps` steps of each in turn; the first round
warms up. chartlm takes whole steps of its loop: streams, masks, DeepSpeed's engine (ZeRO-0 in fp32, ZeRO-1 in bf16),
clipping, AdamW. fastai trains by `Learner.fit_one_cycle` on its own `LMDataLoader`; Salesforce by what its `train()`
does in a step, with full softmax and Adam. On a CPU chartlm has glibc keep freed memory; the peers' turns run under
glibc's own limits (those it settles at by itself). Ratios are medians over rounds. Weight drop's overhead is that of
chartlm's step with drop_weight=0.2 over the one with 0, the plain fused LSTM.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from cluster.cli import settle_threads  # noqa: E402

settle_threads()  # as every verb does

import torch  # noqa: E402

from cluster import memory  # noqa: E402
from pretrain import optim  # noqa: E402
from pretrain.engine import Engine, EngineConfig, Workers  # noqa: E402
from pretrain.models import MODELS  # noqa: E402
from pretrain.models.awd_lstm import AwdLstmConfig  # noqa: E402
from pretrain.models.dropout import Masks  # noqa: E402
from pretrain.streams import Prefetch, Streams  # noqa: E402
from sharding.shards import Corpus  # noqa: E402

DEFAULTS = {"corpus": "", "rounds": 5, "steps": 8, "lanes": 20, "bptt": 70, "embedding": 400, "hidden": 1152}
LAYERS = 3

Steps = Callable[[int], float]  # trains so many steps; returns seconds


class Ours:
    """chartlm's training step."""

    def __init__(
        self,
        corpus: Corpus,
        given: dict[str, Any],
        workers: Workers,
        precision: str,
        seed: int = 1,
        total_steps: int = 10_000,
        settings: Any = None,
        told: optim.OptimConfig | None = None,
        **model: float,
    ):
        if settings is None:
            settings = AwdLstmConfig(embedding=given["embedding"], hidden=given["hidden"], layers=LAYERS, **model)
        # One process has nothing to share; bf16 wants an fp32 copy of the weights, which ZeRO-1 keeps.
        stage: Literal[0, 1] = 0 if precision == "fp32" else 1
        config = EngineConfig(zero_stage=stage, precision=precision, timeout_seconds=600)
        torch.manual_seed(seed)
        self.lanes, self.workers, self.at = range(given["lanes"]), workers, 0
        self.seed, self.total_steps = seed, total_steps
        self.told = told or optim.OptimConfig()
        module = MODELS[settings.name](settings, corpus.vocab_size)
        self.module = module
        self.engine = Engine(module, lambda m: optim.build(m, self.told), config, workers, given["lanes"], 0.25)
        streams = Streams(corpus.split("train"), given["lanes"], given["bptt"], seed)
        self.streams, self.batches = streams, Prefetch(streams, self.lanes, workers.device)
        self.carry = self.engine.initial_carry(given["lanes"])

    def __call__(self, steps: int) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            step, self.at = self.at, self.at + 1
            masks = Masks(self.seed, step, self.lanes, self.workers.device)
            targets = self.streams.targets_in(step)
            nll, self.carry = self.engine.forward_backward(self.batches.get(step), self.carry, masks, targets)
            self.workers.total(nll)
            self.engine.update(optim.knobs(step, self.total_steps, self.told))
        if self.workers.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def loader_seconds(self) -> float:
        """Seconds to make a batch; a thread does it while the step before is trained."""
        begun = time.perf_counter()
        for step in range(100):
            self.streams.batch(step, self.lanes)
        return (time.perf_counter() - begun) / 100


def fastai_learner(corpus: Corpus, given: dict[str, Any], device: torch.device) -> Any:
    """fastai's AWD_LSTM with its language-model dropouts, on the same notes in its own loader."""
    from fastai.text.all import (
        AWD_LSTM,
        CrossEntropyLossFlat,
        DataLoaders,
        LMDataLoader,
        LMLearner,
        awd_lstm_lm_config,
        awd_lstm_lm_split,
        get_language_model,
    )

    def loader(name: str, shuffle: bool) -> Any:
        split = corpus.split(name)
        notes = [torch.from_numpy(ids.astype("int64")) for ids in notes_of(split)]
        lens = [len(note) for note in notes]
        return LMDataLoader(notes, lens=lens, bs=given["lanes"], seq_len=given["bptt"], shuffle=shuffle, device=device)

    sizes = {"emb_sz": given["embedding"], "n_hid": given["hidden"], "n_layers": LAYERS}
    model = get_language_model(AWD_LSTM, corpus.vocab_size, config=awd_lstm_lm_config | sizes)
    loaders = DataLoaders(loader("train", True), loader("valid", False), device=device)
    return LMLearner(loaders, model.to(device), loss_func=CrossEntropyLossFlat(), splitter=awd_lstm_lm_split)


def notes_of(split: Any) -> Any:
    """Token ids of every note."""
    return (split.tokens(index) for index in range(split.n_notes))


def fastai_steps(learner: Any) -> Steps:
    """Steps of its own training loop, from the end of the first (fastai prepares before it) to the last."""
    from fastai.text.all import Callback, CancelFitException

    class Timed(Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.wanted, self.times = 0, []

        def after_batch(self) -> None:
            if not self.training:
                return
            self.times.append(time.perf_counter())
            if len(self.times) > self.wanted:
                raise CancelFitException

    timed = Timed()
    learner.add_cb(timed)

    def train(steps: int) -> float:
        timed.wanted, timed.times = steps, []
        with learner.no_bar(), learner.no_logging():
            learner.fit_one_cycle(1, 5e-3)
        return float(timed.times[-1] - timed.times[0])

    return train


def salesforce_steps(place: str, corpus: Corpus, given: dict[str, Any], device: torch.device) -> Steps:
    """Its model and the steps of its `main.train`."""
    sys.path.insert(0, place)
    from model import RNNModel
    from splitcross import SplitCrossEntropyLoss
    from utils import batchify, get_batch, repackage_hidden

    class Given:
        cuda = device.type == "cuda"
        bptt = given["bptt"]

    ids = torch.cat([torch.from_numpy(note.astype("int64")) for note in notes_of(corpus.split("train"))])
    data = batchify(ids, given["lanes"], Given)
    drops = {"dropout": 0.1, "dropouth": 0.15, "dropouti": 0.25, "dropoute": 0.02, "wdrop": 0.2}
    sizes = (corpus.vocab_size, given["embedding"], given["hidden"], LAYERS)
    model = RNNModel("LSTM", *sizes, tie_weights=True, **drops).to(device).train()
    criterion = SplitCrossEntropyLoss(given["embedding"], splits=[])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1.2e-6)
    state = {"at": 0, "hidden": model.init_hidden(given["lanes"])}

    def train(steps: int) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            if state["at"] + given["bptt"] + 1 >= len(data):
                state["at"] = 0
            inputs, targets = get_batch(data, state["at"], Given, seq_len=given["bptt"])
            state["at"] += given["bptt"]
            hidden = repackage_hidden(state["hidden"])
            optimizer.zero_grad()
            output, state["hidden"], raw, dropped = model(inputs, hidden, return_h=True)
            loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
            loss = loss + 2 * dropped[-1].pow(2).mean() + (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
        if Given.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return train


def settle_as(name: str) -> None:
    """Sets the allocator and the least numbers for a turn: as chartlm's workers do, or as where nobody does."""
    torch.set_flush_denormal(name.startswith("chartlm"))
    if sys.platform != "linux" or torch.cuda.is_available():
        return
    if name.startswith("chartlm"):
        memory.keep_freed.cache_clear()  # the other side has set it since
        memory.keep_freed()
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 65536)  # M_MMAP_MAX
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: as far as glibc raises it when large blocks are freed
    libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD: twice that
    libc.malloc_trim(0)


def fast_bf16() -> bool:
    """Whether bf16 is computed by the hardware: a GPU, or a CPU with AMX."""
    if torch.cuda.is_available():
        return True
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def main() -> None:
    """Prints a table, and as the last line one JSON object."""
    words = sys.argv[1:]
    given = dict(DEFAULTS)
    for word in words:
        key, _, value = word.partition("=")
        if value:
            given[key] = type(DEFAULTS[key])(value)
    peers = {word: words[index + 1 : index + 2] for index, word in enumerate(words) if word.startswith("--")}
    if not given["corpus"] or set(peers) - {"--peer-fastai", "--peer-salesforce"}:
        sys.exit(str(__doc__).split("\n\n")[1].strip())
    corpus, workers = Corpus.open(str(given["corpus"])), Workers(600)
    rivals: dict[str, Steps] = {"chartlm fp32": Ours(corpus, given, workers, "fp32")}
    rivals["chartlm fp32, no weight drop"] = Ours(corpus, given, workers, "fp32", drop_weight=0.0)
    if fast_bf16():
        rivals["chartlm bf16"] = Ours(corpus, given, workers, "bf16")
    if "--peer-fastai" in peers:
        rivals["fastai"] = fastai_steps(fastai_learner(corpus, given, workers.device))
    if "--peer-salesforce" in peers:
        (place,) = peers["--peer-salesforce"]
        rivals["salesforce"] = salesforce_steps(place, corpus, given, workers.device)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(given["rounds"] + 1):
        for name, train in rivals.items():
            settle_as(name)
            took = train(given["steps"])
            if number:
                seconds[name].append(took)
    tokens = given["steps"] * given["lanes"] * given["bptt"]

    def ratio(a: str, b: str) -> float | None:
        """Median over rounds of the seconds of `a` over those of `b`."""
        if a not in seconds or b not in seconds:
            return None
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    for name, took in seconds.items():
        print(f"{name:30} {tokens / statistics.median(took):10,.0f} tokens/s")
    overhead = ratio("chartlm fp32", "chartlm fp32, no weight drop")
    assert overhead is not None
    ours = rivals["chartlm fp32"]
    assert isinstance(ours, Ours)
    step_seconds = statistics.median(seconds["chartlm fp32"]) / given["steps"]
    result = {
        "loader_share": ours.loader_seconds() / step_seconds,
        "speedup_over_fastai_fp32": ratio("fastai", "chartlm fp32"),
        "speedup_over_fastai_bf16": ratio("fastai", "chartlm bf16"),
        "speedup_over_salesforce_fp32": ratio("salesforce", "chartlm fp32"),
        "weight_drop_overhead": overhead - 1,
        "tokens_per_s": tokens / statistics.median(seconds["chartlm fp32"]),
        "vocab_size": corpus.vocab_size,
        **{key: given[key] for key in ("embedding", "hidden", "lanes", "bptt", "rounds", "steps")},
    }
    if result["speedup_over_fastai_bf16"] is None:
        print("bf16: not measured (neither a GPU nor a CPU with AMX)" if not fast_bf16() else "bf16: no peer")
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}))


if __name__ == "__main__":
    main()
