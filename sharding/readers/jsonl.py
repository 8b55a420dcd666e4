"""JSON lines: one object a line, plain or compressed; the recipe names the keys.

    line ──► object ──► text of the wanted keys

A line end is always the end of a record, because JSON writes those of a text as `\\n`. A key that is absent or null
gives null (no text: an empty note). A text key that no object of the beginning of the file has is an error and not
a corpus of empty notes; that is looked at once per file, so it does not depend on where blocks are cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from cluster import storage
from cluster.errors import DataError
from sharding.readers import ranges
from sharding.readers.csv_file import BOM, UTF16
from sharding.readers.csv_notes import Columns
from sharding.schema import Block, Parsed, Run, in_order, notes_table

# The text key must be in one of the records of this many bytes.
HEAD_BYTES = 1 << 20
# A longer name may be a piece of a note; it is not shown.
KEY_CHARS = 64
KEYS_SHOWN = 20
# Larger whole numbers may have lost their last digits on the way through a float.
EXACT_FLOAT = 1 << 53


class JsonlReader(Columns):
    """Notes in JSON lines, plain or compressed; each key of the recipe names a key of the objects."""

    name: Literal["jsonl"] = "jsonl"

    def blocks(self, url: str, block_bytes: int, run: Run = in_order) -> Iterator[Block]:
        """Blocks of whole lines. Raises DataError where the text key is in no object of the beginning."""
        head = _head(url)
        first = len(BOM) if head.startswith(BOM) else 0
        objects = (found for _, found in _objects(url, first, head[first:]))
        example = next(objects, None)
        if example is not None and self.text not in example and not any(self.text in found for found in objects):
            raise DataError(f"{url}: no key {self.text!r:.70} in the first objects; {_keys(example)}")
        yield from ranges.blocks(url, (), first, block_bytes, ranges.scan_lines, run)

    def parse(self, block: Block) -> Parsed:
        """The notes of a block; nothing is left out."""
        keys = self.columns()
        starts: list[int] = []
        read: dict[str, list[str | None]] = {field: [] for field in keys}
        for start, found in _objects(block.url, block.start, ranges.data_of(block)):
            starts.append(start)
            for field, key in keys.items():
                value, known = (_text if field == "text" else _label)(found.get(key))
                if not known:
                    what = "text" if field == "text" else "text or a whole number"
                    raise DataError(f"{block.url}: the record at byte {start}: {key} is not {what}")
                if value is None and field in ("doc_id", "patient_id"):
                    raise DataError(f"{block.url}: the record at byte {start}: empty {key}; every note needs one")
                read[field].append(value)
        try:
            notes = notes_table(record=np.arange(len(starts)), **read)
        except UnicodeEncodeError:
            raise _half_a_character(block, starts, read) from None
        return Parsed(notes, len(starts), {})


def _head(url: str) -> bytes:
    """The first lines of a file, HEAD_BYTES or one whole line."""
    head, wanted = b"", HEAD_BYTES
    with storage.reader(url) as stream:
        while len(head) < ranges.LONGEST_RECORD_BYTES:
            piece = ranges.read(stream, url, wanted)
            head += piece
            if head.startswith(UTF16):
                raise DataError(f"{url}: is UTF-16; convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)")
            if len(piece) < wanted:
                return head
            if b"\n" in piece:
                break
            wanted = len(head)
    return head[: head.rfind(b"\n") + 1]


def _objects(url: str, start: int, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of whole lines and the byte of the file where each begins; blank lines are no records."""
    for line in data.split(b"\n"):
        if line and not line.isspace():
            yield start, _object(url, start, line)
        start += len(line) + 1


def _object(url: str, start: int, line: bytes) -> dict[str, Any]:
    try:
        found = _DECODER.decode(line.decode())
    except UnicodeDecodeError as exc:
        raise DataError(f"{url}: byte {start + exc.start} is not UTF-8 text; convert the file (iconv)") from None
    except (ValueError, RecursionError):
        # The error of the library holds the line.
        raise DataError(
            f"{url}: the record at byte {start} is not JSON; write one object a line (is the file cut off?)"
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{url}: the record at byte {start} is no JSON object; write one {{…}} a line")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(constant)


# NaN and Infinity are no JSON.
_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _text(value: Any) -> tuple[str | None, bool]:
    """The text, and whether it is one."""
    return ("" if value is None else value), value is None or isinstance(value, str)


def _label(value: Any) -> tuple[str | None, bool]:
    """What stands there as text without blanks around, and whether that is possible.

    Of whole numbers the digits; pandas writes ids that stand beside nulls as 17.0.
    """
    if isinstance(value, str):
        return value.strip() or None, True
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_FLOAT:
        return str(int(value)), True
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), True
    return None, value is None


def _keys(found: dict[str, Any]) -> str:
    """The keys of an object in words."""
    if not found or any(len(key) > KEY_CHARS or not key.isprintable() for key in found):
        return "name the key that holds the text"
    more = ", …" if len(found) > KEYS_SHOWN else ""
    return f"the keys are {', '.join(list(found)[:KEYS_SHOWN])}{more}"


def _half_a_character(block: Block, starts: list[int], read: dict[str, list[str | None]]) -> DataError:
    """The error for `\\ud83d` without its other half, which no UTF-8 text can hold."""
    for start, *values in zip(starts, *read.values(), strict=True):
        if any("\ud800" <= char <= "\udfff" for value in values for char in value or ""):
            where = f"{block.url}: the record at byte {start}"
            return DataError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff); write the whole character")
    raise AssertionError("nothing is wrong with the texts")
