"""Numbers of a run: `metrics.jsonl` is the truth, Weights & Biases mirrors it. The only file that imports wandb.

A line is a JSON object with a `step`. When a run goes on from step N, lines after N are cut off, so the file is one
curve without gap or repeat; an `event` line tells where the run was interrupted. W&B keeps one run id for the whole
life of a run directory, offline as one segment for each start (`wandb sync` joins them).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from cluster import storage
from cluster.config import Section

FILE = "metrics.jsonl"
# W&B writes its file from time to time, so a SIGKILL takes its newest lines with it. When a run goes on, this many are
# logged to it once more; where it has them already, the first value stays.
REPLAYED_LINES = 200


class TrackingConfig(Section):
    """Section `tracking` of a training recipe."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online where WANDB_API_KEY is set, else offline"
    )
    project: str = "chartlm"


def read(run: str) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; empty before the first. A torn last line (a killed writer) is left out."""
    url = storage.join(run, FILE)
    if not storage.exists(url):
        return []
    text = storage.read_bytes(url).decode()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Track:
    """Writes the numbers of one start of a run."""

    def __init__(self, run: str, lines: list[dict[str, Any]], mirror: Any):
        self._url = storage.join(run, FILE)
        self._lines = [json.dumps(line) for line in lines]
        self._mirror = mirror
        self._write()
        self._file = storage.local_path(self._url).open("a") if storage.is_local(self._url) else None

    def log(self, **numbers: Any) -> None:
        """Adds one line, without the numbers that are None. On local storage it is there at once, so a SIGKILL loses
        no line that was written.
        """
        numbers = {key: value for key, value in numbers.items() if value is not None}
        self._lines.append(json.dumps(numbers))
        if self._file is not None:
            self._file.write(self._lines[-1] + "\n")
            self._file.flush()
        self.mirror(numbers)

    def mirror(self, numbers: dict[str, Any]) -> None:
        """Sends one line to W&B, where there is one."""
        if self._mirror is not None:
            kept = {key: value for key, value in numbers.items() if isinstance(value, (int, float))}
            self._mirror.log(kept | {"global_step": numbers["step"]}, step=numbers["step"])

    def _write(self) -> None:
        storage.write_bytes(self._url, "".join(line + "\n" for line in self._lines).encode())

    def flush_remote(self) -> None:
        """Brings a remote `metrics.jsonl` up to date (object stores cannot append); local ones always are."""
        if self._file is None:
            self._write()

    def close(self) -> None:
        """Writes what is left."""
        if self._file is not None:
            self._file.close()
        else:
            self._write()


@contextlib.contextmanager
def opened(run: str, config: TrackingConfig, run_id: str, recipe: dict[str, Any], step: int | None) -> Iterator[Track]:
    """A Track that goes on at `step` (None: from the beginning, without a checkpoint). Later lines are cut off, and the
    interruption is marked where there was one.
    """
    before = read(run)
    lines = [line for line in before if step is not None and line["step"] <= step]
    if before:
        reached = max(line["step"] for line in before)
        lines.append({"step": step or 0, "event": "resumed", "interrupted_at": reached})
    mirror = _wandb(run, config, run_id, recipe)
    track = Track(run, lines, mirror)
    for line in lines[-REPLAYED_LINES:]:
        track.mirror(line)
    try:
        yield track
    finally:
        track.close()
        if mirror is not None:
            mirror.finish()


def _wandb(run: str, config: TrackingConfig, run_id: str, recipe: dict[str, Any]) -> Any:
    mode = config.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    import wandb  # slow to import, and not needed by the other workers

    # The W&B service of a process that this one descends from (a notebook, a launcher) outlives a worker that is
    # killed, and keeps its run id from every other start of the run. Each start has a service of its own.
    os.environ.pop("WANDB_SERVICE", None)
    # Where the run lives on an object store, W&B's own files stay on this machine.
    folder = storage.local_path(run) if storage.is_local(run) else tempfile.mkdtemp(prefix="chartlm-wandb-")
    started = wandb.init(
        project=config.project,
        id=run_id,
        name=run.rstrip("/").rsplit("/", 1)[-1],
        resume="allow",
        mode=mode,
        dir=str(folder),
        config=recipe,
        settings=wandb.Settings(
            silent=True,
            console="off",  # captured output could carry text
            disable_git=True,
            disable_code=True,
            save_code=False,
            # The default flushes every 15 s: a SIGKILL would lose as much of the curve.
            x_transaction_log_flush_interval=0.5,
        ),
    )
    started.define_metric("*", step_metric="global_step")
    return started


def summarize(folder: str, config: TrackingConfig, about: dict[str, Any], numbers: dict[str, float]) -> None:
    """Sends the closing numbers of work that has no curve to W&B, as the summary of one run."""
    mirror = _wandb(folder, config, uuid.uuid4().hex[:12], about)
    if mirror is not None:
        mirror.summary.update(numbers)
        mirror.finish()
