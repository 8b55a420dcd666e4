"""How well Transformer-XL learns in the same time as AWD-LSTM, on the same text, vocabulary, cores and parameters.

    .venv/bin/python benchmarks/xl_quality.py corpus=SHARDS [seeds=3] [seconds=60] [key=value…]

Every side trains `seconds` of wall-clock: as many steps as it can do in them, by its speed in a trial of some steps,
under its own schedule (AWD-LSTM one-cycle, Transformer-XL a cosine after a warm-up) with the learning rates given. All
are of about as many parameters. They are scored by chartlm's evaluation: every token of the validation notes, the
carry kept over the stream, in bits per byte of the text; Transformer-XL with the memory of training and with 2 and 4
times as much, every position then seeing as many (`same_length`).
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

# Python looks for modules beside the script, where `sharding` is another file.
BESIDE = sys.path[0]
sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(BESIDE)

import awd_lstm  # noqa: E402  (benchmarks/awd_lstm.py)
from given import given as given_words  # noqa: E402  (benchmarks/given.py)

from pretrain import optim  # noqa: E402
from pretrain.engine import Workers  # noqa: E402
from pretrain.evaluate import evaluate  # noqa: E402
from pretrain.models import MODELS  # noqa: E402
from pretrain.models.awd_lstm import AwdLstmConfig  # noqa: E402
from pretrain.models.transformer_xl import TransformerXlConfig  # noqa: E402
from pretrain.scoring import Plain  # noqa: E402
from pretrain.streams import StreamConfig  # noqa: E402
from sharding.shards import Corpus  # noqa: E402

DEFAULTS: dict[str, Any] = {"corpus": "", "seeds": 3, "seconds": 60.0, "lanes": 32, "bptt": 64, "awd_lr": 5e-3}
DEFAULTS |= {"relative_lr": 7e-3, "rotary_lr": 7e-3, "only": ""}
TRIAL_STEPS = 10


def sides(given: dict[str, Any]) -> dict[str, tuple[Any, optim.OptimConfig]]:
    """Model and optimizer by name."""
    xl = {"width": 128, "heads": 4, "head_width": 32, "layers": 5, "memory": given["bptt"]}
    slow = {"schedule": "cosine", "warmup": 0.1, "beta1": 0.9, "beta2": 0.99}
    return {
        "awd": (AwdLstmConfig(embedding=128, hidden=256), optim.OptimConfig(lr=given["awd_lr"])),
        "relative": (
            TransformerXlConfig(**xl, inner=512),
            optim.OptimConfig(lr=given["relative_lr"], **slow),
        ),
        "rotary": (  # has no W_r; as many parameters in the feed-forward
            TransformerXlConfig(**xl, inner=576, position="rotary"),
            optim.OptimConfig(lr=given["rotary_lr"], **slow),
        ),
    }


def trained(corpus: Corpus, given: dict[str, Any], name: str, seed: int, workers: Workers) -> tuple[Any, float, int]:
    """(model, seconds of training, steps)."""
    settings, told = sides(given)[name]
    more = {"settings": settings, "told": told}
    trial = awd_lstm.Ours(corpus, given, workers, "fp32", seed, **more)
    trial(3)
    steps = max(int(given["seconds"] / (trial(TRIAL_STEPS) / TRIAL_STEPS)), 1)
    trial.batches.close()
    ours = awd_lstm.Ours(corpus, given, workers, "fp32", seed, total_steps=steps, **more)
    seconds = ours(steps)
    ours.batches.close()
    return ours.module, seconds, steps


def bits_per_byte(model: Any, corpus: Corpus, given: dict[str, Any], times: int) -> float:
    """On the validation notes, with `times` the memory of training."""
    if times > 1:
        changed = model.config.model_copy(update={"memory": times * model.config.memory, "same_length": True})
        other = MODELS[changed.name](changed, model.vocab_size)
        other.load_state_dict(model.state_dict())
        model = other
    data = StreamConfig(corpus=corpus.url, lanes=given["lanes"], bptt=given["bptt"])
    scores = evaluate(Plain(model), corpus.split("valid"), data, begins_word_V=corpus.tokenizer.begins_word)
    assert scores is not None
    return scores.bits_per_byte


def main() -> None:
    """Prints a line a run and a table, and as the last line one JSON object."""
    given = given_words(DEFAULTS, "corpus", str(__doc__))
    corpus, workers = Corpus.open(given["corpus"]), Workers(600)
    bits: dict[str, list[float]] = {}
    for seed in range(1, given["seeds"] + 1):
        for name in given["only"].split(",") if given["only"] else sides(given):
            model, seconds, steps = trained(corpus, given, name, seed, workers)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            for times in (1,) if name == "awd" else (1, 2, 4):
                place = name if times == 1 else f"{name}, memory × {times}"
                bits.setdefault(place, []).append(bits_per_byte(model, corpus, given, times))
                print(
                    f"seed {seed}: {place:20} {bits[place][-1]:.4f} bits/byte after {seconds:.0f} s, {steps} steps; "
                    f"{parameters:,} parameters",
                    flush=True,
                )
    for place, found in bits.items():
        print(f"{place:20} {statistics.mean(found):.4f} bits/byte ({min(found):.4f} to {max(found):.4f})")
    result = {"bits_per_byte": {place: round(statistics.mean(found), 4) for place, found in bits.items()}}
    print(json.dumps(result | {key: value for key, value in given.items() if key not in ("corpus", "only")}))


if __name__ == "__main__":
    main()
