"""CSV by RFC 4180, exactly: quoted fields may hold line ends, commas and doubled quotes.

    file ──(quote parity)──► record-aligned blocks ──(pyarrow, one block each)──► columns of text

A line end is the end of a record where the number of quotes before it is even. That makes a file divisible
without parsing it, as long as quotes stand only where RFC 4180 allows them: around whole fields, doubled
inside. The latter is checked for every quote, so a file with a stray quote is an error with its byte offset
and never a guess. A block is parsed as one pyarrow block because pyarrow loses a byte of a quoted CR LF
across two (arrow #51368).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from cluster import storage
from cluster.errors import DataError
from sharding.readers import ranges
from sharding.schema import Block, Run, in_order

HEADER_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")

_COMMA, _CR, _LF, _QUOTE = b',\r\n"'


def rows(url: str, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The fields of these columns for every record in file order; NULL and '' both come as ''.

    Header names match in upper and lower case. Raises DataError (missing columns, malformed CSV) or
    StorageError.
    """
    for block in blocks(url, columns, ranges.BLOCK_BYTES):
        yield from zip(*(column.to_pylist() for column in parse(block, columns)), strict=True)


def blocks(url: str, columns: Sequence[str], block_bytes: int, run: Run = in_order) -> Iterator[Block]:
    """Cuts a file into blocks of about `block_bytes` that begin and end between records."""
    with storage.reader(url) as stream:
        head = ranges.read(stream, url, HEADER_BYTES)
    if head.startswith(UTF16):
        raise DataError(f"{url}: is UTF-16; convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)")
    mark = len(BOM) if head.startswith(BOM) else 0
    end = _first_start(head, False) if len(head) else 0
    end = len(head) if end < 0 else end
    header = _header(url, head[mark:end])
    _places(url, header, columns)
    yield from ranges.blocks(url, header, end, block_bytes, scan, run)


def scan(chunk: bytes) -> tuple[int, int, bool]:
    """`ranges.Scan` of a CSV file: one pass that counts quotes; finding a record takes a line or two."""
    return _first_start(chunk, False), _first_start(chunk, True), bool(chunk.count(b'"') & 1)


def _first_start(data: bytes, odd: int) -> int:
    """Just after the first line end with an even number of quotes before it, -1 if none."""
    start = 0
    while (newline := data.find(b"\n", start)) >= 0:
        odd ^= data.count(b'"', start, newline) & 1
        if not odd:
            return newline + 1
        start = newline + 1
    return -1


def _header(url: str, data: bytes) -> tuple[str, ...]:
    try:
        lines = list(csv.reader(io.StringIO(data.decode(), newline="")))
    except UnicodeDecodeError:
        raise DataError(f"{url}: the header is not UTF-8 text; is it a CSV file?") from None
    if not lines or not any(lines[0]):
        raise DataError(f"{url}: has no header line; the first line must name the columns")
    if len(lines) > 1:
        raise DataError(f"{url}: lines end with CR alone; convert it first (tr '\\r' '\\n')")
    if any(not re.fullmatch(r"[^\r\n]{0,64}", name) for name in lines[0]):
        # What stands there may be a note; it is not shown.
        raise DataError(f"{url}: the first line is no header; put the names of the columns there")
    return tuple(name.strip() for name in lines[0])


def _places(url: str, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Where the wanted columns stand. Case does not matter: MIMIC-III comes in upper and in lower case."""
    known = {name.lower(): place for place, name in reversed(list(enumerate(header)))}
    missing = [column for column in columns if column.lower() not in known]
    if missing:
        raise DataError(f"{url}: no column {', '.join(missing)}; the columns are {', '.join(header)}")
    return [known[column.lower()] for column in columns]


def _count_records(url: str, start: int, data: bytes) -> int:
    """Number of records without empty lines. Raises DataError at a quote where none may stand."""
    codes = np.frombuffer(b"\n" + data + b"\n", np.uint8)  # a line end stands before and after
    quotes = np.flatnonzero(codes == _QUOTE)
    # An even number of quotes before: it opens a field, or is the second of a doubled quote; else it closes one.
    opening, closing = quotes[::2], quotes[1::2]
    before, after = codes[opening - 1], codes[closing + 1]
    opens_well = (before == _COMMA) | (before == _LF)
    opens_well[1:] |= opening[1:] == closing[: len(opening) - 1] + 1
    closes_well = (after == _COMMA) | (after == _CR) | (after == _LF) | (after == _QUOTE)
    stray = [*opening[~opens_well][:1].tolist(), *closing[~closes_well][:1].tolist()]
    if stray:
        where = start + min(stray) - 1
        raise DataError(f"{url}: stray quote at byte {where}; quote the whole field and double the quotes in it")
    if len(quotes) % 2:
        record = start + _last_record_start(data)
        raise DataError(f"{url}: ends inside a quoted field; the record starts at byte {record}: is it cut off?")
    line_ends = np.flatnonzero(codes == _LF)
    ends = line_ends[np.searchsorted(quotes, line_ends) % 2 == 0]
    lengths = np.diff(ends)
    return int((lengths > 1).sum() - ((lengths == 2) & (codes[ends[:-1] + 1] == _CR)).sum())


def _last_record_start(data: bytes) -> int:
    """Just after the last line end with an even number of quotes before it, 0 if none."""
    odd, end = data.count(b'"') & 1, len(data)
    while (newline := data.rfind(b"\n", 0, end)) >= 0:
        odd ^= data.count(b'"', newline + 1, end) & 1
        if not odd:
            return newline + 1
        end = newline
    return 0


def parse(block: Block, columns: Sequence[str]) -> list[pa.Array]:
    """The fields of each of `columns` in record order, as strings that are never null.

    Raises DataError without any text of the block.
    """
    data = ranges.data_of(block)
    records = _count_records(block.url, block.start, data)
    names = [f"f{place}" for place in range(len(block.header))]
    wanted = [names[place] for place in _places(block.url, block.header, columns)]
    wrong: list[tuple[int, int]] = []

    def note_wrong(row: Any) -> str:
        # Collected, not raised: pyarrow's own error quotes the record.
        wrong.append((row.number, row.actual_columns))
        return "skip"

    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note_wrong),
            convert_options=pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:
        raise _unreadable(block, data) from None
    if wrong:
        number, fields = wrong[0]
        raise DataError(f"{block.url}: {_place(block, data, number)} has {fields} fields, the header has {len(names)}")
    if table.num_rows != records:
        raise DataError(
            f"{block.url}: {table.num_rows} records where {records} lines end, after byte "
            f"{block.start}; a carriage return stands alone outside of quotes"
        )
    return [table.column(name).combine_chunks() for name in wanted]


def _unreadable(block: Block, data: bytes) -> DataError:
    try:
        data.decode()
    except UnicodeDecodeError as exc:
        return DataError(f"{block.url}: byte {block.start + exc.start} is not UTF-8 text; convert the file (iconv)")
    return DataError(f"{block.url}: malformed CSV after byte {block.start}")


def place(block: Block, number: int) -> str:
    """Where a record of the block (1 is its first) stands in the file, in words."""
    return _place(block, ranges.data_of(block), number)


def _place(block: Block, data: bytes, number: int) -> str:
    start = end = seen = odd = 0
    for line in data.split(b"\n"):
        end += len(line) + 1
        odd ^= line.count(b'"') & 1
        if odd:
            continue
        seen += bool(data[start:end].strip(b"\r\n"))  # blank lines do not count
        if seen == number:
            break
        start = end
    return f"the record at byte {block.start + start}"
