"""How fast a CSV of notes becomes verified shards, beside what people use today, in one run.

    .venv/bin/python benchmarks/sharding.py rivals=PYTHON work=NEW_DIR [mtsamples=CSV] [wikipedia=DUMP] [key=value…]
    .venv/bin/python benchmarks/sharding.py archive=NOTEEVENTS.csv.gz work=NEW_DIR

The first compares. `rivals` is the Python of an environment with `rivals.txt`, so that neither side's versions bind
the other (`sharding_rivals.py`). The text is a synthetic hospital and, if given, each report of mtsamples once;
mtsamples alone is the hard case: little text, of many words. Each round runs every side once, in turn; figures are
medians, ratios are of medians. All encode with one model, trained before on all of the text, and on the articles of a
dump if given (the rest has not 32,000 pieces). "one worker" is one Ray task at a time. As for Ray Data, the start of
Ray is not timed, that of the worker's process is. Ours includes `verify`.

The second makes shards of one large file by the recipe of `recipes/mimic3`, but for a smaller vocabulary, and prints
time and memory. A file that is
not there is made first: a hospital of `patients` (94,000 have 2 million notes and 4 GB), where each note ends with
those before it, so that they are as long as MIMIC-III's, 1,900 bytes on average.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
# Python, and Ray in its workers, look for modules beside the script, where `sharding` is this file.
sys.path[0], sys.argv[0] = str(ROOT), str(ROOT / "launch.sh")

from cluster import config, logs, ray_runtime  # noqa: E402
from sharding import synthetic  # noqa: E402
from sharding.job import ShardRecipe, run  # noqa: E402
from sharding.readers import csv_file, documents  # noqa: E402
from sharding.readers.mimic import COLUMNS  # noqa: E402
from sharding.readers.wikipedia import WikipediaReader  # noqa: E402
from sharding.shards import Corpus, Split  # noqa: E402
from sharding.verify import verify  # noqa: E402

RIVALS = ("encode", "hf_datasets", "datatrove", "ray_data")
WINDOW_ROWS, WINDOW_TOKENS, WINDOWS = 16, 513, 20_000
SETTLED_SECONDS = 10  # until the processes of Ray that start in the background have started
ARCHIVE_VOCAB = 8000  # the words of the hospital allow no 32,000
LENGTH_CHARS = 1250  # at least; with the note that is added last, 1,900 on average
csv.field_size_limit(sys.maxsize)


class Options(config.Section):
    """What to measure, and where files may be written."""

    work: str
    rivals: str | None = None
    mtsamples: str | None = None
    wikipedia: str | None = None
    archive: str | None = None
    patients: int = 6000
    large: int = 160_000  # patients of the hospital on which two workers stand beside one: 3 GB of CSV
    vocab: int = 32_000
    rounds: int = 3
    slow_rounds: int = 3  # of these, rounds that all rivals run in; in the others only `encode` does
    job: str | None = None  # a recipe (JSON) that a process of its own is to run


def main() -> None:
    options = config.load(Options, sys.argv[1:], positional=None)
    if options.job:
        print(json.dumps(_job(json.loads(options.job))))
        return
    work = Path(options.work).absolute()
    work.mkdir(parents=True)
    result = _archive(options.archive, work, options.patients) if options.archive else _comparison(options, work)
    print(json.dumps(result))


def _job(recipe: dict[str, Any]) -> dict[str, Any]:
    """Runs a recipe to verified shards: seconds of wall and CPU, and the peak memory of each kind of process."""
    chosen = config.validate(ShardRecipe, recipe, "the benchmark")
    ray_runtime.start(chosen.workers)
    time.sleep(SETTLED_SECONDS)
    with Watched() as watched:
        began = time.perf_counter()
        corpus = run(chosen)
        faults = verify(chosen.output, chosen.workers)
        seconds = time.perf_counter() - began
    if faults:
        raise SystemExit(faults[0])
    splits = corpus.manifest["splits"].values()
    counted = json.loads((Path(chosen.output) / "stats.json").read_text())
    return {
        "seconds": seconds,
        "cpu_seconds": watched.cpu_seconds,
        "peak_mib": watched.peak_mib,
        "notes": sum(split["notes"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits),
        "bytes": sum(split["bytes"] for split in splits),
        "dropped": corpus.manifest["drops"],
        "distinct_word_rate": counted["distinct_word_rate"],
    }


class Watched:
    """CPU time and peak memory (VmHWM) of this process and all it started; sampled, for Ray's workers come and go."""

    def __enter__(self) -> Watched:
        self._before = self._cpu()
        self._used: dict[int, float] = {}
        self._peaks: dict[str, float] = defaultdict(float)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.cpu_seconds = sum(self._used.values())
        self.peak_mib = dict(sorted(self._peaks.items(), key=lambda pair: -pair[1])[:4])

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._over.wait(1)
            self._used |= {pid: seconds - self._before.get(pid, 0) for pid, seconds in self._cpu().items()}

    def _cpu(self) -> dict[int, float]:
        seconds = {}
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                times = process.cpu_times()
            except (OSError, psutil.NoSuchProcess):
                continue
            seconds[process.pid] = times.user + times.system
            lines = dict(line.split(":", 1) for line in status.splitlines())
            if "VmHWM" in lines and hasattr(self, "_peaks"):
                name = "driver" if process.pid == os.getpid() else lines["Name"].strip()
                self._peaks[name] = max(self._peaks[name], int(lines["VmHWM"].split()[0]) / 1024)
        return seconds


def _ours(recipe: dict[str, Any], work: Path, cores: int | None = None) -> dict[str, Any]:
    """What `_job` says of a process of its own, which has the first `cores` processors if given."""
    pinned = ["taskset", "--cpu-list", f"0-{cores - 1}"] if cores else []
    as_verbs_do = ["env", "NUMPY_MADVISE_HUGEPAGE=0"]
    return _child([*as_verbs_do, *pinned, sys.executable, __file__, f"work={work}", f"job={json.dumps(recipe)}"])


def _rival(options: Options, job: str, *settings: str) -> dict[str, Any]:
    return _child([str(options.rivals), str(ROOT / "benchmarks/sharding_rivals.py"), job, *settings])


def _child(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _hospital(folder: Path, patients: int) -> Path:
    synthetic.main([f"out={folder}", f"patients={patients}"])
    plain = folder / "NOTEEVENTS.csv"
    plain.write_bytes(gzip.decompress((folder / "NOTEEVENTS.csv.gz").read_bytes()))
    return plain


def _reports(url: str) -> Iterator[str]:
    """Each text of mtsamples once."""
    with open(url, encoding="utf-8", newline="") as file:
        yield from dict.fromkeys(row["transcription"] for row in csv.DictReader(file) if row["transcription"].strip())


def _written(path: Path, notes: Iterator[tuple[str, str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["ROW_ID", "SUBJECT_ID", "TEXT"])
        writer.writerows(notes)
    return path


def _recipe(source: Path, output: Path, donor: Path | None, **changes: Any) -> dict[str, Any]:
    reader = {"name": "csv", "doc_id": "ROW_ID", "patient_id": "SUBJECT_ID", "text": "TEXT"}
    recipe = {"input": str(source), "output": str(output), "reader": reader, "dedup": "off", "workers": 1}
    return recipe | ({"tokenizer_from": str(donor)} if donor else {}) | changes


def _comparison(options: Options, work: Path) -> dict[str, Any]:
    hospital = _hospital(work / "hospital", options.patients)
    reports = list(_reports(options.mtsamples)) if options.mtsamples else []
    texts = work / "texts.csv"
    columns = ["ROW_ID", "SUBJECT_ID", "TEXT"]
    named = [(str(10**9 + number), f"r{number}", text) for number, text in enumerate(reports)]
    _written(texts, iter([*csv_file.rows(str(hospital), columns), *named]))
    learned = texts
    if options.wikipedia:
        articles = (note["text"] for note in documents(options.wikipedia, WikipediaReader()))
        more = [(str(2 * 10**9 + number), f"w{number}", text) for number, text in enumerate(articles)]
        learned = _written(work / "learned.csv", iter([*csv_file.rows(str(texts), columns), *more]))
    sources = {"archive": texts}
    if reports:
        sources["mtsamples"] = _written(work / "mtsamples.csv", iter(named))
    result: dict[str, Any] = {}
    for kind in ("unigram", "bpe"):
        donor = work / f"donor-{kind}"
        tokenizer = {"kind": kind, "vocab_size": options.vocab}
        _ours(_recipe(learned, donor, None, tokenizer=tokenizer), work)
        for name, source in sources.items():
            sides = RIVALS if name == "archive" else ("encode",)
            ratio = _race(options, work / f"{kind}-{name}", source, donor, sides, f"{name}, {kind}")
            result |= {f"{key}" if name == "archive" else f"{name}_{key}": value for key, value in ratio.items()}
    donor = work / "donor-unigram"
    result["index_gb_per_s"] = _index(hospital, options.rounds)
    large = _hospital(work / "large-hospital", options.large)
    result |= _two_workers(large, work, donor, options.rounds)
    return result | (_reads(options, work) if options.slow_rounds else {})


def _race(
    options: Options, folder: Path, source: Path, donor: Path, sides: tuple[str, ...], title: str
) -> dict[str, float]:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    settings = [f"csv={source}", f"model={donor / 'tokenizer.model'}", "text=TEXT", "doc=ROW_ID"]
    for number in range(options.rounds):
        for side in sides if number < options.slow_rounds else sides[:1]:
            runs[side].append(_rival(options, side, *settings, f"out={folder / f'{side}-{number}'}"))
        runs["chartlm"].append(_ours(_recipe(source, folder / f"chartlm-{number}", donor), folder))
    seconds = {side: _median(results, "seconds") for side, results in runs.items()}
    ours, size = runs["chartlm"][0], runs["encode"][0]["bytes"]
    logs.table(
        f"{title}: {size / 1e6:,.1f} MB of text, {ours['distinct_word_rate']:.2%} of its words different",
        ("side", "MB/s", "seconds", "CPU seconds", "notes", "tokens", "chartlm is … times as fast"),
        [
            (
                side,
                f"{size / 1e6 / seconds[side]:.1f}",
                f"{seconds[side]:.2f}",
                f"{_median(results, 'cpu_seconds'):.2f}",
                f"{results[0]['notes']:,}",
                f"{results[0]['tokens']:,}",
                f"{seconds[side] / seconds['chartlm']:.2f}",
            )
            for side, results in runs.items()
        ],
    )
    kind = title.split(", ")[1]
    return {f"{kind}_speedup_over_{side}": seconds[side] / seconds["chartlm"] for side in sides}


def _median(results: list[dict[str, Any]], key: str) -> float:
    return statistics.median(result[key] for result in results)


def _index(source: Path, rounds: int) -> float:
    """GB/s at which one process finds the records of a plain CSV file, read from the page cache."""
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        blocks = sum(1 for _ in csv_file.blocks(str(source), COLUMNS, 16 << 20))
        rates.append(source.stat().st_size / 1e9 / (time.perf_counter() - began))
    logs.say(f"index of {source.stat().st_size / 1e6:,.0f} MB in {blocks} blocks: {statistics.median(rates):.2f} GB/s")
    return statistics.median(rates)


def _two_workers(hospital: Path, work: Path, donor: Path, rounds: int) -> dict[str, float]:
    """How much faster two workers are than one, and two on two cores than one on one: beside one worker the driver,
    Ray and the kernel have the second core to themselves.
    """
    seconds: dict[tuple[int, int], list[float]] = {(1, 2): [], (2, 2): [], (1, 1): []}
    for number in range(rounds):
        for workers, cores in seconds:
            output = work / f"workers-{workers}-{cores}-{number}"
            recipe = _recipe(hospital, output, donor, workers=workers, reader={"name": "mimic"})
            seconds[workers, cores].append(_ours(recipe, work, cores)["seconds"])
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    rows = [(f"{w} on {c}", f"{taken:.1f}", f"{taken / medians[2, 2]:.2f}") for (w, c), taken in medians.items()]
    title = f"{hospital.stat().st_size / 1e6:,.0f} MB"
    logs.table(title, ("workers on cores", "seconds", "two workers on two are … times as fast"), rows)
    return {
        "two_worker_speedup": medians[1, 2] / medians[2, 2],
        "two_core_speedup": medians[1, 1] / medians[2, 2],
    }


def _reads(options: Options, work: Path) -> dict[str, float]:
    """Million tokens a second from random places: chartlm's shards, and what HF Datasets saved of the same text."""
    split = Corpus.open(str(work / "unigram-archive/chartlm-0")).split("train")
    saved = work / "unigram-archive/hf_datasets-0/arrow"
    rates: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds):
        rates["chartlm"].append(_random_reads(split))
        for form in ("numpy", "arrow"):
            out = work / f"read-{form}-{number}"
            found = _rival(options, "read", f"data={saved}", f"out={out}", f"format={form}", f"windows={WINDOWS // 10}")
            rates[f"HF Datasets, format {form}"].append(found["mtokens_per_s"])
    medians = {side: statistics.median(found) for side, found in rates.items()}
    rows = [(side, f"{rate:,.0f}", f"{medians['chartlm'] / rate:.1f}") for side, rate in medians.items()]
    logs.table("random reads", ("side", "million tokens/s", "chartlm is … times as fast"), rows)
    ours, numpy, arrow = medians.values()
    return {
        "read_mtokens_per_s": ours,
        "read_speedup_over_hf": ours / numpy,
        "read_speedup_over_hf_arrow": ours / arrow,
    }


def _random_reads(split: Split) -> float:
    draws = np.random.default_rng(0)
    sizes = np.array([len(values) for values in split.values])
    shards = draws.choice(len(sizes), size=(WINDOWS, WINDOW_ROWS), p=sizes / sizes.sum())
    starts = (draws.random((WINDOWS, WINDOW_ROWS)) * (sizes[shards] - WINDOW_TOKENS)).astype(np.int64)
    tokens_BT = np.empty((WINDOW_ROWS, WINDOW_TOKENS), np.int64)
    places = list(zip(shards.tolist(), starts.tolist(), strict=True))
    began = time.perf_counter()
    for window in places:
        for row, (shard, start) in enumerate(zip(*window, strict=True)):
            tokens_BT[row] = split.values[shard][start : start + WINDOW_TOKENS]
    return WINDOWS * tokens_BT.size / 1e6 / (time.perf_counter() - began)


def _lengthened(path: Path, work: Path, patients: int) -> None:
    """Writes a NOTEEVENTS.csv.gz whose notes are as long as those of MIMIC-III, and named from 1 on."""
    hospital = work / "hospital"
    synthetic.main([f"out={hospital}", f"patients={patients}"])
    before: list[str] = []
    with (
        gzip.open(hospital / "NOTEEVENTS.csv.gz", "rt", encoding="utf-8", newline="") as source,
        gzip.open(path, "wt", 1, encoding="utf-8", newline="") as file,
    ):
        rows = csv.reader(source)
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(next(rows))
        for row in rows:
            before = [row[-1], *before[:9]]
            enough = next((n for n in range(1, len(before)) if sum(map(len, before[:n])) >= LENGTH_CHARS), len(before))
            writer.writerow([*row[:-1], "\n".join(before[:enough])])


def _archive(source: str, work: Path, patients: int) -> dict[str, Any]:
    if not Path(source).exists():
        Path(source).parent.mkdir(parents=True, exist_ok=True)
        _lengthened(Path(source), work, patients)
    recipe = tomllib.loads((ROOT / "recipes/mimic3/shard.toml").read_text())
    changes = {"input": str(Path(source).absolute()), "output": str(work / "shards")}
    changes["tokenizer"] = recipe["tokenizer"] | {"vocab_size": ARCHIVE_VOCAB}
    found = _ours(recipe | changes, work)
    for name, peak in found["peak_mib"].items():
        logs.say(f"{name}: {peak:,.0f} MiB")
    logs.say(f"{found['notes']:,} notes, {found['tokens']:,} tokens in {found['seconds']:,.0f} s")
    return found | {"peak_process_mib": max(found["peak_mib"].values())}


if __name__ == "__main__":
    main()
