"""The field's experiments on MIMIC-III, by the recipes that are meant for it, at small scale on public notes.

    .venv/bin/python benchmarks/experiments.py mtsamples=CSV wikipedia=DUMP work=DIR [seeds=3] [epochs=2] [key=value…]

Each line of the table is a recipe of `recipes/`, of which input, sizes and workers are overridden, and what this data
does not have (times of notes, copies within a patient): case, marks, kind of tokenizer, direction and what is read
first are its own. The verbs run as a user runs them, two at a time on one thread each; the same command goes on where
it was stopped. Every text of mtsamples is given to all as the same patient, so that all are scored on the same
validation notes, in bits per byte. "Wikipedia first" reads the articles of DUMP before it reads as many tokens of the
notes as the others.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Python looks for modules beside the script, where `sharding` is another file.
sys.path[0] = str(ROOT)

from cluster import config, logs  # noqa: E402

READER = '{name = "csv", doc_id = "note", patient_id = "patient", text = "text", category = "category"}'
NOTES = [f"reader={READER}", "dedup=exact", "order=notes", "block_mib=4", "shard_mib=4", "splits.valid=0.1"]


class Experiment(NamedTuple):
    """Shards by `folder`/shard.toml, a model by `recipe`, perhaps after Wikipedia."""

    name: str
    folder: str
    recipe: str
    words: bool = False
    wikipedia: bool = False


EXPERIMENTS = (
    Experiment("words, cased", "mimic3-word", "mimic3-word/awd_lstm.toml", words=True),
    Experiment("words, lower case, BOS and EOS", "mimic3-word-lower", "mimic3-word-lower/awd_lstm.toml", words=True),
    Experiment("pieces, lower case", "mimic3-unigram-lower", "mimic3-unigram-lower/awd_lstm.toml"),
    Experiment("pieces, cased", "mimic3", "mimic3/awd_lstm.toml"),
    Experiment("pieces, cased, backward", "mimic3", "mimic3/awd_lstm_backward.toml"),
    Experiment("pieces, cased, Wikipedia first", "mimic3", "wiki-then-mimic/mimic.toml", wikipedia=True),
)


class Options(config.Section):
    """What to run on, and how small."""

    mtsamples: str
    wikipedia: str
    work: str
    seeds: int = 3
    epochs: float = 2
    pieces: int = 4000  # vocabulary of the models of word pieces
    words: int = 8000  # … and of words
    embedding: int = 128
    hidden: int = 256
    lanes: int = 32
    lr: float = 5e-3


def main() -> None:
    options = config.load(Options, sys.argv[1:], positional=None)
    work = Path(options.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    notes = _notes(options.mtsamples, work / "notes.csv")
    for experiment in {each.folder: each for each in EXPERIMENTS}.values():
        size = options.words if experiment.words else options.pieces
        given = [f"input={notes}", f"output={_shards(work, experiment)}", f"tokenizer.vocab_size={size}", *NOTES]
        _verb("shard", ROOT / "recipes" / experiment.folder / "shard.toml", *given)
    wiki = [f"input={options.wikipedia}", f"output={work / 'wiki/shards'}", f"tokenizer_from={work / 'mimic3/shards'}"]
    _verb("shard", ROOT / "recipes/wiki-then-mimic/shard.toml", *wiki, "splits.valid=0.1", "block_mib=4")
    runs = [(experiment, seed) for seed in range(1, options.seeds + 1) for experiment in EXPERIMENTS]
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(lambda run: _trained(*run, options, work), runs))
    found: dict[str, list[dict[str, Any]]] = {}
    for (experiment, _), score in zip(runs, scores, strict=True):
        found.setdefault(experiment.name, []).append(score)
    headings = ("experiment", "bits/byte", "lowest", "highest", "accuracy", "unknown", "CPU s")
    logs.table(f"mtsamples, {options.seeds} seeds, {options.epochs:g} epochs", headings, _rows(found))
    print(json.dumps({"bits_per_byte": {name: _mean(scores, "bits_per_byte") for name, scores in found.items()}}))


def _notes(source: str, target: Path) -> Path:
    """Every different text once, as a patient's of its own: cleaning cannot change who is in which split."""
    csv.field_size_limit(sys.maxsize)
    with open(source, encoding="utf-8", newline="") as file:
        texts = {row["transcription"]: row["medical_specialty"] for row in csv.DictReader(file)}
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "patient", "category", "text"])
        kept = [(text, category) for text, category in texts.items() if text.strip()]
        writer.writerows([(number, f"p{number}", category, text) for number, (text, category) in enumerate(kept)])
    return target


def _shards(work: Path, experiment: Experiment) -> Path:
    return work / experiment.folder / "shards"


def _trained(experiment: Experiment, seed: int, options: Options, work: Path) -> dict[str, Any]:
    """Scores on the validation notes, CPU seconds of training, and the share of words that the vocabulary lacks."""
    run = work / f"{Path(experiment.recipe).with_suffix('').as_posix().replace('/', '-')}-{seed}"
    small = [f"seed={seed}", f"epochs={options.epochs}", f"data.lanes={options.lanes}", f"optim.lr={options.lr}"]
    small += [f"model.embedding={options.embedding}", f"model.hidden={options.hidden}", "engine.precision=fp32"]
    small += ["cluster.workers=0", "cluster.gpus_per_worker=0", "eval_every=100000"]
    first = []
    if experiment.wikipedia:
        before = work / f"wiki-{seed}"
        given = [f"run_dir={before}", f"data.corpus={work / 'wiki/shards'}", *small]
        _verb("pretrain", ROOT / "recipes/wiki-then-mimic/awd_lstm.toml", *given)
        first = [f"init_from={before}"]
    given = [f"run_dir={run}", f"data.corpus={_shards(work, experiment)}", *small, *first]
    seconds = _verb("pretrain", ROOT / "recipes" / experiment.recipe, *given)
    _verb("evaluate", run)
    timed = run / "seconds.json"
    if not timed.exists():  # a second call finds nothing left to do
        timed.write_text(json.dumps(seconds))
    counted = json.loads((_shards(work, experiment) / "stats.json").read_text())
    scores: dict[str, Any] = json.loads((run / "evaluation-valid.json").read_text())
    unknown = counted["out_of_vocabulary_words"] / counted["words"] if experiment.words else 0.0
    return scores | {"seconds": json.loads(timed.read_text()), "unknown": unknown}


def _verb(verb: str, place: Path, *settings: str) -> float:
    """Runs a verb; its CPU seconds, which what else runs here does not change."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "cluster.cli", verb, str(place), *settings]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command[2:5])}: {errors.read()[-2000:]}")
    seconds = used.ru_utime + used.ru_stime
    logs.say(f"{verb} {place.parent.name}/{place.name} {' '.join(settings[:1])}: {seconds:.0f} s")
    return seconds


def _mean(scores: list[dict[str, Any]], key: str) -> float:
    return round(statistics.mean(score[key] for score in scores), 4)


def _rows(found: dict[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    rows = []
    for name, scores in found.items():
        bits = [score["bits_per_byte"] for score in scores]
        numbers = (f"{value:.4f}" for value in (statistics.mean(bits), min(bits), max(bits)))
        accuracy, unknown = f"{_mean(scores, 'accuracy'):.1%}", f"{scores[0]['unknown']:.1%}"
        rows.append((name, *numbers, accuracy, unknown, f"{_mean(scores, 'seconds'):.0f}"))
    return rows


if __name__ == "__main__":
    main()
