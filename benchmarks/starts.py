"""How long a verb takes to start: processor seconds of importing it, beside those of importing torch alone.

    .venv/bin/python benchmarks/starts.py corpus=SHARDS [before=CHECKOUT] [rounds=5]

In turns, each in a process of its own: bare torch, every verb of this checkout, and of another one where it is given.
`step` is a training worker from nothing to its first step on SHARDS and its validation (AWD-LSTM of 16 units, no W&B).
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from given import given

HERE = Path(__file__).resolve().parents[1]
VERBS = {
    "pretrain": "pretrain.train",
    "evaluate": "pretrain.evaluate",
    "finetune": "downstream.finetune",
    "predict": "downstream.predict",
    "annotate": "downstream.concepts.annotate",
    "shard": "sharding.job",
    "status": "cluster.jobs",
}
RECIPE = """
steps = 1
eval_every = 1000000
[data]
lanes = 4
bptt = 8
[model]
name = "awd-lstm"
embedding = 16
hidden = 16
[tracking]
wandb = "disabled"
"""


def seconds(words: list[str], checkout: Path) -> float:
    """Processor seconds of one process of this Python, with `checkout` as its source."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words], cwd=checkout, env=os.environ | alone, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"starts.py: {' '.join(words)} in {checkout}: {done.stderr.strip().splitlines()[-1:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints a line for every verb, and as the last line one JSON object."""
    asked = given({"corpus": "", "before": "", "rounds": 5}, "corpus", str(__doc__))
    sides = {"now": HERE} | ({"before": Path(asked["before"]).resolve()} if asked["before"] else {})
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "one.toml")
        recipe.write_text(RECIPE)
        for number in range(asked["rounds"] + 1):
            for side, checkout in sides.items():
                run = f"run_dir={folder}/{side}-{number}"
                words = {"torch": ["-c", "import torch"]}
                words |= {verb: ["-c", f"import {module}"] for verb, module in VERBS.items()}
                words["step"] = ["-m", "pretrain.train", str(recipe), run, f"data.corpus={asked['corpus']}"]
                for name, one in words.items():
                    took = seconds(one, checkout)
                    if number:  # the first round writes what Python compiles
                        found.setdefault(name, {}).setdefault(side, []).append(took)
    line = {}
    for name, by_side in found.items():
        medians = {side: statistics.median(took) for side, took in by_side.items()}
        print(f"{name:<10}" + "".join(f"{side:>8} {took:6.2f} s" for side, took in medians.items()))
        line |= {f"{name}_{side}": round(took, 2) for side, took in medians.items()}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
