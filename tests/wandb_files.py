"""Reads offline W&B runs back. wandb 0.31 has no public reader; the format is a header and LevelDB-like records."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any


def segments(run: Path) -> list[Path]:
    """The `.wandb` files of a run directory, one for each start, oldest first."""
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def curve(run: Path, key: str) -> dict[int, float]:
    """step → value over all segments, as `wandb sync` would join them: the first value of a step stays."""
    joined: dict[int, float] = {}
    for segment in segments(run):
        for row in history(segment):
            if key in row:
                joined.setdefault(row["_step"], row[key])
    return joined


def history(path: Path) -> list[dict[str, Any]]:
    """Rows of one file: a 7-byte header, then records in 32 KiB blocks; a torn last one (SIGKILL) is left out."""
    from wandb.proto import wandb_internal_pb2

    data, place, buffer, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        checksum, length, kind = struct.unpack("<IHB", data[place : place + 7]) if left >= 7 else (0, 0, 0)
        if kind == 0:
            place += left
            continue
        part = data[place + 7 : place + 7 + length]
        if len(part) < length:
            break
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) & 0xFFFFFFFF == checksum
        place += 7 + length
        buffer = part if kind in (1, 2) else buffer + part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(buffer)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
