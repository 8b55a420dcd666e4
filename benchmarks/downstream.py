"""What a pretrained model of open text is worth downstream, beside what a user would pick instead, on the same folds.

    CHARTLM_DATA=DATA .venv/bin/python benchmarks/downstream.py work=DIR [workers=2] [patients=1500]

1. open text → shards → a small Transformer-XL (recipes/open-text). No report that is tested is in it.
2. specialty and mention status of MTSamples, 200 labels and all, five folds; for the status the model has read the
   reports of the other folds ([lm]), without labels.
3. synthetic hospitals: pretrained on the notes of one, readmission from the discharge summaries of three others, 200 of
   each labelled and, of the first, all; five folds. Pairs are of one fold, intervals over patients of all hospitals.

Every row stays in the tables, also where a bar wins. Interrupted, the same command goes on from what stands in `work`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Python looks for modules beside the script, where `sharding` is another file.
BESIDE = sys.path[0]
HERE = Path(__file__).resolve().parents[1]
sys.path[0] = str(HERE)
sys.path.append(BESIDE)
from cluster.cli import settle_threads  # noqa: E402

settle_threads()  # as every verb does

import numpy as np  # noqa: E402
import open_text  # noqa: E402  (benchmarks/open_text.py)
import pyarrow.parquet as pq  # noqa: E402
from given import given as given_words  # noqa: E402  (benchmarks/given.py)

from cluster import cli  # noqa: E402
from downstream.metrics import evaluate  # noqa: E402
from downstream.report import SEED, flat  # noqa: E402
from downstream.tasks.readmission import CLASSES  # noqa: E402

DEFAULTS: dict[str, Any] = {"work": "", "workers": 2, "patients": 1500, "only": ""}
FEW = 200
ASKED_SEEDS = (6, 7, 8)  # of the hospitals that are asked; settings were tried on those before
DRAWS = 1000
ROWS = ("model", "scratch", "baseline", "untold", "majority")


def verb(name: str, *args: str) -> None:
    """Runs a verb of chartlm in this process."""
    cli.run_verb(name, list(args))


def finetuned(recipe: str, out: Path, *args: str) -> dict[str, Any]:
    """Results of a recipe, from where they stand or made now."""
    place = out / "results.json"
    if not place.exists():
        verb("finetune", str(HERE / recipe), f"out={out}", "tracking.wandb=disabled", *args)
    found: dict[str, Any] = json.loads(place.read_text())
    return found


def of_open_text(work: Path, workers: int) -> dict[str, dict[str, Any]]:
    """Specialty and status, by few labels and by all."""
    run = work / "runs/open-text"
    if not (run / "folds.csv").exists():
        data = os.environ.get("CHARTLM_DATA")
        if not data:
            sys.exit("downstream.py: set CHARTLM_DATA to the folder that holds mtsamples, concepts and wikitext-2")
        print(f"files: {open_text.write(Path(data), run)}")
    files = [f"input={run}/open.csv", f"output={run}/shards"]
    if not (run / "shards/manifest.json").exists():
        verb("shard", str(HERE / "recipes/open-text/shard.toml"), *files)
    pretrain = [f"run_dir={run}", f"data.corpus={run}/shards", "tracking.wandb=disabled"]
    verb("pretrain", str(HERE / "recipes/open-text/transformer_xl.toml"), *pretrain)
    found = {}
    for task, file in (("specialty", "specialty.csv"), ("status", "status.jsonl")):
        for size, labels in (("200", [f"labels={FEW}"]), ("full", [])):
            places = [f"run={run}", f"task.url={run}/{file}"]
            places += [f"folds_file={run}/folds.csv", f"lm.notes={run}/notes.csv"]
            recipe = f"recipes/open-text/{task}.toml"
            found[f"{task}_{size}"] = finetuned(recipe, work / f"{task}-{size}", *places, *labels, f"workers={workers}")
    return found


def of_hospitals(work: Path, patients: int, workers: int) -> dict[str, dict[str, Any]]:
    """Readmission in synthetic hospitals, by few labels and by all, with the language model of another."""
    hospital, run = work / "hospital", work / "runs/hospital"
    demo = HERE / "recipes/demo"
    for seed, place in ((None, hospital), *((seed, work / f"hospital-{seed}") for seed in ASKED_SEEDS)):
        if not (place / "NOTEEVENTS.csv.gz").exists():
            words = [] if seed is None else [f"seed={seed}"]
            verb("hospital", str(demo / "hospital.toml"), f"out={place}", f"patients={patients}", *words)
    if not (run / "shards/manifest.json").exists():
        files = [f"input={hospital}/NOTEEVENTS.csv.gz", f"output={run}/shards"]
        verb("shard", str(demo / "shard.toml"), *files)
    pretrain = [f"run_dir={run}", f"data.corpus={run}/shards", "cluster.workers=0", "tracking.wandb=disabled"]
    verb("pretrain", str(demo / "awd_lstm.toml"), *pretrain)
    keys = [f"run={run}", "others=true", "mode=frozen", "seeds=[1]", "folds=5", f"workers={workers}"]
    found = {}
    for size, seeds, labels in (("200", ASKED_SEEDS, [f"labels={FEW}"]), ("full", ASKED_SEEDS[:1], [])):
        outs = [work / f"readmission-{size}-{seed}" for seed in seeds]
        for seed, out in zip(seeds, outs, strict=True):
            one = finetuned("recipes/demo/finetune.toml", out, f"task.tables={work}/hospital-{seed}", *keys, *labels)
            gains = " and ".join(f"{100 * one[f'difference_{than}auroc']:+.1f}" for than in ("", "scratch_"))
            print(f"hospital {seed}, {size} labels: {100 * one['auroc']:.1f}, less baseline and scratch {gains}")
        found[f"readmission_{size}"] = together(outs)
    return found


def together(outs: list[Path]) -> dict[str, Any]:
    """The intervals of AUROC of several runs of fine-tuning: their notes, patients and folds side by side."""
    tables = [pq.read_table(out / "predictions.parquet") for out in outs]
    labels = np.concatenate([one["label"].to_numpy() for one in tables])
    folds = [f"{n} {fold}" for n, one in enumerate(tables) for fold in one["fold"].to_pylist()]
    patients = [f"{n} {patient}" for n, one in enumerate(tables) for patient in one["patient_id"].to_pylist()]
    said = {
        name: np.concatenate([one[f"{name}_probability"].to_numpy() for one in tables])
        for name in ("model", "scratch", "baseline")
    }
    two = {name: np.stack([1 - p_N, p_N], 1) for name, p_N in said.items()}
    places = np.unique(folds, return_inverse=True)[1].tolist()
    scores = evaluate((labels == CLASSES[1]).astype(int), two, patients, DRAWS, SEED, places)
    found: dict[str, Any] = {}
    for system, values in scores.items():
        found |= flat(system, {"auroc": values["auroc"]})
    return found


def table(title: str, results: dict[str, dict[str, Any]], metric: str) -> None:
    """One line a system, and one a difference to the model; one column a result."""
    print(f"\n{title}: {metric}, 95% interval over patients")
    print(f"{'':<16}" + "".join(f"{name:>26}" for name in results))
    differences = [
        (f"less {name}", "difference_" if name == "baseline" else f"difference_{name}_") for name in ROWS[1:]
    ]
    for name, prefix in [(name, "" if name == "model" else f"{name}_") for name in ROWS] + differences:
        sign = "+" if name.startswith("less") else ""
        cells = []
        for found in results.values():
            ends = [found.get(f"{prefix}{metric}{end}") for end in ("", "_low", "_high")]
            value, low, high = ("" if end is None else f"{100 * end:{sign}.1f}" for end in ends)
            cells.append(f"{value} [{low}, {high}]" if value else "")
        if any(cells):
            print(f"{name:<16}" + "".join(f"{cell:>26}" for cell in cells))


def main() -> None:
    """Prints the tables, and as the last line one JSON object."""
    given = given_words(DEFAULTS, "work", str(__doc__))
    work = Path(given["work"]).resolve()
    began = time.monotonic()
    line: dict[str, Any] = {}
    if given["only"] != "hospital":
        found = of_open_text(work, given["workers"])
        for task in ("specialty", "status"):
            table(task, {name: one for name, one in found.items() if name.startswith(task)}, "macro_f1")
        for name, one in found.items():
            line[name.replace("_", "_f1_")] = round(100 * one["macro_f1"], 1)
        for task in ("specialty", "status"):
            line[f"tfidf_{task}_f1_200"] = round(100 * found[f"{task}_200"]["baseline_macro_f1"], 1)
            line[f"tfidf_{task}_f1_full"] = round(100 * found[f"{task}_full"]["baseline_macro_f1"], 1)
        line["untold_status_f1_200"] = round(100 * found["status_200"]["untold_macro_f1"], 1)
    if given["only"] != "open-text":
        hospital = of_hospitals(work, given["patients"], given["workers"])
        table("synthetic hospitals, readmission", hospital, "auroc")
        for size, end in (("200", ""), ("full", "_full")):
            one = hospital[f"readmission_{size}"]
            for name, prefix in (("tfidf", "difference_auroc"), ("scratch", "difference_scratch_auroc")):
                line[f"auroc_gain_over_{name}{end}"] = round(one[prefix], 4)
                line[f"auroc_gain_over_{name}{end}_interval"] = [
                    round(one[f"{prefix}_{at}"], 4) for at in ("low", "high")
                ]
    line["minutes"] = round((time.monotonic() - began) / 60, 1)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
