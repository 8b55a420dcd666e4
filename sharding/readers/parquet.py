"""Parquet files, as pandas, Spark or DuckDB write them; the recipe names the columns.

    file ──(its footer)──► blocks of whole row groups ──(the wanted columns only)──► columns of text

A row group is the least that can be read, so files with many small ones are read by many tasks. Numbers and times
become text as a CSV file would hold them: `17` (also for the 17.0 of pandas), `2101-10-20 12:33:00` (UTC where the
column has a time zone), `2101-10-20`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import DataError
from sharding.readers import ranges
from sharding.readers.csv_notes import Columns, blank_is_null
from sharding.schema import Block, Parsed, Run, in_order, notes_table

# Larger whole numbers may have lost their last digits on the way through a float.
EXACT_FLOAT = 1 << 53
COLUMNS_SHOWN = 40


class ParquetReader(Columns):
    """Notes in Parquet files; each key names a column. Columns inside of others cannot be named."""

    name: Literal["parquet"] = "parquet"

    def blocks(self, url: str, block_bytes: int, run: Run = in_order) -> Iterator[Block]:
        """Blocks of row groups whose wanted columns are about `block_bytes`; `start` and `end` number row groups."""
        size = storage.size_bytes(url)
        with _opened(url) as file:
            header = tuple(file.schema_arrow.names)
            self._check(url, header)
            sizes = [self._wanted_bytes(file.metadata.row_group(group)) for group in range(file.num_row_groups)]
        start, held = 0, 0
        for group, group_bytes in enumerate(sizes):
            if group_bytes > ranges.LONGEST_RECORD_BYTES:
                raise _too_large(url, group, group_bytes)
            held += group_bytes
            if held >= block_bytes or group + 1 == len(sizes):
                yield Block(url, start, group + 1, header, None, size * (group + 1) // len(sizes))
                start, held = group + 1, 0

    def parse(self, block: Block) -> Parsed:
        """The notes of a block; nothing is left out."""
        columns = self.columns()
        with _opened(block.url) as file:
            before = sum(file.metadata.row_group(group).num_rows for group in range(block.start))
            table = file.read_row_groups(
                range(block.start, block.end), list(dict.fromkeys(columns.values())), use_threads=False
            )
        read = {}
        for field, column in columns.items():
            values = _plain(table.column(column))
            strings = _text(values) if field == "text" else _label(values)
            if strings is None:
                raise _unfit(block.url, column, values, field == "text")
            _check_utf8(block.url, column, strings, before)
            if strings.nbytes > ranges.LONGEST_RECORD_BYTES:
                raise _too_large(block.url, block.start, strings.nbytes)
            strings = strings.cast(pa.string())
            read[field] = pc.fill_null(strings, "") if field == "text" else blank_is_null(strings)
        for field in ("doc_id", "patient_id"):
            if field in read and read[field].null_count:
                row = before + pc.index(pc.is_null(read[field]), True).as_py() + 1
                raise DataError(f"{block.url}: row {row}: empty {columns[field]}; every note needs one")
        return Parsed(notes_table(record=np.arange(len(table)), **read), len(table), {})

    def _check(self, url: str, header: Sequence[str]) -> None:
        wanted = self.columns().values()
        if missing := [column for column in dict.fromkeys(wanted) if column not in header]:
            more = ", …" if len(header) > COLUMNS_SHOWN else ""
            raise DataError(
                f"{url}: no column {', '.join(missing)}; the columns are {', '.join(header[:COLUMNS_SHOWN])}{more}"
            )
        if twice := [column for column in wanted if header.count(column) > 1]:
            raise DataError(f"{url}: {header.count(twice[0])} columns are named {twice[0]}; rename them")

    def _wanted_bytes(self, group: Any) -> int:
        wanted = set(self.columns().values())
        columns = (group.column(place) for place in range(group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in wanted)


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Any]:
    """The Parquet file of a URL. Raises DataError where it is none or is damaged, also while it is read."""
    with storage.reader(url, compression=None) as stream:
        try:
            yield pq.ParquetFile(stream, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno is not None:
                raise  # of the system, not of the file
            raise DataError(f"{url}: no Parquet file, or a damaged one; compare its checksum") from None


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """One array without dictionary."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind):
        kind = pa.large_string()
    elif pa.types.is_binary(kind):
        kind = pa.large_binary()
    merged = column.cast(kind).combine_chunks()
    return pa.concat_arrays(merged.chunks) if isinstance(merged, pa.ChunkedArray) else merged


def _text(values: pa.Array) -> pa.Array | None:
    """As text of unchecked encoding; None where the column holds something else."""
    kind = values.type
    if pa.types.is_null(kind):
        return values.cast(pa.large_string())
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return values.cast(pa.large_string())
    if pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
        return values.cast(pa.large_binary()).cast(pa.large_string(), safe=False)
    return None


def _label(values: pa.Array) -> pa.Array | None:
    """As text; None where the column holds numbers that are not whole, or no labels at all."""
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_date32(kind) or (pa.types.is_decimal(kind) and kind.scale == 0):
        return values.cast(pa.string())
    if pa.types.is_date64(kind):
        return values.cast(pa.date32()).cast(pa.string())
    if pa.types.is_timestamp(kind):
        seconds = pc.floor_temporal(values.cast(pa.timestamp(kind.unit)), unit="second")
        return seconds.cast(pa.timestamp("s")).cast(pa.string())
    if pa.types.is_floating(kind):
        numbers = values.cast(pa.float64())
        numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
        whole = pc.and_(pc.equal(pc.floor(numbers), numbers), pc.less(pc.abs(numbers), EXACT_FLOAT))
        return numbers.cast(pa.int64()).cast(pa.string()) if pc.all(whole, min_count=0).as_py() else None
    return _text(values)


def _too_large(url: str, group: int, group_bytes: int) -> DataError:
    # 32 bits count the bytes of a column of text.
    return DataError(
        f"{url}: row group {group} holds {group_bytes:,} bytes; write smaller ones (row_group_size=50_000)"
    )


def _unfit(url: str, column: str, values: pa.Array, is_text: bool) -> DataError:
    kind = str(values.type)[:40]
    if pa.types.is_floating(values.type) and not is_text:
        return DataError(f"{url}: column {column} ({kind}) holds numbers that are not whole; write it as text")
    return DataError(f"{url}: column {column} is {kind}; write it as text")


def _check_utf8(url: str, column: str, strings: pa.Array, before: int) -> None:
    """Raises DataError with the row where text is not UTF-8; Parquet files are not checked by who reads them."""
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid:
        for row, data in enumerate(strings.cast(pa.large_binary()), before + 1):
            try:
                bytes(data.as_py() or b"").decode()
            except UnicodeDecodeError:
                raise DataError(f"{url}: row {row}: {column} is not UTF-8 text; convert the file") from None
        raise DataError(f"{url}: column {column} is damaged; compare the file's checksum") from None
