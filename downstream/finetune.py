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

The classes are balanced in training; what the probabilities mean is learned on validation (calibration.py).
"""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from pydantic import Field
from torch import nn

from cluster import config, logs, ray_runtime, storage
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from cluster.tracking import TrackingConfig
from downstream import baseline, folds, frozen, leakage, lm, report
from downstream.baseline import labels_of
from downstream.calibration import calibrate
from downstream.classifier import HeadConfig, NoteClassifier
from downstream.folds import Fold
from downstream.frozen import FrozenConfig
from downstream.lm import LmConfig
from downstream.metrics import Floats
from downstream.reading import PLAIN, Note, TellConfig, encode
from downstream.tasks import Task
from downstream.tasks.examples import Cohort, Example
from downstream.unfreezing import Labelled, StagesConfig, fine_tune, probabilities, read_states
from pretrain.models import MODELS
from pretrain.run import Trained, load_trained

SPLITS = ("train", "valid", "test")
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


class Work(NamedTuple):
    """What all parts share."""

    recipe: FinetuneRecipe
    out: str
    models: list[Trained]  # forward, and backward if there is one
    cohort: Cohort
    folds: list[Fold]
    unlabelled: list[tuple[str, str]]  # (patient, text) of lm.notes

    def parts(self) -> list[Part]:
        """In the order in which they are done."""
        seeds = self.recipe.seeds if self.recipe.mode == "stages" else self.recipe.seeds[:1]  # nothing is drawn there
        return [
            Part(fold, pretrained, trained.backward, seed)
            for fold in range(len(self.folds))
            for pretrained in ((True, False) if self.recipe.scratch else (True,))
            for trained in self.models
            for seed in seeds
        ]


def main(args: list[str]) -> None:
    """The verb."""
    recipe = config.load(FinetuneRecipe, args)
    check_keys(recipe)
    models = open_models(recipe)
    out = recipe.out or storage.join(recipe.run, "finetune", recipe.task.name)
    if not enter(out, recipe, models):
        logs.say(f"{out}: finished before with this recipe and checkpoint; nothing left to do")
        return
    work = prepare(recipe, out, models)
    audit(work)
    train_parts(work)
    report.write(work.out, gathered(work))


def check_keys(recipe: FinetuneRecipe) -> None:
    """Raises ConfigError for keys that contradict each other."""
    cut = recipe.folds > 1 or recipe.folds_file is not None
    if recipe.folds == 1 or (recipe.folds and recipe.folds_file):
        raise ConfigError("folds: give 2 or more, 0 for the corpus' own split, or folds_file, not both")
    if recipe.labels and not cut:
        raise ConfigError("labels: needs folds=5 (or another number), or folds_file")
    if recipe.conformal is not None and getattr(recipe.task, "several", False):
        raise ConfigError("conformal: sets need one label a note, not task.several")
    if recipe.repeats > 1 and not recipe.folds:
        raise ConfigError("repeats: needs folds=5 (or another number)")


def open_models(recipe: FinetuneRecipe) -> list[Trained]:
    """The pretrained models, forward first. Raises ConfigError where a direction is not what the key says."""
    models = [load_trained(recipe.run)]
    if recipe.backward is not None:
        models.append(load_trained(recipe.backward))
        if models[0].backward or not models[1].backward:
            raise ConfigError(
                f"backward={recipe.backward}: run= must read forwards and backward= backwards (data.backward)"
            )
        if models[0].clean != models[1].clean:
            raise ConfigError(
                f"backward={recipe.backward}: its notes were cleaned otherwise than those of {recipe.run}"
            )
    return models


def enter(out: str, recipe: FinetuneRecipe, models: Sequence[Trained]) -> bool:
    """Begins the output folder, or goes back to it; False where it is finished.

    Raises ConfigError where the folder belongs to another recipe or checkpoint.
    """
    identity: dict[str, Any] = {"recipe": fixed(recipe), "checkpoint": lineage(models[0])}
    if len(models) > 1:
        identity["backward"] = lineage(models[1])
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


def fixed(recipe: FinetuneRecipe) -> dict[str, Any]:
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


def lm_notes(work: Work, fold: Fold) -> list[tuple[str, str]]:
    """(patient, text) that the language model may read before it is asked about this fold; each text once."""
    notes = work.unlabelled or [(example.patient_id, example.text) for example in work.cohort.examples]
    return list({text: (patient, text) for patient, text in notes if patient not in fold.held_out}.values())


def train_parts(work: Work) -> None:
    """Trains every part that has not been trained, and the language models before them."""
    recipe = work.recipe
    parts = [part for part in work.parts() if not storage.exists(part_file(work.out, part))]
    if not parts:
        return
    recipe_json = json.dumps(config.dump(recipe))
    with logs.progress("fine-tuning", len(parts)) as show:
        done = 0

        def finished(part: Part) -> None:
            nonlocal done
            done += 1
            show(done, f"{part.name} of {len(work.folds)} folds, {done}/{len(parts)}")

        if not recipe.workers:
            for part in parts:
                train_part(work, part)
                finished(part)
            return
        ray_runtime.start(recipe.workers)
        try:
            tunings = (
                sorted({(part.fold, part.backward) for part in parts if part.pretrained}) if recipe.lm.epochs else []
            )
            tune = ((recipe_json, work.out, fold, backward) for fold, backward in tunings)
            for _ in ray_runtime.map_tasks(_tune_task, tune, in_flight=recipe.workers, gpus=recipe.gpus):
                pass
            items = ((recipe_json, work.out, part) for part in parts)
            for index, _ in ray_runtime.map_tasks(_part_task, items, in_flight=recipe.workers, gpus=recipe.gpus):
                finished(parts[index])
        finally:
            ray_runtime.stop()


@functools.lru_cache(maxsize=1)
def _work(recipe_json: str, out: str) -> Work:
    """The work as a Ray process knows it, made once."""
    recipe = config.validate(FinetuneRecipe, json.loads(recipe_json), out)
    return prepare(recipe, out, open_models(recipe))


def _part_task(recipe_json: str, out: str, part: Part) -> None:
    train_part(_work(recipe_json, out), part)


def _tune_task(recipe_json: str, out: str, fold: int, backward: bool) -> None:
    work = _work(recipe_json, out)
    model_of(work, Part(fold, True, backward, work.recipe.seeds[0]))


def part_file(out: str, part: Part) -> str:
    """Where a part's probabilities are."""
    return storage.join(out, "parts", f"{part.name}.npz")


def model_of(work: Work, part: Part) -> tuple[Trained, str | None]:
    """The language model that a part begins with, and the name of its weights where [lm] has made them."""
    trained = next(model for model in work.models if model.backward == part.backward)
    if not part.pretrained:
        return fresh(trained, part.seed), None
    if not work.recipe.lm.epochs:
        return trained, None
    texts = [text for _, text in lm_notes(work, work.folds[part.fold])]
    name = lm.tuned(trained, work.recipe.lm, texts, work.recipe.seeds[0])
    return lm.with_weights(trained, name), name


def fresh(trained: Trained, seed: int) -> Trained:
    """The same network with first weights."""
    kind = MODELS[trained.recipe["model"]["name"]]
    settings = config.validate(kind.Config, trained.recipe["model"], trained.run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = kind(settings, trained.tokenizer.vocab_size)
    return trained.with_model(model.eval())


def train_part(work: Work, part: Part) -> None:
    """Trains one classifier; writes its weights, and then its probabilities of `valid` and `test`."""
    recipe, fold, classes = work.recipe, work.folds[part.fold], len(work.cohort.classes)
    trained, tuned = model_of(work, part)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained.model.to(device)
    tell = recipe.tell if recipe.mode == "stages" else PLAIN
    splits = fold.splits()
    notes = {name: encode_for(trained, splits[name], recipe.max_tokens, tell) for name in SPLITS}
    labels = {name: labels_of(splits[name], classes, work.cohort.several) for name in SPLITS}
    learn = _learn_frozen if recipe.mode == "frozen" else _learn_stages
    found, weights, history = learn(work, part, trained, notes, labels)
    if part.pretrained:
        storage.write_bytes(classifier_file(work.out, recipe.mode, part), weights)
    about = np.frombuffer(json.dumps({"history": history, "lm": tuned}).encode(), np.uint8)
    storage.write_bytes(part_file(work.out, part), frozen.npz({**found, "about": about}))


Learned = tuple[dict[str, Floats], bytes, list[dict[str, Any]]]


def _learn_stages(
    work: Work, part: Part, trained: Trained, notes: Mapping[str, list[Note]], labels: Mapping[str, Any]
) -> Learned:
    recipe, stages = work.recipe, work.recipe.stages
    classifier = build(trained, len(work.cohort.classes), recipe.head, part.seed)
    tokens = {name: sum(len(note.tokens) for note in notes[name]) for name in SPLITS}
    learned = tokens["train"] + tokens["valid"]
    kept = 4 * learned * classifier.width < stages.cache_mb * 10**6
    total = learned * stages.epochs_head // (10 if kept else 1) + (learned if kept else 0)
    total += learned * (stages.epochs_top + stages.epochs_all) + tokens["valid"] + tokens["test"]
    done, said = 0, ""
    with logs.progress(part.name, total) as show:

        def advance(read_tokens: int, note: str) -> None:
            nonlocal done, said
            done, said = done + read_tokens, note or said
            show(done, said)

        data = {}
        for name in SPLITS:
            states = read_states(classifier, notes[name], stages, advance) if kept and name != "test" else None
            data[name] = Labelled(notes[name], labels[name], states)
        history = fine_tune(classifier, data["train"], data["valid"], stages, part.seed, advance)
        found = {name: probabilities(classifier, data[name], False, stages, advance) for name in ("valid", "test")}
    best = next(one for one in history if one.kept)
    logs.say(f"{part.name}: stage {best.stage} is the best on validation: {best.validation:.3f}")
    return found, _weights(classifier), [one._asdict() for one in history]


def _learn_frozen(
    work: Work, part: Part, trained: Trained, notes: Mapping[str, list[Note]], labels: Mapping[str, Any]
) -> Learned:
    recipe, fold = work.recipe, work.folds[part.fold]
    reader = build(trained, len(work.cohort.classes), recipe.head, part.seed)
    done = 0
    with logs.progress(part.name, sum(len(note.tokens) for name in SPLITS for note in notes[name])) as show:

        def advance(read_tokens: int, note: str) -> None:
            nonlocal done
            done += read_tokens
            show(done, "reading")

        data = {}
        for name in SPLITS:
            states = np.zeros((len(notes[name]), 0))
            if "states" in recipe.frozen.features:
                states = frozen.pooled_states(reader, notes[name], recipe.stages.batch, advance)
            data[name] = (fold.splits()[name], states, labels[name])
    unlabelled = fold.rest
    if work.unlabelled and not any(example.mentions for example in fold.train):
        unlabelled = [*unlabelled, *(Example("", patient, text, -1) for patient, text in lm_notes(work, fold))]
    found, model, strength = frozen.fit(recipe.frozen, data, unlabelled, recipe.seeds[0])
    return found, model.save(), [{"stage": "regression", "strength": strength}]


def encode_for(trained: Trained, examples: Sequence[Example], max_tokens: int, tell: TellConfig) -> list[Note]:
    """The notes in the direction in which the model reads."""
    notes = encode(trained.tokenizer, examples, max_tokens, tell)
    return [note.reversed() for note in notes] if trained.backward else notes


def classifier_file(out: str, mode: str, part: Part) -> str:
    """Where the weights of a part are."""
    return storage.join(out, f"classifier-{part.name}.{'npz' if mode == 'frozen' else 'safetensors'}")


def _weights(classifier: NoteClassifier) -> bytes:
    # A tied weight has two names and is stored under both: the format has no shared tensors.
    weights: bytes = safetensors.torch.save(
        {name: value.contiguous().cpu().clone() for name, value in classifier.state_dict().items()}
    )
    return weights


def build(trained: Trained, classes: int, head: HeadConfig, seed: int) -> NoteClassifier:
    """A classifier on its own copy of the language model; the head's first weights derive from the seed."""
    encoder = copy.deepcopy(trained.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = NoteClassifier(encoder, classes, head)
    return classifier.to(next(encoder.parameters()).device)


def gathered(work: Work) -> report.Outcome:
    """The predictions of all parts and of the bars, calibrated fold by fold; test notes of all folds in a row."""
    recipe, cohort, classes = work.recipe, work.cohort, len(work.cohort.classes)
    parts = work.parts()
    stored = {part: _stored(work.out, part) for part in parts}
    said: list[dict[str, dict[str, Floats]]] = []
    strengths = []
    for place, fold in enumerate(work.folds):
        systems: dict[str, dict[str, Floats]] = {}
        for name, pretrained in (("model", True), ("scratch", False)):
            here = [stored[part] for part in parts if part.fold == place and part.pretrained == pretrained]
            if here:
                systems[name] = {split: np.mean([one[split] for one in here], axis=0) for split in ("valid", "test")}
        refit = recipe.mode == "frozen"
        regression = functools.partial(baseline.tfidf_regression, fold.splits(), classes, cohort.several, refit=refit)
        bars = {"baseline": regression()}
        if any(example.mentions for example in fold.train):
            bars["untold"] = regression(baseline.untold)
        strengths.append({name: bar.strength for name, bar in bars.items()})
        systems |= {name: bar.probabilities for name, bar in bars.items()}
        systems["majority"] = baseline.majority(fold.splits(), classes, cohort.several)
        said.append(systems)
    valid = [labels_of(fold.valid, classes, cohort.several) for fold in work.folds]
    learned = [
        {name: calibrate(labels, by_split["valid"]) for name, by_split in systems.items() if name != "majority"}
        for labels, systems in zip(valid, said, strict=True)
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
        "parts": {part.name: {key: stored[part][key] for key in ("history", "lm")} for part in parts},
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


def _stored(out: str, part: Part) -> dict[str, Any]:
    with np.load(io.BytesIO(storage.read_bytes(part_file(out, part))), allow_pickle=False) as found:
        about: dict[str, Any] = json.loads(found["about"].tobytes())
        return {"valid": found["valid"], "test": found["test"], **about}
