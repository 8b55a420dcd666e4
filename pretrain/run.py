"""Run directories: what a training run leaves behind, and how a finished model is opened again.

    recipe.toml metrics.jsonl run.json patients.json tokenizer.model checkpoints/ samples/ plots/ wandb/

`run.json` is written once, when the run begins: the W&B run id of its whole life, and what the run belongs to. The
same command again goes on; another recipe is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster import config, storage
from cluster.errors import ConfigError
from pretrain import checkpoint
from pretrain.models import MODELS, settle_numbers
from pretrain.scoring import Plain
from pretrain.streams import StreamConfig
from sharding.clean import CleanConfig, clean
from sharding.shards import Corpus
from sharding.splits import SplitConfig
from sharding.tokenizer import Tokenizer

FILE, PATIENTS = "run.json", "patients.json"
# Keys that do not change what is learned; they may differ when a run goes on.
FREE_KEYS = (
    *("run_dir", "tracking", "cluster", "engine"),
    *("log_every", "eval_every", "save_every", "keep", "keep_best", "keep_every"),
)


def open_corpora(data: StreamConfig) -> list[Corpus]:
    """The corpora a recipe names. Raises ConfigError where they are of different tokenizers."""
    corpora = [Corpus.open(url) for url in data.urls]
    for corpus in corpora[1:]:
        if corpus.tokenizer.sha256 != corpora[0].tokenizer.sha256:
            raise ConfigError(
                f"{corpus.url}: was tokenized by another tokenizer than {corpora[0].url}; shard one of them again with "
                "the tokenizer of the other"
            )
    return corpora


def identity_of(recipe: dict[str, Any], corpora: Sequence[Corpus]) -> dict[str, Any]:
    """What a run and its checkpoints belong to: the recipe as far as it decides what is learned, and the corpora."""
    fixed = {key: value for key, value in recipe.items() if key not in FREE_KEYS}
    fixed["precision"] = recipe["engine"]["precision"]
    corpus = recipe["data"]["corpus"]
    shares = list(corpus.values()) if isinstance(corpus, dict) else [1.0]
    fixed["data"] = {key: value for key, value in fixed["data"].items() if key != "corpus"} | {"shares": shares}
    return {
        "recipe": fixed,
        "corpus": config.fingerprint([corpus.fingerprint for corpus in corpora]),
        "tokenizer": corpora[0].tokenizer.sha256,
    }


def enter(run: str, recipe: config.Section, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """Content of `run.json`: of the run that is there, or of a new one that is begun. Only one worker calls it.

    Raises ConfigError where the directory belongs to another recipe or corpus.
    """
    dumped = config.dump(recipe)
    identity = identity_of(dumped, corpora)
    place = storage.join(run, FILE)
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
    corpus = corpora[-1]
    # What is needed to use the model where the corpus is not at hand.
    text = {"clean": corpus.manifest["recipe"]["clean"], "splits": corpus.manifest["recipe"]["splits"]}
    tokenizer = {"bos": corpus.tokenizer.bos, "eos": corpus.tokenizer.eos}
    begun = {
        "wandb_id": uuid.uuid4().hex[:12],
        "identity": identity,
        "text": text,
        "tokenizer": tokenizer,
        "init_from": _source(dumped["init_from"]) if dumped.get("init_from") else None,
    }
    storage.write_bytes(
        storage.join(run, "tokenizer.model"), storage.read_bytes(storage.join(corpus.url, "tokenizer.model"))
    )
    storage.write_bytes(storage.join(run, "recipe.toml"), config.to_toml(recipe))
    storage.write_json(storage.join(run, PATIENTS), _patients(corpora, dumped.get("init_from")))
    storage.write_json(place, begun)
    return begun


def hashed(patient: str) -> str:
    """What stands for a patient in `patients.json`: 16 hex digits. Who knows all numbers of a hospital can undo it."""
    return hashlib.sha256(f"chartlm {patient}".encode()).hexdigest()[:16]


def _patients(corpora: Sequence[Corpus], source: str | None) -> dict[str, list[str]]:
    """Whom this run, and the run whose weights it begins with, has read, to train and to validate."""
    read = known_patients(source) if source else {}
    found = {}
    for split in ("train", "valid"):
        here = {
            hashed(patient)
            for corpus in corpora
            if corpus.manifest["splits"].get(split, {}).get("notes")
            for patient in corpus.split(split).patients()
        }
        found[split] = sorted(here | read.get(split, frozenset()))
    return found


def known_patients(run: str) -> dict[str, frozenset[str]]:
    """Hashed ids of the patients that a run has read, by split; empty for a run that did not keep them."""
    place = storage.join(run, PATIENTS)
    kept = storage.read_json(place) if storage.exists(place) else {}
    return {split: frozenset(names) for split, names in kept.items()}


def _source(run: str) -> dict[str, str]:
    """The checkpoint that a new run begins with; named once, so that a restart before the first save takes the same."""
    folder = checkpoint.newest(run)
    if folder is None:
        raise ConfigError(f"init_from={run}: has no checkpoint; give the directory of a run that has been trained")
    return {"run": run, "folder": folder}


def init_weights(model: nn.Module, source: dict[str, str], tokenizer: Tokenizer, cache: Path) -> None:
    """Sets the parameters of a new model from a checkpoint of another run.

    Where the vocabularies differ, the rows of the tokens that both have are taken over, and the others get the mean
    row (Howard & Ruder 2018, arXiv:1801.06146 §3.2; fastai). Raises ConfigError where the models do not fit.
    """
    about = storage.read_json(storage.join(source["run"], FILE))
    theirs = Tokenizer(storage.read_bytes(storage.join(source["run"], "tokenizer.model")), **about["tokenizer"])
    place_of = {piece: place for place, piece in enumerate(theirs.pieces())}
    rows = torch.tensor([place_of.get(piece, -1) for piece in tokenizer.pieces()])
    stored = checkpoint.Reader(source["folder"], cache)
    for name, parameter in model.named_parameters():
        value = stored.weights(name)
        if name in model.BY_TOKEN:  # type: ignore[operator]
            value = torch.where((rows >= 0).view(-1, *[1] * (value.dim() - 1)), value[rows.clamp(min=0)], value.mean(0))
        if value.shape != parameter.shape:
            raise ConfigError(
                f"init_from={source['run']}: {name} has shape {tuple(value.shape)}, here it is "
                f"{tuple(parameter.shape)}; give [model] the sizes of that run"
            )
        parameter.data.copy_(value)


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
    patients: dict[str, frozenset[str]] = field(default_factory=dict)  # hashed, by split of the corpus
    checkpoint_sha256: str = ""  # of its manifest, which has the hashes of its files

    @property
    def backward(self) -> bool:
        """Whether it reads notes from their end to their beginning."""
        return bool(self.recipe["data"].get("backward", False))

    def with_model(self, model: nn.Module) -> Trained:
        """The same with other weights."""
        return replace(self, model=model)

    def clean_text(self, text: str) -> str:
        """`text` as the model's training notes were cleaned."""
        return clean(text, self.clean)


def load_trained(run: str, changes: dict[str, Any] | None = None) -> Trained:
    """The newest checkpoint of a run directory, with `changes` to what its model does without weights (memory …).
    Raises ConfigError where there is none, or the weights do not fit.
    """
    settle_numbers()
    if not storage.exists(storage.join(run, FILE)):
        raise ConfigError(f"{run}: is not a run directory; run ./launch.sh pretrain first or check the path")
    about = storage.read_json(storage.join(run, FILE))
    folder = checkpoint.newest(run)
    if folder is None:
        raise ConfigError(f"{run}: has no checkpoint yet; let ./launch.sh pretrain go on")
    recipe = config.read_toml(storage.join(run, "recipe.toml"))
    tokenizer = Tokenizer(storage.read_bytes(storage.join(run, "tokenizer.model")), **about["tokenizer"])
    kind = MODELS[recipe["model"]["name"]]
    model = kind(config.validate(kind.Config, recipe["model"], f"{run}/recipe.toml: model"), tokenizer.vocab_size)
    with tempfile.TemporaryDirectory(prefix="chartlm-") as cache:
        stored = checkpoint.Reader(folder, Path(cache))
        for name, parameter in model.named_parameters():
            parameter.data.copy_(stored.tensor(name))
        stored.confirm(Plain(model), tokenizer.vocab_size, "fp32")
        for name, parameter in model.named_parameters():
            parameter.data.copy_(stored.weights(name))
    if changes:
        given = config.validate(kind.Config, recipe["model"] | changes, f"{run}: model")
        other = kind(given, tokenizer.vocab_size)
        if {n: p.shape for n, p in other.named_parameters()} != {n: p.shape for n, p in model.named_parameters()}:
            raise ConfigError(f"{run}: its weights do not fit {', '.join(f'model.{key}' for key in changes)}")
        other.load_state_dict(model.state_dict())
        model = other
    return Trained(
        run=run,
        step=stored.state.step,
        model=model.eval(),
        tokenizer=tokenizer,
        clean=config.validate(CleanConfig, about["text"]["clean"], run),
        splits=config.validate(SplitConfig, about["text"]["splits"], run),
        recipe=recipe,
        corpus_fingerprint=about["identity"]["corpus"],
        patients=known_patients(run),
        checkpoint_sha256=hashlib.sha256(storage.read_bytes(storage.join(folder, checkpoint.MANIFEST))).hexdigest(),
    )
