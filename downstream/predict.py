"""`./launch.sh predict OUT NOTES.csv`: a fine-tuned classifier on new notes.

The file is read block by block, so one larger than memory may be given; each note is cleaned and cut as the notes that
the classifier learned from. Written is a CSV with the notes' ids, the class, and its probability (of two classes the
positive one's), calibrated as in `metrics.json`. It appears when it is whole. No text goes into it.
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
from downstream.calibration import Calibration
from downstream.classifier import NoteClassifier
from downstream.finetune import FinetuneRecipe, build, classifier_file
from downstream.metrics import Floats
from downstream.unfreezing import Labelled, probabilities
from pretrain.run import Trained, load_trained
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
    """A finished classifier: its seeds, what it calls its classes, and its calibration."""

    def __init__(self, folder: str):
        results = storage.join(folder, "metrics.json")
        if not storage.exists(results):
            raise ConfigError(f"{folder}: holds no finished classifier; run ./launch.sh finetune, or check the path")
        about = storage.read_json(results)
        self.recipe = config.validate(FinetuneRecipe, config.read_toml(storage.join(folder, "recipe.toml")), folder)
        self.trained: Trained = load_trained(self.recipe.run)
        self.classes: tuple[str, ...] = tuple(about["classes"])
        known = (about["step"], about["corpus"])
        if (self.trained.step, self.trained.corpus_fingerprint) != known:
            raise ConfigError(
                f"{folder}: was made from step {about['step']} of {self.recipe.run}, which is at step "
                f"{self.trained.step} now; fine-tune again"
            )
        self._calibration = Calibration(**about["calibration"]["model"])
        self._seeds = [self._of(folder, seed) for seed in self.recipe.seeds]

    def _of(self, folder: str, seed: int) -> NoteClassifier:
        place = storage.join(folder, classifier_file(seed))
        if not storage.exists(place):
            raise ConfigError(f"{place}: missing; remove {folder} and fine-tune again")
        made = build(self.trained, len(self.classes), self.recipe.head, seed)
        weights: dict[str, Tensor] = safetensors.torch.load(storage.read_bytes(place))
        made.load_state_dict(weights)
        return made.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Calibrated probabilities [N, K]; NaN for a text without a word."""
        cleaned = [self.trained.clean_text(text) for text in texts]
        filled = [place for place, text in enumerate(cleaned) if text.strip()]
        found = np.full((len(texts), len(self.classes)), np.nan)
        if filled:
            tokens = self.trained.tokenizer.encode([cleaned[place] for place in filled])
            notes = [note[-self.recipe.max_tokens :] for note in tokens]
            data = Labelled(notes, np.zeros(len(notes), np.int64), None)
            drawn = [probabilities(one, data, False, self.recipe.stages, lambda *_: None) for one in self._seeds]
            found[filled] = self._calibration(np.mean(drawn, axis=0))
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
    scored = empty = 0
    with storage.atomic_writer(out) as stream, logs.progress("predict", storage.size_bytes(asked.notes)) as advance:
        table = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow([asked.id, "class", "probability"])
        for block in csv_file.blocks(asked.notes, columns, BLOCK_BYTES):
            ids, texts = (column.to_pylist() for column in csv_file.parse(block, columns))
            for note, p_K in zip(ids, predictor(texts), strict=True):
                rows.writerow([note, *_said(p_K, predictor.classes)])
                empty += bool(np.isnan(p_K[0]))
            scored += len(ids)
            advance(block.stored_end, f"{scored:,} notes")
        table.detach()
    logs.say(f"{scored:,} notes in {out}" + (f"; {empty:,} without a word have no probability" if empty else ""))


def _said(p_K: Floats, classes: tuple[str, ...]) -> list[str]:
    if np.isnan(p_K[0]):
        return ["", ""]
    best = int(p_K.argmax())
    return [classes[best], f"{p_K[1] if len(classes) == 2 else p_K[best]:.6f}"]
