"""Run directories: what a training run leaves behind, and how a finished model is opened again.

    recipe.toml metrics.jsonl run.json tokenizer.model checkpoints/ samples/ plots/ wandb/

`run.json` is written once, when the run begins: the W&B run id of its whole life, and what the run belongs to. The
same command again goes on; another recipe is refused.
"""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cluster import config, storage
from cluster.errors import ConfigError
from pretrain import checkpoint
from pretrain.models import MODELS
from sharding.clean import CleanConfig, clean
from sharding.shards import Corpus
from sharding.splits import SplitConfig
from sharding.tokenizer import Tokenizer

# Keys that do not change what is learned; they may differ when a run goes on.
FREE_KEYS = ("run_dir", "tracking", "cluster", "engine", "log_every", "eval_every", "save_every", "keep")


def identity_of(recipe: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """What a run and its checkpoints belong to: the recipe as far as it decides what is learned, and the corpus."""
    fixed = {key: value for key, value in recipe.items() if key not in FREE_KEYS}
    fixed["precision"] = recipe["engine"]["precision"]
    fixed["data"] = {key: value for key, value in fixed["data"].items() if key != "corpus"}
    return {
        "recipe": fixed,
        "corpus": corpus.fingerprint,
        "tokenizer": corpus.tokenizer.sha256,
    }


def enter(run: str, recipe: config.Section, corpus: Corpus) -> dict[str, Any]:
    """Content of `run.json`: of the run that is there, or of a new one that is begun. Only one worker calls it.

    Raises ConfigError where the directory belongs to another recipe or corpus.
    """
    identity = identity_of(config.dump(recipe), corpus)
    place = storage.join(run, "run.json")
    if storage.exists(place):
        known: dict[str, Any] = storage.read_json(place)
        changed = config.differences(known["identity"], identity)
        if changed:
            raise ConfigError(
                f"{run}: belongs to another run ({'; '.join(changed[:3])}); choose another run_dir= or remove it"
            )
        return known
    if storage.exists(storage.join(run, checkpoint.FOLDER)):
        raise ConfigError(f"{run}: holds checkpoints but no run.json; choose another run_dir=")
    # What is needed to use the model where the corpus is not at hand.
    text = {"clean": corpus.manifest["recipe"]["clean"], "splits": corpus.manifest["recipe"]["splits"]}
    tokenizer = {"bos": corpus.tokenizer.bos, "eos": corpus.tokenizer.eos}
    begun = {"wandb_id": uuid.uuid4().hex[:12], "identity": identity, "text": text, "tokenizer": tokenizer}
    storage.write_bytes(
        storage.join(run, "tokenizer.model"), storage.read_bytes(storage.join(corpus.url, "tokenizer.model"))
    )
    storage.write_bytes(storage.join(run, "recipe.toml"), config.to_toml(recipe))
    storage.write_json(place, begun)
    return begun


def held(run: str, patience_seconds: float = 60.0) -> contextlib.AbstractContextManager[None]:
    """Keeps every other process of this machine from training in the same directory.

    The lock ends with the process, however it dies; a restarted worker waits for the one it replaces.
    """
    busy = f"{run}: another process is training in it; wait for it, stop it, or choose another run_dir="
    return storage.held(run, busy, patience_seconds)


@dataclass(frozen=True)
class Trained:
    """A trained language model with all that is needed to put text through it."""

    run: str
    step: int
    model: nn.Module  # fp32, on CPU, in evaluation mode
    tokenizer: Tokenizer
    clean: CleanConfig
    splits: SplitConfig
    recipe: dict[str, Any]
    corpus_fingerprint: str

    def clean_text(self, text: str) -> str:
        """`text` as the model's training notes were cleaned."""
        return clean(text, self.clean)


def load_trained(run: str) -> Trained:
    """The newest checkpoint of a run directory. Raises ConfigError where there is none."""
    if not storage.exists(storage.join(run, "run.json")):
        raise ConfigError(f"{run}: is not a run directory; run ./launch.sh pretrain first or check the path")
    about = storage.read_json(storage.join(run, "run.json"))
    folder = checkpoint.newest(run)
    if folder is None:
        raise ConfigError(f"{run}: has no checkpoint yet; let ./launch.sh pretrain go on")
    recipe = config.read_toml(storage.join(run, "recipe.toml"))
    tokenizer = Tokenizer(storage.read_bytes(storage.join(run, "tokenizer.model")), **about["tokenizer"])
    kind = MODELS[recipe["model"]["name"]]
    model = kind(config.validate(kind.Config, recipe["model"], f"{run}/recipe.toml: model"), tokenizer.vocab_size)
    with tempfile.TemporaryDirectory(prefix="chartlm-") as cache:
        stored = checkpoint.Reader(folder, Path(cache))
        stored.load_model(model)
    return Trained(
        run=run,
        step=stored.state.step,
        model=model.eval(),
        tokenizer=tokenizer,
        clean=config.validate(CleanConfig, about["text"]["clean"], run),
        splits=config.validate(SplitConfig, about["text"]["splits"], run),
        recipe=recipe,
        corpus_fingerprint=about["identity"]["corpus"],
    )
