"""`./launch.sh finetune RECIPE`: a pretrained run and a labelled task become a classifier and its score.

    task ─► cohort ─► splits by patient ─┬─► TF-IDF + logistic regression (the bar)
    run ──► language model ──────────────┴─► stages, several seeds averaged ─► test, once ─► OUT

Patients are split by the function and salt of the language model's corpus, so no patient of the test set was
ever read by the language model. Everything is chosen on validation; the test notes are scored once, at the
end. OUT holds

    recipe.toml      the resolved recipe
    run.json         what the folder belongs to: recipe, checkpoint
    classifier-seed-N.safetensors   the weights, for ./launch.sh predict
    predictions.csv  the test set: ids, label, probability by the model and by the baseline; no text
    curves.png       ROC, precision and recall, reliability (two classes)
    metrics.json     every number of the table; written last: where it is, the work is done

The classes are balanced in training; what the probabilities mean is learned on validation (calibration.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
from pydantic import Field

from cluster import config, logs, storage
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from downstream import leakage, report
from downstream.baseline import labels_of, tfidf_regression
from downstream.calibration import calibrate
from downstream.classifier import HeadConfig, NoteClassifier, Notes
from downstream.metrics import Floats
from downstream.tasks import Task
from downstream.tasks.examples import Cohort, Example
from downstream.unfreezing import Epoch, Labelled, StagesConfig, fine_tune, probabilities, read_states
from pretrain.run import Trained, load_trained
from sharding.splits import SplitConfig, split_of

SPLITS = ("train", "valid", "test")


class FinetuneRecipe(Section):
    """Which run, which task, and how to learn it."""

    run: Place = Field(description="run directory of the pretrained language model")
    out: Place | None = Field(None, description="where the results go; RUN/finetune/TASK if not given")
    task: Task = Field(discriminator="name")
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="one classifier each; their mean predicts")
    others: bool = Field(False, description="patients with ids as in the corpus are other people")
    copies: bool = Field(False, description="notes may be nearly the same as one of another split")
    max_tokens: int = Field(4096, ge=1, description="of longer notes only the last tokens are read")
    head: HeadConfig = HeadConfig()
    stages: StagesConfig = StagesConfig()
    bootstrap_draws: int = Field(1000, ge=1)


def main(args: list[str]) -> None:
    """The verb."""
    recipe = config.load(FinetuneRecipe, args)
    trained = load_trained(recipe.run)
    out = recipe.out or storage.join(recipe.run, "finetune", recipe.task.name)
    if not enter(out, recipe, trained):
        logs.say(f"{out}: finished before with this recipe and checkpoint; nothing left to do")
        return
    cohort = recipe.task.cohort(trained.clean)
    splits = split(cohort, trained.splits)
    check(splits, cohort.classes)
    if not recipe.others:
        leakage.check_unseen(splits, trained)
    if not recipe.copies:
        leakage.check_copies(splits)
    report.show_splits(splits, cohort.classes)
    baseline = tfidf_regression(splits)
    by_model, histories = predict(recipe, trained, splits, len(cohort.classes), out)
    said = {"model": by_model, "baseline": baseline.probabilities}
    valid_N = labels_of(splits["valid"])
    learned = {name: calibrate(valid_N, by_split["valid"]) for name, by_split in said.items()}
    facts = {
        "task": recipe.task.name,
        "step": trained.step,
        "corpus": trained.corpus_fingerprint,
        "baseline_strength": baseline.strength,
        "calibration": {name: one._asdict() for name, one in learned.items()},
        "epochs": [[one._asdict() for one in history] for history in histories],
    }
    systems = {name: learned[name](by_split["test"]) for name, by_split in said.items()}
    report.write(out, facts, cohort.classes, splits, systems, recipe.bootstrap_draws)


def enter(out: str, recipe: FinetuneRecipe, trained: Trained) -> bool:
    """Begins the output folder, or goes back to it; False where it is finished.

    Raises ConfigError where the folder belongs to another recipe or checkpoint.
    """
    settings = {key: value for key, value in config.dump(recipe).items() if key not in ("run", "out")}
    identity = {
        "recipe": settings,
        "checkpoint": {"step": trained.step, "corpus": trained.corpus_fingerprint},
    }
    place = storage.join(out, "run.json")
    if storage.exists(place):
        changed = config.differences(storage.read_json(place), identity)
        if changed:
            raise ConfigError(f"{out}: belongs to other settings ({'; '.join(changed[:3])}); choose another out=")
        return not storage.exists(storage.join(out, "metrics.json"))
    if storage.names(out):
        raise ConfigError(f"{out}: is not empty and was not made by finetune; choose another out=")
    storage.write_bytes(storage.join(out, "recipe.toml"), config.to_toml(recipe))
    storage.write_json(place, identity)
    return True


def split(cohort: Cohort, splits: SplitConfig) -> dict[str, list[Example]]:
    """The examples by split, in the cohort's order."""
    found: dict[str, list[Example]] = {name: [] for name in SPLITS}
    for example in cohort.examples:
        found[split_of(example.patient_id, splits)].append(example)
    return found


def check(splits: Mapping[str, Sequence[Example]], classes: Sequence[str]) -> None:
    """Raises DataError for splits that share a patient, or that cannot be learned from or scored."""
    leakage.check_patients(splits)
    for name, examples in splits.items():
        present = {example.label for example in examples}
        for label, wanted in enumerate(classes):
            # Of many classes a small validation or test set may lack one; it cannot do with fewer than two.
            if label not in present and (name == "train" or len(present) < 2):
                raise DataError(
                    f"no {name} note has the class {wanted!r} ({len(examples)} notes in all);"
                    " more patients or a larger share of [splits] in the shard recipe are needed"
                )


def predict(
    recipe: FinetuneRecipe, trained: Trained, splits: Mapping[str, Sequence[Example]], classes: int, out: str
) -> tuple[dict[str, Floats], list[list[Epoch]]]:
    """Probabilities [N, K] of the notes of `valid` and `test`, the mean over seeds, and the epochs of every seed; the
    weights go into `out`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained.model.to(device)
    stages = recipe.stages
    notes = {name: encode(trained, examples, recipe.max_tokens) for name, examples in splits.items()}
    tokens = {name: sum(len(note) for note in notes[name]) for name in notes}
    reader = build(trained, classes, recipe.head, recipe.seeds[0])
    learned = tokens["train"] + tokens["valid"]
    kept = 4 * learned * reader.width < stages.cache_mb * 10**6
    per_seed = learned * stages.epochs_head // (10 if kept else 1)
    per_seed += learned * (stages.epochs_top + stages.epochs_all) + tokens["valid"] + tokens["test"]
    total = (learned if kept else 0) + len(recipe.seeds) * per_seed
    done, said = 0, ""
    with logs.progress("fine-tuning", total) as show:

        def advance(read_tokens: int, note: str) -> None:
            nonlocal done, said
            done, said = done + read_tokens, note or said
            show(done, said)

        data = {}
        for name in SPLITS:
            states = read_states(reader, notes[name], stages, advance) if kept and name != "test" else None
            data[name] = Labelled(notes[name], labels_of(splits[name]), states)
        histories: list[list[Epoch]] = []
        drawn: dict[str, list[Floats]] = {"valid": [], "test": []}
        for seed in recipe.seeds:
            classifier = build(trained, classes, recipe.head, seed)
            histories.append(fine_tune(classifier, data["train"], data["valid"], stages, seed, advance))
            storage.write_bytes(storage.join(out, classifier_file(seed)), _weights(classifier))
            for name, found in drawn.items():
                found.append(probabilities(classifier, data[name], False, stages, advance))
    for seed, history in zip(recipe.seeds, histories, strict=True):
        best = next(one for one in history if one.kept)
        logs.say(f"seed {seed}: stage {best.stage} is the best on validation: {best.validation:.3f}")
    return {name: np.mean(found, axis=0) for name, found in drawn.items()}, histories


def classifier_file(seed: int) -> str:
    """Name of the weights of one seed in the output folder."""
    return f"classifier-seed-{seed}.safetensors"


def _weights(classifier: NoteClassifier) -> bytes:
    # A tied weight has two names and is stored under both: the format has no shared tensors.
    weights: bytes = safetensors.torch.save(
        {name: value.contiguous().cpu().clone() for name, value in classifier.state_dict().items()}
    )
    return weights


def encode(trained: Trained, examples: Sequence[Example], max_tokens: int) -> Notes:
    """Token ids of the notes; of a longer one the last `max_tokens`: a summary ends with the plan."""
    notes = trained.tokenizer.encode([example.text for example in examples])
    longer = sum(len(note) > max_tokens for note in notes)
    if longer:
        logs.say(f"{longer:,} of {len(notes):,} notes: only the last max_tokens={max_tokens:,} tokens are read")
    return [note[-max_tokens:] for note in notes]


def build(trained: Trained, classes: int, head: HeadConfig, seed: int) -> NoteClassifier:
    """A classifier on its own copy of the language model; the head's first weights derive from the seed."""
    encoder = copy.deepcopy(trained.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = NoteClassifier(encoder, classes, head)
    return classifier.to(next(encoder.parameters()).device)
