"""What a fine-tuning is about: its recipe, and the task as read and cut into folds.

Every process of a run, and who uses what it left, reads it the same way. The work falls into parts (fold, pretrained or
not, direction, seed), each with files of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from cluster import config, storage
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from cluster.tracking import TrackingConfig
from downstream import folds, leakage, lm
from downstream.baseline import labels_of
from downstream.classifier import HeadConfig
from downstream.folds import Fold
from downstream.frozen import FrozenConfig
from downstream.lm import LmConfig
from downstream.reading import TellConfig
from downstream.tasks import Task
from downstream.tasks.examples import Cohort, Example
from downstream.unfreezing import StagesConfig
from pretrain.run import Trained, load_trained

RESULTS = "results.json"
FREE_KEYS = ("run", "backward", "out", "workers", "gpus", "tracking")


class FinetuneRecipe(Section):
    """Which run, which task, and how to learn it."""

    run: Place = Field(description="run directory of the pretrained language model")
    backward: Place | None = Field(None, description="run of one that reads backwards; the two predict together")
    out: Place | None = Field(None, description="where the results go; RUN/finetune/TASK if not given")
    task: Task = Field(discriminator="name")
    mode: Literal["stages", "frozen"] = Field(
        "stages", description="fine-tune, or features once and a regression on top"
    )
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="one classifier each; their mean predicts")
    scratch: bool = Field(True, description="train the same network without pretraining beside it")
    folds: int = Field(0, ge=0, description="every patient is tested once, in so many folds; 0: the corpus' test split")
    repeats: int = Field(1, ge=1, description="so many times, cut otherwise")
    folds_file: Place | None = Field(
        None, description="folds as given: CSV, JSON lines or Parquet with patient and fold"
    )
    labels: int | None = Field(None, ge=10, description="learn from so many labelled notes only (with folds)")
    others: bool = Field(False, description="patients with ids as in the corpus are other people")
    copies: bool = Field(False, description="notes may be nearly the same as one of another split")
    conformal: float | None = Field(None, gt=0, lt=1, description="sets of classes that miss the truth this often")
    max_tokens: int = Field(4096, ge=1, description="of longer notes only the last tokens are read")
    tell: TellConfig = TellConfig()
    head: HeadConfig = HeadConfig()
    stages: StagesConfig = StagesConfig()
    frozen: FrozenConfig = FrozenConfig()
    lm: LmConfig = LmConfig()
    workers: int = Field(0, ge=0, description="parts at a time, as Ray tasks; 0: in this process, one after the other")
    gpus: float = Field(0, ge=0, description="of a part that Ray runs")
    bootstrap_draws: int = Field(1000, ge=1)
    tracking: TrackingConfig = TrackingConfig()


class Part(NamedTuple):
    """One classifier to train."""

    fold: int
    pretrained: bool
    backward: bool
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        words = [
            f"fold-{self.fold + 1}",
            *([] if self.pretrained else ["scratch"]),
            *(["backward"] if self.backward else []),
        ]
        return "-".join([*words, f"seed-{self.seed}"])


def parts_of(recipe: FinetuneRecipe, models: Sequence[Trained], fold: int, pretrained: bool) -> list[Part]:
    """The parts whose mean predicts: every direction and seed."""
    seeds = recipe.seeds if recipe.mode == "stages" else recipe.seeds[:1]  # nothing is drawn there
    return [Part(fold, pretrained, trained.backward, seed) for trained in models for seed in seeds]


def kept_folds(recipe: FinetuneRecipe, folds: int) -> range:
    """The folds whose classifiers are kept, to predict: those of the first repeat. They have seen every note, and those
    of further repeats would only fill the disk.
    """
    return range(folds // recipe.repeats)


class Work(NamedTuple):
    """What all parts share."""

    recipe: FinetuneRecipe
    out: str
    models: list[Trained]  # forward, and backward if there is one
    cohort: Cohort
    folds: list[Fold]
    unlabelled: list[tuple[str, str]]  # (patient, text) of lm.notes

    def parts(self) -> list[Part]:
        """In the order in which they are done: of a fold the pretrained ones first."""
        kinds = (True, False) if self.recipe.scratch else (True,)
        cuts = [(fold, kind) for fold in range(len(self.folds)) for kind in kinds]
        return [part for fold, kind in cuts for part in parts_of(self.recipe, self.models, fold, kind)]


def check_keys(recipe: FinetuneRecipe) -> None:
    """Raises ConfigError for keys that contradict each other."""
    cut = recipe.folds > 1 or recipe.folds_file is not None
    if recipe.folds == 1 or (recipe.folds and recipe.folds_file):
        raise ConfigError("folds: give 2 or more, 0 for the corpus' own split, or folds_file, not both")
    if recipe.labels and not cut:
        raise ConfigError("labels: needs folds=5 (or another number), or folds_file")
    if recipe.conformal is not None and getattr(recipe.task, "several", False):
        raise ConfigError("conformal: sets need one label a note, not task.several")
    if recipe.mode == "frozen" and set(recipe.frozen.features) == {"place"} and recipe.task.name != "status":
        raise ConfigError("frozen.features: place is where a mention stands, and this task has none; add another")
    if recipe.repeats > 1 and not recipe.folds:
        raise ConfigError("repeats: needs folds=5 (or another number)")


def open_models(run: str, backward: str | None) -> list[Trained]:
    """The pretrained models, forward first. Raises ConfigError where a direction is not what the key says."""
    models = [load_trained(run)]
    if backward is not None:
        models.append(load_trained(backward))
        if models[0].backward or not models[1].backward:
            raise ConfigError(f"backward={backward}: run= must read forwards and backward= backwards (data.backward)")
        if models[0].clean != models[1].clean:
            raise ConfigError(f"backward={backward}: its notes were cleaned otherwise than those of {run}")
    return models


def enter(out: str, recipe: Section, models: Sequence[Trained], about: Mapping[str, Any] | None = None) -> bool:
    """Begins the output folder, or goes back to it; False where it is finished. `about`: what else it belongs to.

    Raises ConfigError where the folder belongs to another recipe, checkpoint, or to something else.
    """
    identity: dict[str, Any] = {"recipe": fixed(recipe), **(about or {})}
    for name, trained in zip(("checkpoint", "backward"), models, strict=False):
        identity[name] = lineage(trained)
    place = storage.join(out, "run.json")
    if storage.exists(place):
        changed = config.differences(storage.read_json(place), identity)
        if changed:
            raise ConfigError(f"{out}: belongs to other settings ({'; '.join(changed[:3])}); choose another out=")
        return not storage.exists(storage.join(out, RESULTS))
    if storage.names(out):
        raise ConfigError(f"{out}: is not empty and was not made by finetune; choose another out=")
    storage.write_bytes(storage.join(out, "recipe.toml"), config.to_toml(recipe))
    storage.write_json(place, identity)
    return True


def fixed(recipe: Section) -> dict[str, Any]:
    """The keys that decide what is learned; the others may differ when a run goes on."""
    return {key: value for key, value in config.dump(recipe).items() if key not in FREE_KEYS}


def lineage(trained: Trained) -> dict[str, Any]:
    """What stands for a model: its step, and hashes of its checkpoint and of the corpus it has read."""
    return {"step": trained.step, "weights": trained.checkpoint_sha256, "corpus": trained.corpus_fingerprint}


def prepare(recipe: FinetuneRecipe, out: str, models: list[Trained]) -> Work:
    """Reads the task and cuts it. Raises DataError for splits that cannot be learned from or scored."""
    cohort = recipe.task.cohort(models[0].clean)
    if recipe.folds_file:
        cut = folds.from_file(cohort, recipe.folds_file, recipe.labels, recipe.seeds[0])
    elif recipe.folds:
        cut = folds.k_folds(cohort, recipe.folds, recipe.repeats, recipe.labels, recipe.seeds[0])
    else:
        cut = folds.by_corpus(cohort, models[0].splits)
    for fold in cut:
        check(fold.splits(), cohort)
    unlabelled = lm.unlabelled(recipe.lm, models[0]) if recipe.lm.notes else []
    return Work(recipe, out, models, cohort, cut, unlabelled)


def check(splits: Mapping[str, Sequence[Example]], cohort: Cohort) -> None:
    """Raises DataError for splits that share a patient, or that cannot be learned from or scored."""
    leakage.check_patients(splits)
    for name, examples in splits.items():
        labels = labels_of(examples, len(cohort.classes), cohort.several)
        present = labels.sum(0) if cohort.several else np.bincount(labels, minlength=len(cohort.classes))
        for label, wanted in enumerate(cohort.classes):
            # Of many classes a small validation or test set may lack one; it cannot do with fewer than two.
            lacking = name == "train" or (not cohort.several and np.count_nonzero(present) < 2)
            if not present[label] and lacking:
                raise DataError(
                    f"no {name} note has the class {wanted!r} ({len(examples)} notes in all);"
                    " more patients or a larger share of [splits] in the shard recipe are needed"
                )


def lm_notes(work: Work, fold: Fold) -> list[tuple[str, str]]:
    """(patient, text) that the language model may read before it is asked about this fold; each text once."""
    notes = work.unlabelled or [(example.patient_id, example.text) for example in work.cohort.examples]
    return list({text: (patient, text) for patient, text in notes if patient not in fold.held_out}.values())


def part_file(out: str, part: Part) -> str:
    """Where a part's probabilities are."""
    return storage.join(out, "parts", f"{part.name}.npz")


def classifier_file(out: str, mode: str, part: Part) -> str:
    """Where the weights of a part are."""
    return storage.join(out, f"classifier-{part.name}.{'npz' if mode == 'frozen' else 'safetensors'}")
