"""`./launch.sh shard RECIPE`: a file of raw notes becomes a corpus of token shards.

    plan → read* → survey (duplicates, splits) → count words* → tokenizer → write shards* → manifest (* tasks)

The same input and recipe give the same bytes whatever the number of workers, the order in which tasks end,
and how often the job was killed: blocks are cut by content, every choice is a pure function of the note, and
duplicates are found in input order. `plan.json` is written first and says what the directory is made from;
`manifest.json` is written last. The same command again goes on where the last one stopped.
"""

from __future__ import annotations

import re
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from cluster import config, logs, ray_runtime, storage
from cluster.config import Section
from cluster.errors import ConfigError, DataError
from sharding import parts, tokenizer
from sharding.clean import CLASS_TOKENS, CleanConfig
from sharding.readers import ReaderConfig
from sharding.schema import FORMAT_VERSION, SPLITS
from sharding.shards import MANIFEST, TOKENIZER, Corpus, content_fingerprint
from sharding.splits import SplitConfig
from sharding.survey import Survey, survey
from sharding.tokenizer import Tokenizer, TokenizerConfig

PLAN = "plan.json"
WORK = "work"
SHARD_NAME = rf"({'|'.join(SPLITS)})-\d+\.arrow"
# What may differ between two runs that make the same corpus.
IRRELEVANT = {"input", "output", "workers", "tokenizer_from"}


class ShardRecipe(Section):
    """All that decides about a corpus. The tokenizer is trained here or taken from another corpus."""

    input: str
    output: str
    reader: Annotated[ReaderConfig, Field(discriminator="name")]
    clean: CleanConfig = CleanConfig()
    dedup: Literal["exact", "off"] = "exact"
    splits: SplitConfig = SplitConfig()
    tokenizer: TokenizerConfig | None = None
    tokenizer_from: str | None = None
    block_mib: float = Field(default=64, gt=0, le=512)
    workers: int = Field(default=0, ge=0)  # tasks at a time; 0: one for every CPU of the cluster

    @model_validator(mode="after")
    def _one_tokenizer(self) -> ShardRecipe:
        if (self.tokenizer is None) == (self.tokenizer_from is None):
            raise ValueError("give either a [tokenizer] section or tokenizer_from=URL of another corpus")
        return self


def main(args: list[str]) -> None:
    """The verb `shard`."""
    run(config.load(ShardRecipe, args))


def run(recipe: ShardRecipe) -> Corpus:
    """Makes the corpus of a recipe, or goes on making it, or finds that it is there already."""
    donor = Corpus.open(recipe.tokenizer_from) if recipe.tokenizer_from else None
    # Tasks run in other processes, whose working directory may be another one.
    local = storage.is_local(recipe.output)
    output = str(storage.local_path(recipe.output).resolve()) if local else recipe.output
    plan = _plan(recipe, donor)
    if (finished := _adopt(output, plan)) is not None:
        logs.say(f"{recipe.output}: complete, {_notes(finished.manifest):,} notes; nothing left to do")
        return finished
    ray_runtime.start(recipe.workers)
    try:
        manifest = _make(recipe, output, plan, donor)
    except (DataError, ConfigError):
        # The input or the recipe has to change, and then nothing made so far can be used. It holds note text.
        _discard(output)
        raise
    _show(recipe.output, manifest)
    return Corpus.open(output)


def _plan(recipe: ShardRecipe, donor: Corpus | None) -> dict[str, Any]:
    """What the bytes of the corpus depend on, and nothing else."""
    decisive = {key: value for key, value in config.dump(recipe).items() if key not in IRRELEVANT}
    if donor is not None:
        decisive["tokenizer"] = donor.manifest["tokenizer"]
    source = {"size": storage.size_bytes(recipe.input), "sha256": storage.sha256(recipe.input)}
    return {"format": FORMAT_VERSION, "recipe": decisive, "input": source}


def _adopt(output: str, plan: dict[str, Any]) -> Corpus | None:
    """The finished corpus if `output` holds it, else None, with `output` ready for this plan."""
    plan_url, manifest_url = storage.join(output, PLAN), storage.join(output, MANIFEST)
    work = storage.join(output, WORK)
    if not storage.exists(plan_url):
        foreign = [name for name in storage.names(output) if name != WORK]
        foreign += [name for name in storage.names(work) if not name.startswith(parts.NAMES)]
        if foreign:
            raise ConfigError(f"{output}: holds {foreign[0]} but no {PLAN} of shards; choose another output=")
        storage.remove(work)
        storage.write_json(plan_url, plan)
        return None
    if changed := config.differences(storage.read_json(plan_url), plan):
        raise ConfigError(f"{output}: holds another corpus ({'; '.join(changed)}); choose another output=")
    if not storage.exists(manifest_url):
        return None
    try:
        finished = Corpus.open(output)
    except DataError as exc:
        logs.say(f"{exc} (which begins now)")
        storage.remove(manifest_url)
        return None
    storage.remove(work)
    return finished


def _discard(output: str) -> None:
    for name in storage.names(output):
        if name in (PLAN, WORK, TOKENIZER, MANIFEST) or re.fullmatch(SHARD_NAME, name):
            storage.remove(storage.join(output, name))


def _make(recipe: ShardRecipe, output: str, plan: dict[str, Any], donor: Corpus | None) -> dict[str, Any]:
    """All steps from notes to manifest; each finds what an earlier run has done of it."""
    work = storage.join(output, WORK)
    at_a_time = recipe.workers or ray_runtime.cpus()
    read = _read(recipe, work, plan["input"]["size"], at_a_time)
    found = survey(work, [part["index"] for part in read], exact=recipe.dedup == "exact")
    drops = sum((Counter(part["drops"]) for part in read), Counter({"duplicate": found.duplicates}))
    rows = sum(part["rows"] for part in read)
    _check(recipe, rows, found, drops)
    model = _tokenizer(recipe, output, work, found.keep, donor, at_a_time)
    written = _write(output, work, found.keep, model, at_a_time)
    splits = {split: _split_entry(split, written, found.patients[split]) for split in SPLITS}
    manifest = {
        "format": FORMAT_VERSION,
        "version": _version(),
        "recipe": plan["recipe"],
        "input": plan["input"] | {"name": recipe.input.rsplit("/", 1)[-1]},
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": model.sha256,
            "vocab_size": model.vocab_size,
            "bos": model.bos,
            "eos": model.eos,
        },
        "dtype": str(model.dtype),
        "splits": splits,
        "rows_read": rows,
        "drops": dict(sorted(drops.items())),
    }
    manifest["fingerprint"] = content_fingerprint(manifest)
    if _notes(manifest) + drops.total() != rows:
        raise DataError(f"{recipe.input}: {rows:,} records read but {_notes(manifest):,} written; report this")
    if storage.is_local(output):
        for orphan in storage.local_path(output).glob(".*.tmp"):
            orphan.unlink()  # a killed run was writing it
    storage.write_json(storage.join(output, MANIFEST), manifest)
    storage.remove(work)
    return manifest


def _read(recipe: ShardRecipe, work: str, stored_bytes: int, at_a_time: int) -> list[dict[str, Any]]:
    """Makes the parts; returns their counts in input order."""
    all_read = storage.join(work, "read.json")
    if storage.exists(all_read):
        known = [parts.done(work, "part", index, work) for index in range(storage.read_json(all_read))]
        if all(known):
            return [part for part in known if part]
    found: dict[int, dict[str, Any]] = {}

    def unread() -> Iterator[tuple[Any, ...]]:
        for block in recipe.reader.blocks(recipe.input, int(recipe.block_mib * (1 << 20))):
            if part := parts.done(work, "part", block.index, work):
                found[block.index] = part
            else:
                yield block, recipe.reader, recipe.clean, recipe.splits, work

    began, seen_bytes = time.monotonic(), 0
    with logs.progress("read", stored_bytes) as advance:
        for _, part in ray_runtime.map_tasks(parts.read_block, unread(), in_flight=at_a_time):
            found[part["index"]] = part
            seen_bytes += part["bytes_read"]
            rate = seen_bytes / 1e6 / (time.monotonic() - began)
            advance(max(done["stored_end"] for done in found.values()), f"{rate:.1f} MB/s")
    storage.write_json(all_read, len(found))
    return [found[index] for index in range(len(found))]


def _check(recipe: ShardRecipe, rows: int, found: Survey, drops: Counter[str]) -> None:
    """Raises DataError where there is nothing to train on, before the long steps."""
    kept = found.notes.total()
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(drops.items()) if count)
        raise DataError(f"{recipe.input}: no notes left of {rows:,} records ({reasons or 'the file has none'})")
    wanted = {"train": 1.0, "valid": recipe.splits.valid}
    for split, fraction in wanted.items():
        if fraction and not found.notes[split]:
            raise DataError(
                f"{recipe.input}: split {split!r} came out empty ({kept:,} notes, "
                f"{sum(found.patients.values()):,} patients); change splits.valid, splits.test or splits.salt"
            )


def _tokenizer(
    recipe: ShardRecipe, output: str, work: str, keep: list[np.ndarray], donor: Corpus | None, at_a_time: int
) -> Tokenizer:
    """The tokenizer: found, taken from another corpus, or trained on the kept training notes."""
    url = storage.join(output, TOKENIZER)
    if donor is not None:
        storage.write_bytes(url, storage.read_bytes(storage.join(donor.url, donor.manifest["tokenizer"]["file"])))
        return Tokenizer(storage.read_bytes(url), bos=donor.tokenizer.bos, eos=donor.tokenizer.eos)
    assert recipe.tokenizer is not None  # the recipe was validated
    if not storage.exists(url):
        words: Counter[str] = Counter()
        items = ((work, index, mask) for index, mask in enumerate(keep))
        with logs.progress("count words", len(keep)) as advance:
            for done, (_, counted) in enumerate(ray_runtime.map_tasks(parts.count_words, items, in_flight=at_a_time)):
                words.update(counted)
                advance(done + 1, f"{len(words):,} different words")
        logs.say(f"training a {recipe.tokenizer.kind} tokenizer of {recipe.tokenizer.vocab_size:,} on them")
        storage.write_bytes(url, tokenizer.train(words, recipe.tokenizer, CLASS_TOKENS))
    return Tokenizer(storage.read_bytes(url), bos=recipe.tokenizer.bos, eos=recipe.tokenizer.eos)


def _write(output: str, work: str, keep: list[np.ndarray], model: Tokenizer, at_a_time: int) -> list[dict[str, Any]]:
    """Writes the shards of every part; returns the manifest entries by part and split."""
    key = (model.sha256, model.bos, model.eos)
    found: dict[int, dict[str, Any]] = {}

    def unwritten() -> Iterator[tuple[Any, ...]]:
        for index, mask in enumerate(keep):
            part = parts.done(work, "shards", index, output)
            if part and part["tokenizer"] == model.sha256:
                found[index] = part
            else:
                yield output, work, index, mask, key

    began, tokens = time.monotonic(), 0
    with logs.progress("tokenize", len(keep)) as advance:
        for _, part in ray_runtime.map_tasks(parts.write_shards, unwritten(), in_flight=at_a_time):
            found[part["index"]] = part
            tokens += sum(shard["tokens"] for shard in part["shards"].values())
            advance(len(found), f"{tokens / 1e6 / (time.monotonic() - began):.2f} M tokens/s")
    return [found[index]["shards"] for index in range(len(keep))]


def _split_entry(split: str, written: list[dict[str, Any]], patients: int) -> dict[str, Any]:
    shards = [part[split] for part in written if split in part]
    totals = {key: sum(shard[key] for shard in shards) for key in ("notes", "tokens", "bytes")}
    return totals | {"patients": patients, "shards": shards}


def _notes(manifest: dict[str, Any]) -> int:
    return sum(split["notes"] for split in manifest["splits"].values())


def _version() -> str:
    """Version of the tree that runs; it need not be the installed one."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def _show(output: str, manifest: dict[str, Any]) -> None:
    logs.table(
        f"{output} ({manifest['tokenizer']['vocab_size']:,} token types)",
        ("split", "patients", "notes", "tokens", "text MB", "shards"),
        [
            (
                name,
                f"{split['patients']:,}",
                f"{split['notes']:,}",
                f"{split['tokens']:,}",
                f"{split['bytes'] / 1e6:.1f}",
                str(len(split["shards"])),
            )
            for name, split in manifest["splits"].items()
        ],
    )
    dropped = [(reason, f"{count:,}") for reason, count in manifest["drops"].items()]
    rows = [("kept", f"{_notes(manifest):,}"), *dropped, ("records read", f"{manifest['rows_read']:,}")]
    logs.table("records", ("what became of them", "number"), rows)
