"""`./launch.sh finetune RECIPE`: a pretrained run and a labelled task become a classifier and its score.

    task ─► cohort ─► folds by patient ─┬─► majority, TF-IDF + logistic regression (the bars)
    run ─► language model ([lm]: it reads the target text first) ─┬─► stages or frozen ─► seeds and directions averaged
    no pretraining, the same network ─────────────────────────────┘        ─► every test note once ─► OUT

With folds = 0 patients are split by the function and salt of the language model's corpus, so no patient of the test
set was ever read by it. Everything is chosen on validation. The work falls into parts (fold, pretrained or not,
direction, seed), each kept when it is done: the same command goes on, and with `workers` Ray does several at a time.
OUT holds

    recipe.toml run.json   the resolved recipe; what the folder belongs to
    parts/                 probabilities and history of every part
    classifier-….safetensors (frozen: .npz)   for ./launch.sh predict and explain
    predictions.parquet    tested notes: ids, fold, label, classes and probabilities by every system; no text
    curves.png             ROC, precision and recall, reliability (two classes), or the confusion of several
    results.json           every number of the table, and what it came from; written last: where it is, the work is done

The classes are balanced in training; what the probabilities mean is learned on validation, in the frozen mode on all
labelled notes, each said by models that have not seen it (calibration.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster import config, logs, storage
from cluster.config import Section
from downstream import baseline, folds, leakage, report
from downstream.baseline import labels_of
from downstream.calibration import calibrate
from downstream.concepts import train as concepts
from downstream.concepts.train import ConceptsRecipe
from downstream.folds import Fold
from downstream.metrics import Floats
from downstream.parts import SPLITS, stored, train_parts
from downstream.work import (
    FinetuneRecipe,
    Work,
    check_keys,
    enter,
    fixed,
    lineage,
    lm_notes,
    open_models,
    prepare,
)


def recipe_of(args: Sequence[str]) -> type[Section]:
    """The class of the recipe that the words of the verb give, by `task.name`."""
    task = config.given(args)[0].get("task")
    return ConceptsRecipe if isinstance(task, dict) and task.get("name") == "concepts" else FinetuneRecipe


def main(args: list[str]) -> None:
    """The verb."""
    if recipe_of(args) is ConceptsRecipe:
        return concepts.main(args)
    recipe = config.load(FinetuneRecipe, args)
    check_keys(recipe)
    models = open_models(recipe.run, recipe.backward)
    out = recipe.out or storage.join(recipe.run, "finetune", recipe.task.name)
    if not enter(out, recipe, models):
        logs.say(f"{out}: finished before with this recipe and checkpoint; nothing left to do")
        return
    work = prepare(recipe, out, models)
    audit(work)
    train_parts(work)
    report.write(work.out, gathered(work))


def audit(work: Work) -> None:
    """Stops where something leaks from the test notes or a fold is too small, and shows what there is to learn from."""
    recipe = work.recipe
    if recipe.conformal is not None:
        for fold in work.folds:
            untrained_NK = np.zeros((len(fold.valid), len(work.cohort.classes)))
            report.conformal_limits(fold, work.cohort, untrained_NK, recipe.conformal)
    for fold in work.folds:
        for trained in [] if recipe.others else work.models:
            leakage.check_unseen(fold.splits(), trained)
    if not recipe.copies:
        leakage.check_copies([fold.splits() for fold in work.folds])
        if recipe.lm.epochs and recipe.lm.notes:
            for fold in work.folds:
                leakage.check_unlabelled(fold.test, lm_notes(work, fold))
    if len(work.folds) == 1:
        report.show_splits(work.folds[0].splits(), work.cohort)
    else:
        logs.say(folds.show_counts(work.folds))


def gathered(work: Work) -> report.Outcome:
    """The predictions of all parts and of the bars, calibrated fold by fold; test notes of all folds in a row."""
    recipe, cohort, classes = work.recipe, work.cohort, len(work.cohort.classes)
    parts = work.parts()
    left = {part: stored(work.out, part) for part in parts}
    said: list[dict[str, dict[str, Floats]]] = []
    strengths = []
    for place, fold in enumerate(work.folds):
        systems: dict[str, dict[str, Floats]] = {}
        for name, pretrained in (("model", True), ("scratch", False)):
            here = [left[part] for part in parts if part.fold == place and part.pretrained == pretrained]
            if here:
                told = [split for split in SPLITS if all(split in one for one in here)]
                systems[name] = {split: np.mean([one[split] for one in here], axis=0) for split in told}
        refit = recipe.mode == "frozen"
        regression = functools.partial(baseline.tfidf_regression, fold.splits(), classes, cohort.several, refit=refit)
        bars = {"baseline": regression()}
        if any(example.mentions for example in fold.train):
            bars["untold"] = regression(baseline.untold)
        strengths.append({name: bar.strength for name, bar in bars.items()})
        systems |= {name: bar.probabilities for name, bar in bars.items()}
        systems["majority"] = baseline.majority(fold.splits(), classes, cohort.several)
        said.append(systems)

    def learn(fold: Fold, by_split: Mapping[str, Floats]) -> Any:
        # In the frozen mode of all labelled notes: of a few hundred a fifth would calibrate each fold differently.
        known = [split for split in ("train", "valid") if split in by_split]
        labels = np.concatenate([labels_of(fold.splits()[split], classes, cohort.several) for split in known])
        return calibrate(labels, np.concatenate([by_split[split] for split in known]))

    learned = [
        {name: learn(fold, by_split) for name, by_split in systems.items() if name != "majority"}
        for fold, systems in zip(work.folds, said, strict=True)
    ]
    joined = {
        name: {
            split: np.concatenate(
                [_calibrated(one.get(name), by_name[name][split]) for one, by_name in zip(learned, said, strict=True)]
            )
            for split in ("valid", "test")
        }
        for name in said[0]
    }
    facts = {
        "task": recipe.task.name,
        "mode": recipe.mode,
        "lineage": {
            "run": recipe.run,
            **{("backward" if one.backward else "model"): lineage(one) for one in work.models},
            "recipe": config.fingerprint(fixed(recipe)),
        },
        "baseline_strengths": strengths,
        "calibration": [{name: one._asdict() for name, one in by_name.items()} for by_name in learned],
        "parts": {part.name: {key: left[part][key] for key in ("history", "lm")} for part in parts},
    }
    return report.Outcome(
        cohort,
        work.folds,
        joined,
        facts,
        recipe.bootstrap_draws,
        recipe.conformal,
        recipe.tracking,
    )


def _calibrated(learned: Any, probabilities_NK: Floats) -> Floats:
    return probabilities_NK if learned is None else learned(probabilities_NK)  # majority has none
