"""What fine-tuning shows and leaves behind: tables, predictions.parquet, curves.png, and results.json last."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import logs, storage, tracking
from cluster.tracking import TrackingConfig
from downstream import conformal
from downstream.baseline import labels_of
from downstream.folds import Fold
from downstream.metrics import (
    Floats,
    Interval,
    Ints,
    confusion,
    evaluate,
    evaluate_several,
    per_class,
    precision_recall,
    reliability,
    roc_within,
)
from downstream.tasks.examples import Cohort, Example

SEED = 20180118  # of the bootstrap draws: two runs on one test set see the same ones
SYSTEMS = {
    "model": "language model",
    "scratch": "without pretraining",
    "baseline": "TF-IDF + logistic regression",
    "untold": "TF-IDF, not told where",
}
NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "rp80": "recall at precision 80%",
    "sensitivity_90": "sensitivity at specificity 90%",
    "brier": "Brier (low is good)",
    "ece": "calibration error (low)",
    "calibration_slope": "calibration slope (1)",
    "calibration_intercept": "calibration intercept (0)",
    "auprc_balanced": "AUPRC were it 1:1",
    "rp80_balanced": "recall at precision 80%, 1:1",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "macro_auroc": "macro-AUROC",
    "macro_auprc": "macro-AUPRC",
}

Splits = Mapping[str, Sequence[Example]]


class Outcome(NamedTuple):
    """What fine-tuning came to. `systems`: by name and split (valid, test) probabilities [N, K] of the notes of all
    folds, one fold after the other; the model is the first.
    """

    cohort: Cohort
    folds: list[Fold]
    systems: Mapping[str, Mapping[str, Floats]]
    facts: dict[str, Any]
    draws: int
    conformal: float | None
    tracking: TrackingConfig

    def examples(self, split: str) -> list[Example]:
        """Of all folds."""
        return [example for fold in self.folds for example in fold.splits()[split]]

    def labels(self, split: str) -> Ints:
        """Labels [N], or 0 and 1 [N, K]."""
        return labels_of(self.examples(split), len(self.cohort.classes), self.cohort.several)


def show_splits(splits: Splits, cohort: Cohort) -> None:
    """Prints how many notes, patients and members of each class every split has."""
    counts = {}
    for name, examples in splits.items():
        labels = labels_of(examples, len(cohort.classes), cohort.several)
        counts[name] = labels.sum(0) if cohort.several else np.bincount(labels, minlength=len(cohort.classes))
    rows = [
        ["notes", *(f"{len(examples):,}" for examples in splits.values())],
        ["patients", *(f"{len({e.patient_id for e in examples}):,}" for examples in splits.values())],
    ]
    for k, label in enumerate(cohort.classes):
        shares = zip(counts.values(), splits.values(), strict=True)
        rows.append([label, *(f"{n_K[k]:,} ({n_K[k] / len(examples):.1%})" for n_K, examples in shares)])
    logs.table("splits by patient", ["", *splits], rows)


def write(out: str, outcome: Outcome) -> None:
    """Scores the test predictions, prints and writes them."""
    cohort, classes = outcome.cohort, outcome.cohort.classes
    test, labels = outcome.examples("test"), outcome.labels("test")
    systems = {name: by_split["test"] for name, by_split in outcome.systems.items()}
    patients = [example.patient_id for example in test]
    # Majority ranks nothing: of two classes its AUROC is one half, whatever is drawn.
    binary = len(classes) == 2 and not cohort.several
    compared = {name: p for name, p in systems.items() if not (binary and name == "majority")}
    if cohort.several:
        scores = evaluate_several(labels, compared, patients, outcome.draws, SEED)
    else:
        folds = [place for place, fold in enumerate(outcome.folds) for _ in fold.test]
        scores = evaluate(labels, compared, patients, outcome.draws, SEED, folds)
    title = f"test: {len(test):,} notes; 95% intervals over {outcome.draws:,} draws of patients"
    if len(outcome.folds) > 1:
        title += f"; {len(outcome.folds)} folds" + ", AUROC within them" * binary
    if binary:
        title += f"; {labels.mean():.1%} are {classes[1]!r}, which is the AUPRC of chance"
    _show(title, scores)
    counts: dict[str, Any] = {f"n_{name}": len(outcome.examples(name)) for name in ("train", "valid", "test")}
    counts["patients_test"] = len(set(patients))
    numbers = {key: value for system, values in scores.items() for key, value in flat(system, values).items()}
    more: dict[str, Any] = {}
    if binary:
        counts["positives"] = int(labels.sum())
        storage.write_bytes(storage.join(out, "curves.png"), _curves_png(labels, compared, np.array(folds), scores))
    else:
        more["per_class"] = _per_class(labels, systems["model"], classes)
        if not cohort.several:
            table_KK = confusion(labels, systems["model"])
            more["confusion"] = table_KK.tolist()
            storage.write_bytes(storage.join(out, "curves.png"), _confusion_png(table_KK, classes))
    if outcome.conformal is not None:
        more["conformal"] = _sets(outcome)
    storage.write_bytes(storage.join(out, "predictions.parquet"), _predictions(outcome, systems))
    storage.write_json(
        storage.join(out, "results.json"), {**outcome.facts, "classes": list(classes), **counts, **numbers, **more}
    )
    tracking.summarize(out, outcome.tracking, outcome.facts, {key: v for key, v in numbers.items() if v is not None})
    logs.say(f"results in {out}")


def _show(title: str, scores: Mapping[str, Mapping[str, Interval]]) -> None:
    """The table; the first system's metrics are the rows. Differences stand in one of their own."""
    alone = [system for system in scores if " - " not in system]
    metrics = list(scores["model"])
    rows = [[NAMES.get(name, name), *(str(scores[system][name]) for system in alone)] for name in metrics]
    logs.table(title, ["", *(SYSTEMS.get(system, system) for system in alone)], rows)
    paired = [system for system in scores if " - " in system]
    headers = [f"less {SYSTEMS.get(name, name)}" for name in (system.split(" - ")[1] for system in paired)]
    rows = [[NAMES.get(name, name), *(str(scores[system][name]) for system in paired)] for name in metrics]
    logs.table("language model, paired differences", ["", *headers], rows)


def flat(system: str, values: Mapping[str, Interval]) -> dict[str, float | None]:
    """`auroc`, `auroc_low`, `auroc_high` of the model, `baseline_auroc` …, `difference_auroc` (paired, to the
    baseline), `difference_scratch_auroc` …
    """
    prefix = {"model": "", "model - baseline": "difference_"}.get(system)
    if prefix is None:
        prefix = f"difference_{system.split(' - ')[1]}_" if " - " in system else f"{system}_"
    named: dict[str, float | None] = {}
    for name, interval in values.items():
        for end, number in zip(("", "_low", "_high"), interval, strict=True):
            # JSON has no NaN: an interval without a single usable draw has no ends.
            named[f"{prefix}{name}{end}"] = None if math.isnan(number) else number
    return named


def _per_class(labels: Ints, p_NK: Floats, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    found = {}
    for name, (precision, recall, f1, count) in zip(classes, per_class(labels, p_NK), strict=True):
        found[name] = {"precision": precision, "recall": recall, "f1": f1, "n": int(count)}
    rows = [
        [name, *(f"{one[key]:.3f}" for key in ("precision", "recall", "f1")), f"{one['n']:,}"]
        for name, one in found.items()
    ]
    logs.table("language model, class by class", ["", "precision", "recall", "F1", "notes"], rows)
    return found


def conformal_limits(fold: Fold, cohort: Cohort, valid_NK: Floats, alpha: float) -> Floats:
    """Thresholds [K] from a fold's validation notes. Raises ConfigError where a class has too few patients there."""
    patients = [example.patient_id for example in fold.valid]
    labels_N = labels_of(fold.valid, len(cohort.classes))
    return conformal.thresholds(labels_N, valid_NK, patients, alpha, SEED, cohort.classes)


def _sets(outcome: Outcome) -> dict[str, Any]:
    """Conformal sets. Fold by fold: who validates one fold is tested in another."""
    assert outcome.conformal is not None
    found, limits = [], []
    at = {"valid": 0, "test": 0}
    for fold in outcome.folds:
        said = {}
        for split, examples in (("valid", fold.valid), ("test", fold.test)):
            said[split] = outcome.systems["model"][split][at[split] : at[split] + len(examples)]
            at[split] += len(examples)
        limits.append(conformal_limits(fold, outcome.cohort, said["valid"], outcome.conformal))
        found.append(conformal.sets(said["test"], limits[-1]))
    covered = conformal.coverage(outcome.labels("test"), np.concatenate(found))
    logs.say(
        f"conformal sets that may miss {outcome.conformal:.0%}: {covered.overall:.1%} hold the truth, "
        f"{covered.mean_size:.2f} classes in one, {covered.single:.1%} have one only"
    )
    return {"alpha": outcome.conformal, "thresholds": [one.tolist() for one in limits], **covered._asdict()}


def _predictions(outcome: Outcome, systems: Mapping[str, Floats]) -> bytes:
    """Parquet: ids, fold, label, and by system the class and its probabilities (of two classes the positive one's)."""
    cohort, classes, test = outcome.cohort, np.array(outcome.cohort.classes), outcome.examples("test")
    binary = len(classes) == 2 and not cohort.several
    columns: dict[str, Any] = {
        "example_id": [example.example_id for example in test],
        "patient_id": [example.patient_id for example in test],
        "fold": [fold.name for fold in outcome.folds for _ in fold.test],
    }
    if cohort.several:
        columns["labels"] = [[str(classes[k]) for k in example.label] for example in test]  # type: ignore[union-attr]
    else:
        columns["label"] = [str(classes[example.label]) for example in test]
    for system, p_NK in systems.items():
        if cohort.several:
            columns[system] = [classes[row_K >= 0.5].tolist() for row_K in p_NK]
        else:
            columns[system] = classes[p_NK.argmax(1)].tolist()
        columns[f"{system}_probability"] = p_NK[:, 1] if binary else list(p_NK.astype(np.float64))
    written = io.BytesIO()
    table = pa.table(columns).replace_schema_metadata({"classes": "\n".join(cohort.classes)})
    pq.write_table(table, written)
    return written.getvalue()


def _curves_png(
    labels_N: Ints, systems: Mapping[str, Floats], folds_N: Ints, scores: Mapping[str, Mapping[str, Interval]]
) -> bytes:
    """ROC (the mean of the folds'), precision over recall, and reliability, side by side."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(13, 4.5), layout="constrained")  # no pyplot: it needs no display and keeps no state
    left, middle, right = figure.subplots(1, 3)
    ones = np.ones(len(labels_N))
    for system, p_NK in systems.items():
        rates = roc_within(labels_N, p_NK[:, 1], folds_N)
        left.plot(*rates, label=f"{system}, AUROC {scores[system]['auroc']}")
        recall_N, precision_N = precision_recall(labels_N, p_NK[:, 1], ones)
        middle.plot(recall_N, precision_N, label=f"{system}, AUPRC {scores[system]['auprc']}")
        said, seen, _ = zip(*reliability(labels_N, p_NK[:, 1], ones), strict=True)
        right.plot(said, seen, marker="o", markersize=3, label=f"{system}, error {scores[system]['ece']}")
    for axes in (left, right):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    middle.axhline(labels_N.mean(), color="grey", linewidth=0.8, linestyle=":")
    left.set(
        xlabel="1 - specificity",
        ylabel="sensitivity",
        title="ROC" + ", mean of the folds" * (len(np.unique(folds_N)) > 1),
    )
    middle.set(xlabel="recall", ylabel="precision", title="precision and recall")
    right.set(xlabel="probability that was said", ylabel="share that came true", title="reliability")
    for axes, place in ((left, "lower right"), (middle, "upper right"), (right, "upper left")):
        axes.set(aspect="equal", xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc=place, fontsize=8)
    return _drawn(figure)


def _confusion_png(table_KK: Ints, classes: Sequence[str]) -> bytes:
    """Which class was taken for which: the share of each row, counts written in."""
    from matplotlib.figure import Figure

    size = 2.5 + 0.55 * len(classes)
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axes = figure.subplots()
    share_KK = table_KK / np.maximum(table_KK.sum(1, keepdims=True), 1)
    axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 30:
        for row, col in np.ndindex(*table_KK.shape):
            if table_KK[row, col]:
                shade = "white" if share_KK[row, col] > 0.6 else "black"
                axes.text(col, row, f"{table_KK[row, col]:,}", ha="center", va="center", fontsize=7, color=shade)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set(xlabel="language model says", ylabel="label")
    return _drawn(figure)


def _drawn(figure: Any) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=120)
    return written.getvalue()
