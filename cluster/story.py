"""The whole main job as a story: raw notes → shards → a language model that survives a kill → a clinical prediction.

Each stage is one verb, run as a user would run it; this file only strings them together, kills one training worker
half way (SIGKILL), and sums up. The stages' settings stand in the recipes of a folder:

    hospital.toml (optional)  shard.toml  awd_lstm.toml  finetune.toml

Run again, it finds what is done and goes on from there.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field

from cluster import config, logs, storage, tracking
from cluster.errors import ChartlmError, ConfigError

ROOT = Path(__file__).resolve().parent.parent
# How a Ray Train worker calls itself in the process table.
WORKER_TITLE = "RayTrainWorker"


class StoryRecipe(config.Section):
    """`./launch.sh demo [FOLDER] [input=FILE] [interrupt=false]`."""

    folder: str = Field("recipes/demo", description="folder with the recipes of the stages")
    input: str | None = Field(None, description="notes to shard, in place of the recipe's")
    prompt: str = "blood loss"
    interrupt: bool = Field(True, description="kill a training worker half way")


class StageFailed(ChartlmError):
    """A verb ended with an error; it has said itself what was wrong."""


class Memory:
    """Peak memory of this process and all it starts, in bytes; pages shared by several are counted once."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._over.wait(1.0):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += process.memory_full_info().pss
            self.peak_bytes = max(self.peak_bytes, total)

    def stop(self) -> int:
        """Ends the sampling; returns the peak."""
        self._over.set()
        self._thread.join()
        return self.peak_bytes


def _verb(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "cluster.cli", *words])


def _run(*words: str) -> None:
    process = _verb(*words)
    try:
        if process.wait() != 0:
            raise StageFailed(f"demo: stopped at {words[0]!r}; mend what it says and run the same command again")
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """An interrupted story leaves no stage behind."""
    if process.poll() is None:
        process.terminate()
        process.wait()


def _share_done(run: str, recipe: dict[str, Any]) -> float:
    """How far a training run has come, from its own metrics: 0 … 1."""
    lines = [line for line in tracking.read(run) if "loss" in line]
    if not lines:
        return 0.0
    if "steps" in recipe:
        return float(lines[-1]["step"] / recipe["steps"])
    return float(lines[-1]["epoch"] / recipe["epochs"])


def _kill_a_worker(process: subprocess.Popen[bytes]) -> int | None:
    """SIGKILLs one training worker of a running `pretrain`; returns its process id."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(WORKER_TITLE in word for word in child.cmdline()):
                    child.send_signal(signal.SIGKILL)
                    return int(child.pid)
    return None


def _pretrain(words: Sequence[str], run: str, recipe: dict[str, Any], interrupt: bool) -> None:
    """Trains; kills a worker once when half of the steps are done and a checkpoint exists."""
    already = any(line.get("event") == "resumed" for line in tracking.read(run))
    process = _verb(*words)
    try:
        while process.poll() is None and interrupt and not already:
            time.sleep(0.2)
            if _share_done(run, recipe) >= 0.5 and storage.names(storage.join(run, "checkpoints")):
                killed = _kill_a_worker(process)
                if killed is not None:
                    logs.say(f"demo: killed training worker {killed} (SIGKILL); Ray Train starts the group again …")
                    break
        if process.wait() != 0:
            raise StageFailed("demo: stopped at 'pretrain'; mend what it says and run the same command again")
    finally:
        _end(process)


def main(args: list[str]) -> None:
    """Verb `demo`: the six stages, a table of results, `summary.json`."""
    story = config.load(StoryRecipe, args, positional="folder")
    folder = Path(story.folder)
    if not folder.is_dir() and (ROOT / folder).is_dir():
        folder = ROOT / folder
    recipes = {
        name: str(folder / f"{name}.toml")
        for name in ("hospital", "shard", "awd_lstm", "finetune")
        if (folder / f"{name}.toml").exists()
    }
    missing = {"shard", "awd_lstm", "finetune"} - recipes.keys()
    if missing:
        raise ConfigError(f"{folder}: has no {', '.join(f'{name}.toml' for name in sorted(missing))}")
    training = config.read_toml(recipes["awd_lstm"])
    run = training["run_dir"]
    tuning = config.read_toml(recipes["finetune"])
    task_out = tuning.get("out") or storage.join(tuning["run"], "finetune", tuning["task"]["name"])
    started, memory = time.monotonic(), Memory()

    with _stage(1, "hospital", "notes and tables in MIMIC-III's own format"):
        if "hospital" in recipes:
            _run("hospital", recipes["hospital"])
        else:
            logs.say("real notes are given; nothing to write")
    with _stage(2, "shard", "clean, split by patient, tokenize; on Ray"):
        _run("shard", recipes["shard"], *([f"input={story.input}"] if story.input else []))
    with _stage(
        3, "pretrain", "AWD-LSTM under DeepSpeed ZeRO-1 on Ray Train" + (", killed half way" if story.interrupt else "")
    ):
        _pretrain(("pretrain", recipes["awd_lstm"]), run, training, story.interrupt)
        logs.say("the same command again:")
        _run("pretrain", recipes["awd_lstm"])
    with _stage(4, "evaluate", "validation patients, and a sample"):
        _run("evaluate", run)
        _run("generate", run, f"prompt={story.prompt}")
    with _stage(5, "finetune", "a clinical prediction beside a TF-IDF baseline"):
        _run("finetune", recipes["finetune"], *([f"task.url={story.input}"] if story.input else []))
    with _stage(6, "look", "what it made"):
        summary = _summary(run, task_out)
        summary["seconds"] = round(time.monotonic() - started, 1)
        summary["peak_memory_bytes"] = memory.stop()
        place = storage.join(run, "summary.json")
        storage.write_json(place, summary)
        _tell(run, task_out, summary)


@contextlib.contextmanager
def _stage(number: int, name: str, what: str) -> Iterator[None]:
    logs.console.rule(f"[bold]{number}/6 {name}[/bold]  {what}", align="left")
    started = time.monotonic()
    yield
    logs.say(f"{name}: {time.monotonic() - started:.0f} s")


def _summary(run: str, task_out: str) -> dict[str, Any]:
    lines = tracking.read(run)
    scores = storage.read_json(storage.join(run, "evaluation-valid.json"))
    task = storage.read_json(storage.join(task_out, "results.json"))
    resumed = next((line for line in lines if line.get("event") == "resumed"), {})
    summary: dict[str, Any] = {
        "untrained_perplexity": next(line["valid_perplexity"] for line in lines if "valid_perplexity" in line),
        "perplexity": scores["perplexity"],
        "bits_per_byte": scores["bits_per_byte"],
        "accuracy": scores["accuracy"],
        "interrupted_at_step": resumed.get("interrupted_at"),
        "resumed_from_step": resumed.get("step"),
    }
    name = task["task"]
    for key in ("auroc", "auroc_low", "auroc_high", "auprc", "accuracy", "macro_f1", "macro_f1_low", "macro_f1_high"):
        if key in task:
            summary[f"{name}_{key}"] = task[key]
    for key in (
        "baseline_auroc",
        "scratch_auroc",
        "baseline_auprc",
        "baseline_accuracy",
        "baseline_macro_f1",
        "majority_accuracy",
    ):
        if key in task:
            summary[key] = task[key]
    return summary


def _tell(run: str, task_out: str, summary: dict[str, Any]) -> None:
    rows = [(key.replace("_", " "), _number(value)) for key, value in summary.items()]
    logs.table("results", ("", "value"), rows)
    places = [
        ("loss curve", storage.join(run, "plots", "loss.png")),
        ("every number of the run", storage.join(run, tracking.FILE)),
        ("Weights & Biases, offline", storage.join(run, "wandb")),
        ("samples", storage.join(run, "samples")),
        ("predictions", storage.join(task_out, "predictions.parquet")),
        ("this table for programs", storage.join(run, "summary.json")),
    ]
    for what, place in places:
        logs.say(f"{what:<26} {place}")


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)
