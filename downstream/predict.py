"""`./launch.sh predict OUT NOTES.csv`: a fine-tuned classifier on new notes.

The file is read block by block, so one larger than memory may be given; each note is cleaned and cut as the notes that
the classifier learned from. Written is a CSV with the notes' ids, the class, and its probability (of two classes the
positive one's), calibrated as in `results.json`. It appears when it is whole. No text goes into it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from cluster import config, logs, storage
from cluster.config import Place, Section
from cluster.errors import ConfigError
from downstream.calibration import restored
from downstream.classifier import NoteClassifier
from downstream.frozen import Frozen, pooled_states
from downstream.lm import with_weights
from downstream.metrics import Floats
from downstream.parts import build, encode_for
from downstream.reading import PLAIN
from downstream.tasks.examples import Example
from downstream.tasks.status import StatusTask
from downstream.unfreezing import Labelled, probabilities
from downstream.work import (
    RESULTS,
    FinetuneRecipe,
    Part,
    classifier_file,
    kept_folds,
    lineage,
    open_models,
    parts_of,
)
from pretrain.run import Trained
from sharding.readers import csv_file

BLOCK_BYTES = 4 << 20  # of the file, in memory at a time


class PredictRecipe(Section):
    """`./launch.sh predict OUT NOTES.csv [id=COLUMN] [text=COLUMN] [out=FILE]`."""

    classifier: Place = Field(description="what finetune left: RUN/finetune/TASK")
    notes: Place = Field(description="a CSV, perhaps compressed")
    id: str = Field("ROW_ID", description="column that names a note")
    text: str = Field("TEXT", description="column of the note")
    out: Place | None = Field(None, description="the CSV to write; if not given, beside the classifier")


class Predictor:
    """A finished classifier: its folds, seeds and directions, what it calls its classes, and its calibration."""

    def __init__(self, folder: str):
        results = storage.join(folder, RESULTS)
        if not storage.exists(results):
            raise ConfigError(f"{folder}: holds no finished classifier; run ./launch.sh finetune, or check the path")
        about = storage.read_json(results)
        self.recipe = config.validate(FinetuneRecipe, config.read_toml(storage.join(folder, "recipe.toml")), folder)
        self.models: list[Trained] = open_models(self.recipe.run, self.recipe.backward)
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self.several = bool(getattr(self.recipe.task, "several", False))
        for trained in self.models:
            known = about["lineage"]["backward" if trained.backward else "model"]
            if lineage(trained) != known:
                raise ConfigError(
                    f"{folder}: was made from step {known['step']} of {trained.run}, which is at step {trained.step} "
                    "now or was trained again; fine-tune again"
                )
        folds = kept_folds(self.recipe, len(about["calibration"]))
        self._calibration = [restored(about["calibration"][fold]["model"]) for fold in folds]
        self.parts = [part for fold in folds for part in parts_of(self.recipe, self.models, fold, True)]
        self.tell = self.recipe.tell if self.recipe.mode == "stages" else PLAIN
        self._tuned: dict[Part, str | None] = {part: about["parts"][part.name]["lm"] for part in self.parts}
        self._made = {part: self._of(folder, part) for part in self.parts}

    def model_of(self, part: Part) -> Trained:
        """The language model of a part's direction."""
        return next(trained for trained in self.models if trained.backward == part.backward)

    def _of(self, folder: str, part: Part) -> tuple[NoteClassifier, Frozen | None]:
        place = classifier_file(folder, self.recipe.mode, part)
        if not storage.exists(place):
            raise ConfigError(f"{place}: missing; remove {folder} and fine-tune again")
        content = storage.read_bytes(place)
        frozen = self.recipe.mode == "frozen"
        trained, tuned = self.model_of(part), self._tuned[part]
        if frozen and tuned is not None:
            trained = with_weights(trained, tuned)
        made = build(trained, len(self.classes), self.recipe.head, part.seed)
        if not frozen:
            weights: dict[str, Tensor] = safetensors.torch.load(content)
            made.load_state_dict(weights)
        made = made.to("cuda" if torch.cuda.is_available() else "cpu")
        return made, Frozen.load(self.recipe.frozen, content) if frozen else None

    def classifier(self, part: Part) -> NoteClassifier:
        """Of a fine-tuned part. Raises ConfigError where the mode is another."""
        made, frozen = self._made[part]
        if frozen is not None:
            raise ConfigError(
                'mode="frozen" has no attention; fine-tune with mode="stages" and attention in head.pooling'
            )
        return made

    def said(self, p_K: Floats) -> list[str]:
        """Class and probability, of two classes the second one's; with several labels all that are likely."""
        if self.several:
            likely = np.flatnonzero(p_K >= 0.5)
            return [";".join(self.classes[k] for k in likely), ";".join(f"{p_K[k]:.6f}" for k in likely)]
        best = int(p_K.argmax())
        return [self.classes[best], f"{p_K[1] if len(self.classes) == 2 else p_K[best]:.6f}"]

    def example(self, note: str, text: str) -> Example | None:
        """A new note as the classifier is asked about it; None where it has no word, or no mention of what is asked."""
        cleaned = self.models[0].clean_text(text)
        if isinstance(self.recipe.task, StatusTask):
            return self.recipe.task.ask(note, cleaned)
        return Example(note, note, cleaned, -1) if cleaned.strip() else None

    def __call__(self, examples: Sequence[Example]) -> Floats:
        """Calibrated probabilities [N, K]: the mean over folds, of each the mean over directions and seeds."""
        notes = {
            trained.backward: encode_for(trained, examples, self.recipe.max_tokens, self.tell)
            for trained in self.models
        }
        by_fold: list[list[Floats]] = [[] for _ in self._calibration]
        empty = np.zeros((len(examples), len(self.classes)) if self.several else len(examples), np.int64)
        states: dict[tuple[bool, str | None], Floats] = {}  # folds may share a language model: it reads once
        for part, (made, frozen) in self._made.items():
            read, model = notes[part.backward], (part.backward, self._tuned[part])
            if frozen is not None:
                if frozen.reads and model not in states:
                    states[model] = pooled_states(made, read, self.recipe.stages.batch, lambda *_: None)
                by_fold[part.fold].append(frozen(examples, states[model] if frozen.reads else None))
            else:
                data = Labelled(read, empty, None)
                by_fold[part.fold].append(probabilities(made, data, False, self.recipe.stages, lambda *_: None))
        calibrated = [one(np.mean(drawn, axis=0)) for one, drawn in zip(self._calibration, by_fold, strict=True)]
        found: Floats = np.mean(calibrated, axis=0)
        return found


def main(args: list[str]) -> None:
    """The verb."""
    places = [word for word in args if "=" not in word]
    if len(places) != 2:
        raise ConfigError("predict what? give the folder of a classifier and a CSV of notes")
    named = [f"classifier={places[0]}", f"notes={places[1]}", *(word for word in args if "=" in word)]
    asked = config.load(PredictRecipe, named, None)
    predictor = Predictor(asked.classifier)
    name = asked.notes.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
    out = asked.out or storage.join(asked.classifier, f"predictions-{name}.csv")
    columns = [asked.id, asked.text]
    scored = left_out = 0
    with storage.atomic_writer(out) as stream, logs.progress("predict", storage.size_bytes(asked.notes)) as advance:
        table = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow([asked.id, "class", "probability"])
        for block in csv_file.blocks(asked.notes, columns, BLOCK_BYTES):
            ids, texts = (column.to_pylist() for column in csv_file.parse(block, columns))
            examples = [predictor.example(note, text) for note, text in zip(ids, texts, strict=True)]
            asked_about = [example for example in examples if example is not None]
            found = iter(predictor(asked_about)) if asked_about else iter(())
            for note, example in zip(ids, examples, strict=True):
                said = ["", ""] if example is None else predictor.said(next(found))
                rows.writerow([note, *said])
                left_out += example is None
            scored += len(ids)
            advance(block.stored_end, f"{scored:,} notes")
        table.detach()
    why = "a mention" if isinstance(predictor.recipe.task, StatusTask) else "a word"
    logs.say(f"{scored:,} notes in {out}" + (f"; {left_out:,} without {why} have no probability" if left_out else ""))
