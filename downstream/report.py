"""What fine-tuning shows and leaves behind: tables, predictions.csv, curves.png, and metrics.json last."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster import logs, storage
from downstream.baseline import labels_of
from downstream.metrics import Floats, Interval, evaluate, precision_recall, reliability, roc
from downstream.tasks.examples import Example

SEED = 20180118  # of the bootstrap draws: two runs on one test set see the same ones
SYSTEMS = {
    "model": "language model",
    "baseline": "TF-IDF + logistic regression",
    "model - baseline": "difference, paired",
    "model - majority": "difference to majority",
}
NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "rp80": "recall at precision 80%",
    "sensitivity_90": "sensitivity at specificity 90%",
    "brier": "Brier (low is good)",
    "ece": "calibration error (low)",
    "auprc_balanced": "AUPRC were it 1:1",
    "rp80_balanced": "recall at precision 80%, 1:1",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
}

Splits = Mapping[str, Sequence[Example]]


def show_splits(splits: Splits, classes: Sequence[str]) -> None:
    """Prints how many notes, patients and members of each class every split has."""
    counts = {name: np.bincount(labels_of(examples), minlength=len(classes)) for name, examples in splits.items()}
    rows = [
        ["notes", *(f"{len(examples):,}" for examples in splits.values())],
        ["patients", *(f"{len({e.patient_id for e in examples}):,}" for examples in splits.values())],
    ]
    for k, label in enumerate(classes):
        rows.append([label, *(f"{n_K[k]:,} ({n_K[k] / n_K.sum():.1%})" for n_K in counts.values())])
    logs.table("splits by patient", ["", *splits], rows)


def write(
    out: str,
    facts: Mapping[str, Any],
    classes: Sequence[str],
    splits: Splits,
    systems: Mapping[str, Floats],
    draws: int,
) -> None:
    """Scores the test predictions (`systems`: probabilities [N, K], the model first), prints and writes them.

    `facts` go into metrics.json as they are.
    """
    test = splits["test"]
    labels_N = labels_of(test)
    if len(classes) > 2:
        common = int(np.bincount(labels_of(splits["train"])).argmax())
        systems = {**systems, "majority": np.eye(len(classes))[np.full(len(test), common)]}
    scores = evaluate(labels_N, systems, [example.patient_id for example in test], draws, SEED)
    metrics = list(scores["model"])
    title = f"test: {len(test):,} notes; 95% intervals over {draws:,} draws of patients"
    if len(classes) == 2:
        title += f"; {labels_N.mean():.1%} are {classes[1]!r}, which is the AUPRC of chance"
    rows = [[NAMES[name], *(str(values[name]) for values in scores.values())] for name in metrics]
    logs.table(title, ["", *(SYSTEMS.get(system, system) for system in scores)], rows)
    counts: dict[str, Any] = {f"n_{name}": len(examples) for name, examples in splits.items()}
    counts |= {f"patients_{name}": len({e.patient_id for e in examples}) for name, examples in splits.items()}
    if len(classes) == 2:
        counts["positives"] = int(labels_N.sum())
        storage.write_bytes(storage.join(out, "curves.png"), _curves_png(labels_N, systems, scores))
    storage.write_bytes(storage.join(out, "predictions.csv"), _predictions(test, classes, systems))
    numbers = {key: value for system, values in scores.items() for key, value in _flat(system, values).items()}
    storage.write_json(storage.join(out, "metrics.json"), {**facts, "classes": list(classes), **counts, **numbers})
    logs.say(f"results in {out}")


def _flat(system: str, values: Mapping[str, Interval]) -> dict[str, float | None]:
    """`auroc`, `auroc_low`, `auroc_high` of the model, `baseline_auroc` …, `difference_auroc` (paired) …"""
    prefix = {"model": "", "model - baseline": "difference_", "model - majority": "difference_majority_"}
    flat: dict[str, float | None] = {}
    for name, interval in values.items():
        for end, number in zip(("", "_low", "_high"), interval, strict=True):
            # JSON has no NaN: an interval without a single usable draw has no ends.
            flat[f"{prefix.get(system, f'{system}_')}{name}{end}"] = None if math.isnan(number) else number
    return flat


def _predictions(test: Sequence[Example], classes: Sequence[str], systems: Mapping[str, Floats]) -> bytes:
    """CSV: ids, label, and by system the class and its probability (of two classes the positive one's)."""
    binary = len(classes) == 2
    named = {system: p_NK for system, p_NK in systems.items() if system != "majority"}
    columns = [column for system in named for column in ([] if binary else [system]) + [f"{system}_probability"]]
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(["example_id", "patient_id", "label", *columns])
    for n, example in enumerate(test):
        said: list[str] = []
        for p_NK in named.values():
            said += [f"{p_NK[n, 1]:.6f}"] if binary else [classes[p_NK[n].argmax()], f"{p_NK[n].max():.6f}"]
        label = str(example.label) if binary else classes[example.label]
        table.writerow([example.example_id, example.patient_id, label, *said])
    return written.getvalue().encode()


def _curves_png(labels_N: Any, systems: Mapping[str, Floats], scores: Mapping[str, Mapping[str, Interval]]) -> bytes:
    """ROC, precision over recall, and reliability, side by side."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(13, 4.5), layout="constrained")  # no pyplot: it needs no display and keeps no state
    left, middle, right = figure.subplots(1, 3)
    ones = np.ones(len(labels_N))
    for system, p_NK in systems.items():
        false_N, true_N = roc(labels_N, p_NK[:, 1], ones)
        left.plot(false_N, true_N, label=f"{system}, AUROC {scores[system]['auroc']}")
        recall_N, precision_N = precision_recall(labels_N, p_NK[:, 1], ones)
        middle.plot(recall_N, precision_N, label=f"{system}, AUPRC {scores[system]['auprc']}")
        said, seen, _ = zip(*reliability(labels_N, p_NK[:, 1], ones), strict=True)
        right.plot(said, seen, marker="o", markersize=3, label=f"{system}, error {scores[system]['ece']}")
    for axes in (left, right):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    middle.axhline(labels_N.mean(), color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC")
    middle.set(xlabel="recall", ylabel="precision", title="precision and recall")
    right.set(xlabel="probability that was said", ylabel="share that came true", title="reliability")
    for axes, place in ((left, "lower right"), (middle, "upper right"), (right, "upper left")):
        axes.set(aspect="equal", xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc=place, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    return drawn.getvalue()
