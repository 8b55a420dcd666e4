"""`./launch.sh shard RECIPE`: files of raw notes become a corpus of token shards.

    plan → read* → survey (duplicates, splits, order) → count words* → tokenizer → encode* → pack* → manifest
                                                                                        (* tasks)

The same input and recipe give the same bytes whatever the number of workers, the order in which tasks end,
and how often the job was killed: blocks are cut by content, every choice is a pure function of the note, and
duplicates are found in input order. `plan.json` is written first and says what the directory is made from;
`manifest.json` is written last. The same command again goes on where the last one stopped.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from cluster import arrow, config, logs, memory, ray_runtime, storage
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from sharding import parts, stats, tokenizer
from sharding.clean import CLASS_TOKENS, CleanConfig
from sharding.readers import ReaderConfig
from sharding.schema import FORMAT_VERSION, SPLITS, Run
from sharding.shards import MANIFEST, PLAN, SHARD_NAME, TOKENIZER, Corpus, content_fingerprint, sealed
from sharding.splits import SplitConfig
from sharding.stats import STATS
from sharding.survey import Survey, survey
from sharding.tokenizer import Tokenizer, TokenizerConfig

WORK = "work"
HASHED_BYTES = 16 << 20
# What may differ between two runs that make the same corpus.
IRRELEVANT = {"input", "output", "workers", "tokenizer_from"}


class ShardRecipe(Section):
    """All that decides about a corpus. The tokenizer is trained here or taken from another corpus.

    `input` is a file, a folder, or a pattern with `*`. `block_mib` is the size of a task's input
    (larger ones are slower a byte: their arrays leave the processor's cache), `shard_mib` of the text of a shard.
    """

    input: Place
    output: Place
    reader: Annotated[ReaderConfig, Field(discriminator="name")]
    clean: CleanConfig = CleanConfig()
    dedup: parts.Compare = "exact"
    near_similarity: float = Field(default=0.7, gt=0, le=1)  # Jaccard; as Gabriel et al. 2018 for MIMIC-III
    splits: SplitConfig = SplitConfig()
    tokenizer: TokenizerConfig | None = None
    tokenizer_from: Place | None = None
    order: Literal["notes", "patients"] = "notes"  # shuffled notes; shuffled patients, notes in time order
    seed: int = Field(default=1, ge=0)  # of the order
    block_mib: float = Field(default=16, gt=0, le=512)
    shard_mib: float = Field(default=64, gt=0, le=512)
    workers: int = Field(default=0, ge=0)  # tasks at a time; 0: one for every CPU of the cluster

    @model_validator(mode="after")
    def _one_tokenizer(self) -> ShardRecipe:
        if (self.tokenizer is None) == (self.tokenizer_from is None):
            raise ValueError("give either a [tokenizer] section or tokenizer_from=URL of another corpus")
        return self

    @model_validator(mode="after")
    def _patients_are_known(self) -> ShardRecipe:
        if getattr(self.reader, "patient_id", "known") is None and (self.dedup == "near" or self.order == "patients"):
            key = "dedup='near'" if self.dedup == "near" else "order='patients'"
            raise ValueError(f"{key} looks at the notes of a patient; name the column in reader.patient_id")
        return self


def main(args: list[str]) -> None:
    """The verb `shard`."""
    run(config.load(ShardRecipe, args))


def run(recipe: ShardRecipe) -> Corpus:
    """Makes the corpus of a recipe, or goes on making it, or finds that it is there already."""
    arrow.settle()
    memory.keep_freed()
    donor = Corpus.open(recipe.tokenizer_from) if recipe.tokenizer_from else None
    # Tasks run in other processes, whose working directory may be another one.
    output = storage.absolute(recipe.output)
    sources = storage.expand(storage.absolute(recipe.input))
    plan = _plan(recipe, sources, donor)
    with storage.held(output, f"{recipe.output}: another process is writing shards there; wait for it or stop it"):
        if (finished := _adopt(output, plan)) is not None:
            logs.say(f"{recipe.output}: complete, {_notes(finished.manifest):,} notes; nothing left to do")
            return finished
        if not any(url.startswith("memory://") for url in (output, *sources)):
            ray_runtime.start(recipe.workers)  # memory:// lives in this process only, and so do its tasks
        try:
            manifest = _Job(recipe, sources, output, plan, donor).make()
        except (DataError, ConfigError):
            # The input or the recipe has to change, and then nothing made so far can be used. It holds note text.
            _discard(output)
            raise
    _show(recipe.output, manifest, storage.read_json(storage.join(output, STATS)))
    return Corpus.open(output)


def _plan(recipe: ShardRecipe, sources: list[str], donor: Corpus | None) -> dict[str, Any]:
    """What the bytes of the corpus depend on, and nothing else."""
    decisive = {key: value for key, value in config.dump(recipe).items() if key not in IRRELEVANT}
    if recipe.dedup != "near":
        del decisive["near_similarity"]
    if donor is not None:
        decisive["tokenizer"] = donor.manifest["tokenizer"]
    content = {
        "files": len(sources),
        "size": sum(map(storage.size_bytes, sources)),
        "digest": config.fingerprint([_digests(url, recipe.workers or os.cpu_count() or 1) for url in sources]),
    }
    return sealed({"format": FORMAT_VERSION, "recipe": decisive, "input": content})


def _digests(url: str, threads: int) -> list[str]:
    """sha256 of each piece of a file, so that several processors can look at it."""
    size = storage.size_bytes(url)

    def digest(start: int) -> str:
        return hashlib.sha256(storage.read_range(url, start, min(start + HASHED_BYTES, size))).hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(digest, range(0, size, HASHED_BYTES)))


def _adopt(output: str, plan: dict[str, Any]) -> Corpus | None:
    """The finished corpus if `output` holds it, else None, with `output` ready for this plan."""
    plan_url, manifest_url = storage.join(output, PLAN), storage.join(output, MANIFEST)
    work = storage.join(output, WORK)
    if not storage.exists(plan_url):
        foreign = [name for name in storage.names(output) if name not in (WORK, storage.LOCK)]
        foreign += [name for name in storage.names(work) if not name.startswith(parts.NAMES)]
        if foreign:
            raise ConfigError(f"{output}: holds {foreign[0]} but no {PLAN} of shards; choose another output=")
        storage.remove(work)
        storage.write_json(plan_url, plan)
        return None
    if changed := config.differences(storage.read_json(plan_url), plan):
        changed = [change for change in changed if not change.startswith("checksum")] or changed
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
        if name in (PLAN, WORK, TOKENIZER, STATS, MANIFEST) or re.fullmatch(SHARD_NAME, name):
            storage.remove(storage.join(output, name))


class _Job:
    """One run of the job: every step finds what an earlier run has done of it."""

    def __init__(
        self, recipe: ShardRecipe, sources: list[str], output: str, plan: dict[str, Any], donor: Corpus | None
    ) -> None:
        self.recipe, self.sources, self.output, self.plan, self.donor = recipe, sources, output, plan, donor
        self.work = storage.join(output, WORK)
        self.at_a_time = recipe.workers or ray_runtime.cpus()
        self._run: Run = functools.partial(ray_runtime.results, in_flight=self.at_a_time)
        self.block_bytes = max(int(recipe.block_mib * (1 << 20)), 1)

    def make(self) -> dict[str, Any]:
        """All steps from notes to manifest, which is returned."""
        recipe = self.recipe
        read = self._read()
        found = survey(
            self.work,
            read,
            recipe.dedup,
            recipe.near_similarity,
            recipe.order,
            max(int(recipe.shard_mib * (1 << 20)), 1),
            recipe.seed,
            self._run,
        )
        rows = sum(part["rows"] for part in read)
        counted_drops = Counter(found.drops)
        for part in read:
            counted_drops.update(part["drops"])
        drops = dict(sorted(counted_drops.items()))
        self._check(rows, found, drops)
        model = self._tokenizer(found)
        encoded = self._encode(read, found, model)
        packed = self._pack(found, encoded, model)
        by_split = {
            split: [sidecar for name, sidecar in packed.items() if name.startswith(f"{split}-")] for split in SPLITS
        }
        counted = {split: [sidecar["stats"] for sidecar in sidecars] for split, sidecars in by_split.items()}
        storage.write_json(storage.join(self.output, STATS), sealed(stats.whole(counted, encoded, rows, drops)))
        manifest = {
            "format": FORMAT_VERSION,
            "version": _version(),
            "recipe": self.plan["recipe"],
            "tokenizer": {
                "file": TOKENIZER,
                "sha256": model.sha256,
                "vocab_size": model.vocab_size,
                "kind": model.kind,
                "bos": model.bos,
                "eos": model.eos,
            },
            "dtype": str(model.dtype),
            "splits": {split: _split_entry(by_split[split], found.patients[split]) for split in SPLITS},
            "rows_read": rows,
            "drops": drops,
        }
        manifest["fingerprint"] = content_fingerprint(manifest)
        if _notes(manifest) + sum(drops.values()) != rows:
            raise DataError(f"{recipe.input}: {rows:,} records read but {_notes(manifest):,} written; report this")
        if storage.is_local(self.output):
            for orphan in storage.local_path(self.output).glob(".*.tmp"):
                orphan.unlink()  # a killed run was writing it
        manifest = sealed(manifest)
        storage.write_json(storage.join(self.output, MANIFEST), manifest)
        storage.remove(self.work)
        return manifest

    def _read(self) -> list[dict[str, Any]]:
        """Makes the parts; returns their counts in input order."""
        all_read = storage.join(self.work, "read.json")
        if storage.exists(all_read):
            known = [parts.done(self.work, "read", index) for index in range(storage.read_json(all_read))]
            if all(known):
                return [part for part in known if part]
        found: dict[int, dict[str, Any]] = {}
        file_of_block: dict[int, int] = {}
        recipe = self.recipe
        compare: parts.Compare = recipe.dedup
        if compare == "off" and recipe.tokenizer is not None and recipe.tokenizer.sample < 1:
            compare = "exact"  # the sample goes by digest

        def unread() -> Iterator[tuple[Any, ...]]:
            number = itertools.count()
            for file, url in enumerate(self.sources):
                for block in recipe.reader.blocks(url, self.block_bytes, self._run):
                    index = next(number)
                    file_of_block[index] = file
                    if part := parts.done(self.work, "read", index):
                        found[index] = part
                    else:
                        yield index, block, recipe.reader, recipe.clean, recipe.splits, compare, self.work

        ends = np.cumsum([0, *map(storage.size_bytes, self.sources)])
        with logs.progress("read", int(ends[-1])) as advance, _Rate() as rate:
            for _, part in ray_runtime.map_tasks(parts.read_block, unread(), in_flight=self.at_a_time):
                found[part["index"]] = part
                rate.add(part["bytes_read"] / 1e6)
                seen = max(ends[file_of_block[index]] + done["stored_end"] for index, done in found.items())
                advance(int(seen), f"{rate.per_second:.1f} MB/s")
        storage.write_json(all_read, len(found))
        return [found[index] for index in range(len(found))]

    def _check(self, rows: int, found: Survey, drops: dict[str, int]) -> None:
        """Raises DataError where there is nothing to train on, before the long steps."""
        kept = found.notes.total()
        if not kept:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in drops.items() if count)
            raise DataError(
                f"{self.recipe.input}: no notes left of {rows:,} records ({reasons or 'the file has none'})"
            )
        wanted = {"train": 1.0, "valid": self.recipe.splits.valid}
        for split, fraction in wanted.items():
            if fraction and not found.notes[split]:
                raise DataError(
                    f"{self.recipe.input}: split {split!r} came out empty ({kept:,} notes, "
                    f"{sum(found.patients.values()):,} patients); change splits.valid, splits.test or splits.salt"
                )

    def _tokenizer(self, found: Survey) -> Tokenizer:
        """The tokenizer: found, taken from another corpus, or trained on the kept training notes."""
        url = storage.join(self.output, TOKENIZER)
        if self.donor is not None:
            entry = self.donor.manifest["tokenizer"]
            storage.write_bytes(url, storage.read_bytes(storage.join(self.donor.url, entry["file"])))
            return Tokenizer(storage.read_bytes(url), bos=self.donor.tokenizer.bos, eos=self.donor.tokenizer.eos)
        chosen = self.recipe.tokenizer
        assert chosen is not None  # the recipe was validated
        if not storage.exists(url):
            words = self._count_words(found, chosen)
            logs.say(f"training a {chosen.kind} tokenizer of {chosen.vocab_size:,} on {len(words):,} different words")
            # In a task, because the driver has the survey in its memory.
            (model,) = self._run(tokenizer.train_on_table, [(words, chosen, CLASS_TOKENS)])
            storage.write_bytes(url, model)
        return Tokenizer(storage.read_bytes(url), bos=chosen.bos, eos=chosen.eos)

    def _count_words(self, found: Survey, chosen: TokenizerConfig) -> pa.Table:
        """A table (word, count) over the kept training notes, or the sample of them that the recipe asks for."""
        below = int(chosen.sample * 2**64) - 1
        items = []
        for index, shard in enumerate(found.shard):
            counted = (shard >= 0) & (found.split[index] == SPLITS.index("train"))
            counted &= found.digest[index] <= np.uint64(below)
            items.append((self.work, index, counted, chosen.kind))
        total = pa.table({"word": pa.array([], pa.string()), "count": pa.array([], pa.int64())})
        waiting: list[pa.Table] = []
        with logs.progress("count words", len(items)) as advance:
            done = enumerate(ray_runtime.map_tasks(parts.count_words, items, in_flight=self.at_a_time), 1)
            for number, (_, words) in done:
                waiting.append(words)
                # Adding up costs as much as the sum is long, so it is done when that much has come.
                if number == len(items) or sum(map(len, waiting)) > len(total):
                    total, waiting = _added([total, *waiting]), []
                advance(number, f"{len(total):,} different words")
        return total

    def _encode(self, read: list[dict[str, Any]], found: Survey, model: Tokenizer) -> list[dict[str, Any]]:
        """Tokens of every part, cut by shard; returns their counts in input order."""
        key = (model.sha256, model.bos, model.eos)
        firsts = np.cumsum([0, *(part["rows"] for part in read)]).tolist()
        done: dict[int, dict[str, Any]] = {}

        def unencoded() -> Iterator[tuple[Any, ...]]:
            for index in range(len(read)):
                part = parts.done(self.work, "encode", index)
                if part and part["tokenizer"] == model.sha256:
                    done[index] = part
                else:
                    yield self.output, self.work, index, firsts[index], found.shard[index], found.place[index], key

        with logs.progress("tokenize", len(read)) as advance, _Rate() as text, _Rate() as tokens:
            for _, part in ray_runtime.map_tasks(parts.encode, unencoded(), in_flight=self.at_a_time):
                done[part["index"]] = part
                text.add(part["bytes"] / 1e6)
                tokens.add(part["tokens"] / 1e6)
                so_far = sum(part["tokens"] for part in done.values())
                note = f"{so_far:,} tokens, {text.per_second:.1f} MB/s, {tokens.per_second:.2f} M tokens/s"
                advance(len(done), note)
        return [done[index] for index in range(len(read))]

    def _pack(self, found: Survey, encoded: list[dict[str, Any]], model: Tokenizer) -> dict[str, dict[str, Any]]:
        """The shards; returns their sidecars by name, in order."""
        key = (model.sha256, model.bos, model.eos)
        sources: list[list[tuple[int, int]]] = [[] for _ in found.shards]
        for part in encoded:
            for number, shard in enumerate(part["shards"]):
                sources[shard].append((part["index"], number))
        done: dict[str, dict[str, Any]] = {}

        def unpacked() -> Iterator[tuple[Any, ...]]:
            for name, batches in zip(found.shards, sources, strict=True):
                if sidecar := parts.packed(self.output, name, key):
                    done[name] = sidecar
                else:
                    yield self.output, self.work, name, batches, key

        with logs.progress("write shards", len(found.shards)) as advance, _Rate() as rate:
            for _, sidecar in ray_runtime.map_tasks(parts.pack, unpacked(), in_flight=self.at_a_time):
                done[sidecar["shard"]["name"].removesuffix(".arrow")] = sidecar
                rate.add(sidecar["shard"]["size"] / 1e6)
                advance(len(done), f"{rate.per_second:.1f} MB/s")
        return {name: done[name] for name in found.shards}


class _Rate:
    """How much of something was done a second since the start."""

    def __enter__(self) -> _Rate:
        self._began, self._amount = time.monotonic(), 0.0
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, amount: float) -> None:
        self._amount += amount

    @property
    def per_second(self) -> float:
        return self._amount / max(time.monotonic() - self._began, 1e-9)


def _added(tables: list[pa.Table]) -> pa.Table:
    """Word counts added up."""
    summed = pa.concat_tables(tables).group_by("word").aggregate([("count", "sum")])
    return summed.rename_columns({"count_sum": "count"}).select(["word", "count"]).combine_chunks()


def _split_entry(sidecars: list[dict[str, Any]], patients: int) -> dict[str, Any]:
    shards = [sidecar["shard"] for sidecar in sidecars]
    totals = {key: sum(shard[key] for shard in shards) for key in ("notes", "tokens", "bytes")}
    return totals | {"patients": patients, "shards": shards}


def _notes(manifest: dict[str, Any]) -> int:
    return sum(split["notes"] for split in manifest["splits"].values())


def _version() -> str:
    """Version of the tree that runs; it need not be the installed one."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def _show(output: str, manifest: dict[str, Any], counted: dict[str, Any]) -> None:
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
    logs.say(
        f"{counted['words']:,} words, {100 * counted['distinct_word_rate']:.2f}% of them different, "
        f"{counted['out_of_vocabulary_words']:,} beyond the vocabulary; more: ./launch.sh stats {output}"
    )
