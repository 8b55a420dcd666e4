"""Labelled tables, whatever they are stored in: CSV, JSON lines or Parquet, by the file's name, perhaps compressed.

Read block by block. Every cell is text (17 and 17.0 are "17", nothing is ""), but for lists in JSON lines and Parquet,
which stay lists of text. No error quotes a cell.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import DataError
from sharding.readers import csv_file

Cell = str | list[str]
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
BATCH = 1000  # rows of Parquet in memory


def rows(url: str, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The cells of these columns, row by row. Raises DataError for a missing column, or a list where text is wanted."""
    for number, row in enumerate(cells(url, columns), start=1):
        texts = [cell for cell in row if isinstance(cell, str)]
        if len(texts) < len(row):
            wrong = next(column for column, cell in zip(columns, row, strict=True) if not isinstance(cell, str))
            raise DataError(f"{url}: row {number}: {wrong} is a list, not text")
        yield tuple(texts)


def cells(url: str, columns: Sequence[str]) -> Iterator[tuple[Cell, ...]]:
    """The same, where a cell may be a list."""
    name = url.rsplit("/", 1)[-1].lower()
    if any(f"{ending}." in f"{name}." for ending in JSON_LINES):
        unseen = set(columns)  # a key may be left out where there is nothing to say, but not in every line
        for number, record in enumerate(records(url), start=1):
            unseen -= record.keys()
            yield tuple(_cell(record.get(column), url, number, column) for column in columns)
        if unseen:
            raise DataError(f"{url}: no line has the key {sorted(unseen)[0]}")
    elif any(name.endswith(ending) for ending in PARQUET):
        yield from _parquet(url, columns)
    else:
        yield from csv_file.rows(url, columns)


def records(url: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; empty lines are skipped. Raises DataError with the line's number."""
    with storage.reader(url) as stream:
        number, lines = 0, iter(stream)
        while True:
            try:
                line = next(lines, None)
            except (EOFError, OSError, zlib.error) as exc:
                if isinstance(exc, OSError) and exc.errno is not None:
                    raise  # of the system, not of the file
                raise DataError(f"{url}: ends or breaks after line {number}; compare its checksum") from None
            if line is None:
                return
            number += 1
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
            except (ValueError, RecursionError):
                raise DataError(f"{url}: line {number} is not JSON in UTF-8; one object a line is wanted") from None
            if not isinstance(record, dict):
                raise DataError(f"{url}: line {number} is not a JSON object")
            yield record


def _parquet(url: str, columns: Sequence[str]) -> Iterator[tuple[Cell, ...]]:
    with storage.reader(url, compression=None) as stream:
        try:
            file = pq.ParquetFile(stream)
            known = file.schema_arrow.names
            if missing := [column for column in columns if column not in known]:
                raise DataError(f"{url}: no column {missing[0]}; the columns are {', '.join(known[:40])}")
            number = 0
            for batch in file.iter_batches(BATCH, columns=list(dict.fromkeys(columns))):
                for values in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                    number += 1
                    yield tuple(
                        _cell(value, url, number, column) for value, column in zip(values, columns, strict=True)
                    )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
            if isinstance(exc, OSError) and exc.errno is not None:
                raise  # of the system, not of the file
            raise DataError(f"{url}: no Parquet file, or a damaged one; compare its checksum") from None


def _cell(value: Any, url: str, number: int, column: str) -> Cell:
    if isinstance(value, list):
        return [_text(one, url, number, column) for one in value if one is not None]
    return _text(value, url, number, column)


def _text(value: Any, url: str, number: int, column: str) -> str:
    if value is None or value != value:  # NaN, pandas' way to say nothing
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dict | list | bytes):
        raise DataError(f"{url}: row {number}: {column} holds no text")
    return str(value)
