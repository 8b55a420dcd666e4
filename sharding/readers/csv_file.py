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
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv

from cluster import storage
from cluster.errors import DataError
from sharding.schema import Block

BLOCK_BYTES = 4 << 20
# A longer record is a quote that is never closed; and pyarrow counts the bytes of a block with 31 bits.
LONGEST_RECORD_BYTES = 1 << 30
HEADER_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")

_COMMA, _CR, _LF = b",\r\n"


def rows(url: str, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The fields of these columns for every record in file order; NULL and '' both come as ''.

    Header names match in upper and lower case. Raises DataError (missing columns, malformed CSV) or
    StorageError.
    """
    for block in blocks(url, columns, BLOCK_BYTES):
        yield from zip(*parse(block, columns), strict=True)


def blocks(url: str, columns: Sequence[str], block_bytes: int) -> Iterator[Block]:
    """Cuts a file into blocks of about `block_bytes` that begin and end between records."""
    with storage.reader(url) as stream:
        data = _read(stream, url, HEADER_BYTES)
        if data.startswith(UTF16):
            raise DataError(f"{url}: is UTF-16; convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)")
        offset = len(BOM) if data.startswith(BOM) else 0
        data = data[offset:]
        end = _first_record_end(data) or len(data)
        header = _header(url, data[:end])
        _places(url, header, columns)
        data, offset, index, record = data[end:], offset + end, 0, 1
        while True:
            data, end = _fill(stream, url, data, offset, block_bytes)
            if not end:
                return
            piece, data = data[:end], data[end:]
            records = _records(piece, url, offset)
            yield Block(url, index, offset, record, records, header, piece, _stored_position(stream))
            offset, index, record = offset + end, index + 1, record + records


def _fill(stream: BinaryIO, url: str, data: bytes, offset: int, block_bytes: int) -> tuple[bytes, int]:
    """`data` read on to a block, and where its last whole record ends (0: nothing is left)."""
    wanted = block_bytes
    while True:
        if wanted > len(data):
            data += _read(stream, url, wanted - len(data))
        if len(data) < wanted:
            if data.count(b'"') & 1:
                _records(data, url, offset)
                start = offset + last_record_end(data)
                raise DataError(f"{url}: ends inside a quoted field; the record starts at byte {start}: is it cut off?")
            return data, len(data)
        if end := last_record_end(data[:wanted]):
            return data, end
        wanted *= 2
        if wanted > LONGEST_RECORD_BYTES:
            raise DataError(f"{url}: the record at byte {offset} has no end in {wanted // 2:,} bytes; a quote is open")


def last_record_end(data: bytes) -> int:
    """Just after the last line end with an even number of quotes before it, 0 if none."""
    odd, end = data.count(b'"') & 1, len(data)
    while (newline := data.rfind(b"\n", 0, end)) >= 0:
        odd ^= data.count(b'"', newline + 1, end) & 1
        if not odd:
            return newline + 1
        end = newline
    return 0


def _first_record_end(data: bytes) -> int:
    odd, start = 0, 0
    while (newline := data.find(b"\n", start)) >= 0:
        odd ^= data.count(b'"', start, newline) & 1
        if not odd:
            return newline + 1
        start = newline + 1
    return 0


def _read(stream: BinaryIO, url: str, size: int) -> bytes:
    """`size` bytes, fewer at the end of the file only."""
    pieces, left = [], size
    try:
        while left and (piece := stream.read(left)):
            pieces.append(piece)
            left -= len(piece)
    except (EOFError, zlib.error) as exc:
        raise DataError(f"{url}: the compressed file is cut off or damaged; compare its checksum") from exc
    return b"".join(pieces)


def _stored_position(stream: BinaryIO) -> int:
    stored: Any = stream.fileobj if isinstance(stream, gzip.GzipFile) else stream
    return int(stored.tell())


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


def _records(data: bytes, url: str, offset: int) -> int:
    """Number of records without empty lines. Raises DataError at a quote where none may stand."""
    pieces = data.split(b'"')
    outside = pieces[::2]
    for place, piece in enumerate(outside):
        # Between a closing and an opening quote: nothing (a doubled quote), or a delimiter at either end.
        closes_well = place == 0 or not piece or piece[0] in (_COMMA, _CR, _LF)
        opens_well = 2 * place == len(pieces) - 1 or not piece or piece[-1] in (_COMMA, _LF)
        if not (closes_well and opens_well):
            before = pieces[: 2 * place + (1 if closes_well else 0)]
            stray = offset + sum(map(len, before)) + len(before) - 1
            raise DataError(f"{url}: stray quote at byte {stray}; quote the whole field and double the quotes in it")
    lines = b'"'.join(outside)
    unended = bool(lines) and not lines.endswith(b"\n")
    return lines.count(b"\n") + unended - len(re.findall(rb"(?m)^\r?\n", lines))


def parse(block: Block, columns: Sequence[str]) -> list[list[str]]:
    """The fields of each of `columns`, in record order. Raises DataError without any text of the block."""
    names = [f"f{place}" for place in range(len(block.columns))]
    wanted = [names[place] for place in _places(block.url, block.columns, columns)]
    wrong: list[tuple[int, int]] = []

    def note_wrong(row: Any) -> str:
        # Collected, not raised: pyarrow's own error quotes the record.
        wrong.append((row.number, row.actual_columns))
        return "skip"

    try:
        table = pa.csv.read_csv(
            pa.BufferReader(block.data),
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=len(block.data) + 1, column_names=names),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note_wrong),
            convert_options=pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:
        raise _unreadable(block) from None
    if wrong:
        number, fields = wrong[0]
        start = block.offset + _record_start(block.data, number)
        raise DataError(
            f"{block.url}: record {block.first_record + number - 1} at byte {start} has {fields} fields, "
            f"the header has {len(names)}"
        )
    if table.num_rows != block.records:
        raise DataError(
            f"{block.url}: {table.num_rows} records where {block.records} lines end, after byte "
            f"{block.offset}; a carriage return stands alone outside of quotes"
        )
    return [table.column(name).to_pylist() for name in wanted]


def _unreadable(block: Block) -> DataError:
    try:
        block.data.decode()
    except UnicodeDecodeError as exc:
        return DataError(f"{block.url}: byte {block.offset + exc.start} is not UTF-8 text; convert the file (iconv)")
    return DataError(f"{block.url}: malformed CSV after byte {block.offset}")


def _record_start(data: bytes, number: int) -> int:
    """Offset of the record with this number (1 is the first); blank lines do not count."""
    start = end = seen = odd = 0
    for line in data.split(b"\n"):
        end += len(line) + 1
        odd ^= line.count(b'"') & 1
        if odd:
            continue
        seen += bool(data[start:end].strip(b"\r\n"))
        if seen == number:
            break
        start = end
    return start
