import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from cluster import storage, tracking
from cluster.tracking import TrackingConfig

NO_MIRROR = TrackingConfig(wandb="disabled")


def log_steps(run: str, steps: range, resumed: int | None, config: TrackingConfig = NO_MIRROR) -> None:
    with tracking.opened(run, config, "abc123", {}, resumed) as track:
        for step in steps:
            track.log(step=step, loss=1 / (step + 1))


@pytest.mark.parametrize("where", ["local", "memory"])
def test_resume_cuts_later_lines_and_marks_the_interruption(tmp_path: Path, where: str) -> None:
    run = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"
    log_steps(run, range(1, 8), None)
    log_steps(run, range(6, 10), 5)
    lines = tracking.read(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert [line for line in lines if "event" in line] == [{"step": 5, "event": "resumed", "interrupted_at": 7}]


def test_start_again_without_a_checkpoint_keeps_nothing_but_the_mark(tmp_path: Path) -> None:
    log_steps(str(tmp_path), range(0, 4), None)
    log_steps(str(tmp_path), range(0, 2), None)
    lines = tracking.read(str(tmp_path))
    assert [line["step"] for line in lines if "loss" in line] == [0, 1]
    assert lines[0] == {"step": 0, "event": "resumed", "interrupted_at": 3}


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    log_steps(str(tmp_path), range(1, 3), None)
    with open(tmp_path / tracking.FILE, "a") as stream:
        stream.write('{"step": 3, "lo')
    assert [line["step"] for line in tracking.read(str(tmp_path))] == [1, 2]


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """Rows of an offline `.wandb` file: a 7-byte header, then LevelDB-like records in 32 KiB blocks."""
    from wandb.proto import wandb_internal_pb2

    data, place, buffer, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        checksum, length, kind = struct.unpack("<IHB", data[place : place + 7]) if left >= 7 else (0, 0, 0)
        if kind == 0:
            place += left
            continue
        part = data[place + 7 : place + 7 + length]
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) & 0xFFFFFFFF == checksum
        place += 7 + length
        buffer = part if kind in (1, 2) else buffer + part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(buffer)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_wandb_offline_mirrors_under_one_id(tmp_path: Path) -> None:
    offline = TrackingConfig(wandb="offline")
    log_steps(str(tmp_path), range(1, 4), None, offline)
    log_steps(str(tmp_path), range(3, 6), 2, offline)
    segments = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(segments) == 2
    assert {segment.name for segment in segments} == {"run-abc123.wandb"}
    rows = [row for segment in segments for row in wandb_history(segment)]
    assert {row["_step"]: row["loss"] for row in rows} == {step: 1 / (step + 1) for step in range(1, 6)}


def test_remote_metrics_are_there_after_a_flush(tmp_path: Path) -> None:
    run = f"memory://{tmp_path.name}/flushed"
    with tracking.opened(run, NO_MIRROR, "abc", {}, None) as track:
        track.log(step=1, loss=2.0)
        track.flush_remote()
        assert tracking.read(run) == [{"step": 1, "loss": 2.0}]
    assert storage.exists(storage.join(run, tracking.FILE))
