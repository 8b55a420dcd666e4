"""How well AWD-LSTM learns in the same time as fastai's, on the same text, vocabulary and cores.

    PYTHON benchmarks/awd_quality.py corpus=SHARDS [seeds=3] [epochs=1] [key=value…]

PYTHON as for awd_lstm.py, whose two sides train here. For every seed fastai's AWD_LSTM trains `epochs` by its own
`fit_one_cycle`; the seconds of that (its validation is left out) are what chartlm gets: as many steps as it can do in
them, by its speed in a trial of some steps, under its own one-cycle. Both are then scored by chartlm's evaluation:
every token of the validation notes, the state kept over the stream, in bits per byte of the text.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# Python looks for modules beside the script, where `sharding` is another file.
BESIDE = sys.path[0]
sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(BESIDE)

import awd_lstm  # noqa: E402  (benchmarks/awd_lstm.py)
import torch  # noqa: E402
from given import given as given_words  # noqa: E402  (benchmarks/given.py)
from torch.nn import functional  # noqa: E402

from pretrain.engine import Workers  # noqa: E402
from pretrain.evaluate import evaluate  # noqa: E402
from pretrain.scoring import Plain  # noqa: E402
from pretrain.streams import IGNORED, StreamConfig  # noqa: E402
from sharding.shards import Corpus  # noqa: E402

DEFAULTS: dict[str, Any] = {"corpus": "", "seeds": 3, "epochs": 1, "lanes": 32, "bptt": 70, "embedding": 128}
DEFAULTS |= {"hidden": 256, "fastai_lr": 5e-3}
TRIAL_STEPS = 10


class Fastai:
    """fastai's model as a Scorer; it keeps its state on itself."""

    def __init__(self, model: Any):
        self.model = model.eval()

    def initial_carry(self, lanes: int) -> dict[str, Any]:
        self.model.reset()
        return {}

    @torch.no_grad()
    def score(self, batch: Any, carry: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        logits_NV = self.model(batch.tokens_BT)[0].flatten(0, 1)
        targets_N = batch.targets_BT.flatten()
        nll_N = functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")
        return nll_N, logits_NV.argmax(1) == targets_N, carry


def bits_per_byte(scorer: Any, corpus: Corpus, given: dict[str, Any]) -> float:
    data = StreamConfig(corpus=corpus.url, lanes=given["lanes"], bptt=given["bptt"])
    scores = evaluate(scorer, corpus.split("valid"), data, begins_word_V=corpus.tokenizer.begins_word)
    assert scores is not None
    return scores.bits_per_byte


def of_fastai(corpus: Corpus, given: dict[str, Any], seed: int, device: torch.device) -> tuple[float, float]:
    """(bits per byte, seconds of training)."""
    from fastai.text.all import Callback, set_seed

    class Timed(Callback):  # type: ignore[misc]
        seconds = 0.0

        def before_train(self) -> None:
            self.begun = time.perf_counter()

        def after_train(self) -> None:
            self.seconds += time.perf_counter() - self.begun

    set_seed(seed, reproducible=True)
    learner = awd_lstm.fastai_learner(corpus, given, device)
    timed = Timed()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(given["epochs"], given["fastai_lr"], cbs=timed)
    return bits_per_byte(Fastai(learner.model), corpus, given), timed.seconds


def of_chartlm(
    corpus: Corpus, given: dict[str, Any], seed: int, workers: Workers, budget_seconds: float
) -> tuple[float, float, int]:
    """(bits per byte, seconds of training, steps)."""
    trial = awd_lstm.Ours(corpus, given, workers, "fp32", seed)
    trial(2)
    steps = max(int(budget_seconds / (trial(TRIAL_STEPS) / TRIAL_STEPS)), 1)
    trial.batches.close()
    ours = awd_lstm.Ours(corpus, given, workers, "fp32", seed, total_steps=steps)
    seconds = ours(steps)
    ours.batches.close()
    return bits_per_byte(Plain(ours.module), corpus, given), seconds, steps


def main() -> None:
    """Prints a line a seed and a table, and as the last line one JSON object."""
    given = given_words(DEFAULTS, "corpus", str(__doc__))
    corpus, workers = Corpus.open(given["corpus"]), Workers(600)
    bits: dict[str, list[float]] = {"fastai": [], "chartlm": []}
    took: dict[str, list[float]] = {"fastai": [], "chartlm": []}
    for seed in range(1, given["seeds"] + 1):
        awd_lstm.settle_as("fastai")
        theirs, their_seconds = of_fastai(corpus, given, seed, workers.device)
        awd_lstm.settle_as("chartlm")
        ours, our_seconds, steps = of_chartlm(corpus, given, seed, workers, their_seconds)
        for name, value, seconds in (("fastai", theirs, their_seconds), ("chartlm", ours, our_seconds)):
            bits[name].append(value)
            took[name].append(seconds)
        print(
            f"seed {seed}: fastai {theirs:.4f} bits/byte in {their_seconds:.0f} s; chartlm {ours:.4f} in "
            f"{our_seconds:.0f} s, {steps} steps",
            flush=True,
        )
    for name, values in bits.items():
        spread = f"{min(values):.4f} to {max(values):.4f}"
        print(f"{name:8} {statistics.mean(values):.4f} bits/byte ({spread}), {statistics.mean(took[name]):.0f} s")
    result = {f"{name}_bits_per_byte": round(statistics.mean(values), 4) for name, values in bits.items()}
    result |= {f"{name}_seconds": round(statistics.mean(values), 1) for name, values in took.items()}
    print(json.dumps(result | {key: value for key, value in given.items() if key != "corpus"}))


if __name__ == "__main__":
    main()
