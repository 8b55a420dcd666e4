"""The parts of a fine-tuning: one classifier each, trained here or as Ray tasks, kept when it is done."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from cluster import config, logs, storage
from downstream import frozen, lm
from downstream.baseline import labels_of
from downstream.classifier import HeadConfig, NoteClassifier
from downstream.metrics import Floats
from downstream.reading import PLAIN, Note, TellConfig, encode
from downstream.tasks.examples import Example
from downstream.unfreezing import Labelled, fine_tune, probabilities, read_states
from downstream.work import (
    FinetuneRecipe,
    Part,
    Work,
    classifier_file,
    kept_folds,
    lm_notes,
    open_models,
    part_file,
    prepare,
)
from pretrain.models import MODELS
from pretrain.run import Trained

SPLITS = ("train", "valid", "test")
TASK_EVERY_SECONDS = 60.0  # between two lines of a task that runs beside others
Tell = Callable[[str], None]


def train_parts(work: Work) -> None:
    """Trains every part that has not been trained, and the language models before them."""
    recipe = work.recipe
    parts = [part for part in work.parts() if not storage.exists(part_file(work.out, part))]
    if not parts:
        return
    names = [f"{part.name} of {len(work.folds)} folds" for part in parts]
    if not recipe.workers:
        with _counted("fine-tuning", names) as finished:
            for index, part in enumerate(parts):
                train_part(work, part)
                finished(index)
        return
    from cluster import ray_runtime  # takes Ray along: who trains here or predicts does not wait for it

    recipe_json = json.dumps(config.dump(recipe))
    ray_runtime.start(recipe.workers)
    try:
        with ray_runtime.told() as tell:
            run = functools.partial(ray_runtime.map_tasks, in_flight=recipe.workers, gpus=recipe.gpus)
            if recipe.lm.epochs:
                learned = sorted({(part.fold, part.backward) for part in parts if part.pretrained})
                tuned = [f"fold {fold + 1} of {len(work.folds)}" for fold, _ in learned]
                with _counted("language models", tuned) as finished:
                    tune = ((recipe_json, work.out, *one, tell) for one in learned)
                    for index, _ in run(_tune_task, tune):
                        finished(index)
            with _counted("fine-tuning", names) as finished:
                for index, _ in run(_part_task, ((recipe_json, work.out, part, tell) for part in parts)):
                    finished(index)
    finally:
        ray_runtime.stop()


@contextlib.contextmanager
def _counted(label: str, names: Sequence[str]) -> Iterator[Callable[[int], None]]:
    """Progress by how many of `names` are done; to be called with the place of one that is."""
    done = 0
    with logs.progress(label, len(names)) as show:
        show(0, "")  # the clock begins before the first is done

        def finished(index: int) -> None:
            nonlocal done
            done += 1
            show(done, f"{names[index]}, {done}/{len(names)}")

        yield finished


@functools.lru_cache(maxsize=1)
def _work(recipe_json: str, out: str) -> Work:
    """The work as a Ray process knows it, made once."""
    recipe = config.validate(FinetuneRecipe, json.loads(recipe_json), out)
    return prepare(recipe, out, open_models(recipe.run, recipe.backward))


def _part_task(recipe_json: str, out: str, part: Part, tell: Tell) -> None:
    work = _work(recipe_json, out)  # what it says of the task has been said
    logs.forward(tell, TASK_EVERY_SECONDS)
    train_part(work, part)


def _tune_task(recipe_json: str, out: str, fold: int, backward: bool, tell: Tell) -> None:
    work = _work(recipe_json, out)
    logs.forward(lambda line: tell(f"fold {fold + 1}{', backward' * backward}: {line}"), TASK_EVERY_SECONDS)
    model_of(work, Part(fold, True, backward, work.recipe.seeds[0]))


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
    if part.pretrained and part.fold in kept_folds(recipe, len(work.folds)):
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
    total = sum(len(note.tokens) for name in SPLITS for note in notes[name])
    with logs.progress(f"{part.name}, reading", total) as show:

        def advance(read_tokens: int, note: str) -> None:
            nonlocal done
            done += read_tokens
            show(done, "")

        data = {}
        for name in SPLITS:
            states = np.zeros((len(notes[name]), 0))
            if "states" in recipe.frozen.features:
                states = frozen.pooled_states(reader, notes[name], recipe.stages.batch, advance)
            data[name] = (fold.splits()[name], states, labels[name])
    unlabelled = fold.rest
    if work.unlabelled and not any(example.mentions for example in fold.train):
        unlabelled = [*unlabelled, *(Example("", patient, text, -1) for patient, text in lm_notes(work, fold))]
    found, model, chosen = frozen.fit(recipe.frozen, data, unlabelled, recipe.seeds[0])
    counting = f", states count {chosen['scale']:g}" if "states" in recipe.frozen.features else ""
    logs.say(f"{part.name}: chosen by cross-validation: C {chosen['strength']:g}{counting}")
    return found, model.save(), [{"stage": "regression", **chosen}]


def encode_for(trained: Trained, examples: Sequence[Example], max_tokens: int, tell: TellConfig) -> list[Note]:
    """The notes in the direction in which the model reads."""
    notes = encode(trained.tokenizer, examples, max_tokens, tell)
    return [note.reversed() for note in notes] if trained.backward else notes


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


def stored(out: str, part: Part) -> dict[str, Any]:
    """What a part has left: probabilities [N, K] of `valid` and `test`, of `train` where it is told by models that have
    not seen a note, its history, the weights it began with.
    """
    with np.load(io.BytesIO(storage.read_bytes(part_file(out, part))), allow_pickle=False) as found:
        about: dict[str, Any] = json.loads(found["about"].tobytes())
        return {**{name: found[name] for name in SPLITS if name in found}, **about}
