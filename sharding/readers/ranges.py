"""Cutting one file into ranges of whole records, so that many tasks can read it.

    block i = the records that begin in bytes [i·B, (i+1)·B) of the decompressed file

Plain files are indexed in parallel: each chunk of B bytes is scanned once, without knowing what came before it,
and says where its first record begins if it starts inside or outside of quotes, and whether it turns the one into
the other. The driver then only follows that bit from chunk to chunk. Compressed files can be read by one process
only: it cuts by the same rule while it decompresses, so both give the same blocks, and hands each on with its bytes.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import BinaryIO

import numpy as np

from cluster import storage
from cluster.errors import DataError
from sharding.schema import Block, Run

BLOCK_BYTES = 4 << 20
# A longer record is a quote that is never closed; and pyarrow counts the bytes of a block with 31 bits.
LONGEST_RECORD_BYTES = 1 << 30
# All that tells damage in a .bz2 from an error of the system.
BAD_BZ2 = "Invalid data stream"

# Of a chunk: where the first record begins if the chunk starts outside and if it starts inside of quotes (-1: no
# record begins), and whether the chunk has an odd number of quotes.
Scan = Callable[[bytes], tuple[int, int, bool]]


def scan_lines(chunk: bytes) -> tuple[int, int, bool]:
    """`Scan` of files with a record on every line."""
    return chunk.find(b"\n") + 1 or -1, -1, False


def blocks(url: str, header: tuple[str, ...], first: int, block_bytes: int, scan: Scan, run: Run) -> Iterator[Block]:
    """The blocks of a file whose records begin at byte `first`. Raises DataError or StorageError."""
    if storage.is_compressed(url):
        yield from _streamed(url, header, first, block_bytes, scan)
        return
    size = storage.size_bytes(url)
    # Chunks lie one byte early: a record begins after a newline, and the newline must be in the chunk.
    edges = [max(place * block_bytes - 1, 0) for place in range(-(-(size + 1) // block_bytes) + 1)]
    chunks = [(start, min(end, size)) for start, end in pairwise(edges) if start < min(end, size)]
    scanned = run(scan_range, [(url, start, end, scan) for start, end in chunks]) if size > block_bytes else []
    starts, inside = [first], False
    for (begin, end), (outside_start, inside_start, odd) in zip(chunks, scanned, strict=False):
        place = inside_start if inside else outside_start
        if place >= 0 and (begin + place) // block_bytes > starts[-1] // block_bytes:
            starts.append(begin + place)
        _check_length(url, starts[-1], end)
        inside ^= odd
    for start, end in pairwise([*starts, size]):
        if start < end:
            yield Block(url, start, end, header, None, end)


def scan_range(url: str, start: int, end: int, scan: Scan) -> tuple[int, int, bool]:
    """Scans bytes [start, end) of a plain file; runs in a task."""
    return scan(storage.read_range(url, start, end))


def _streamed(url: str, header: tuple[str, ...], first: int, block_bytes: int, scan: Scan) -> Iterator[Block]:
    with storage.decompressed(url) as (stream, stored):

        def block(start: int, pieces: list[bytes]) -> Block:
            data = np.frombuffer(b"".join(pieces), np.uint8)
            return Block(url, start, start + len(data), header, data, stored.tell())

        held: list[bytes] = []  # the bytes from `start` on that have been read
        start, position, inside, number = first, 0, False, 0
        while True:
            number += 1
            wanted = max(number * block_bytes - 1, 0) - position
            chunk = read(stream, url, wanted)
            outside_start, inside_start, odd = scan(chunk)
            place = inside_start if inside else outside_start
            of_header = max(first - position, 0)
            if place >= 0 and (position + place) // block_bytes > start // block_bytes:
                yield block(start, [*held, chunk[of_header:place]])
                start, held = position + place, [chunk[place:]]
            else:
                held.append(chunk[of_header:])
            position, inside = position + len(chunk), inside ^ odd
            _check_length(url, start, position)
            if len(chunk) < wanted:
                break
        _check_all_read(url, stored, position)
        if any(held):
            yield block(start, held)


def _check_length(url: str, start: int, end: int) -> None:
    if end - start > LONGEST_RECORD_BYTES:
        raise DataError(f"{url}: the record at byte {start} has no end in {end - start:,} bytes; a quote is open")


def data_of(block: Block) -> bytes:
    """The bytes of a block, carried by it or read from its file."""
    return storage.read_range(block.url, block.start, block.end) if block.data is None else block.data.tobytes()


def read(stream: BinaryIO, url: str, size: int) -> bytes:
    """`size` bytes, fewer at the end of the file only. Raises DataError where a compressed file is damaged."""
    pieces, left = [], size
    try:
        while left > 0 and (piece := stream.read(left)):
            pieces.append(piece)
            left -= len(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as exc:
        raise _damaged(url, stream.tell()) from exc
    except OSError as exc:
        if str(exc) == BAD_BZ2:
            raise _damaged(url, stream.tell()) from exc
        raise
    return b"".join(pieces)


def _check_all_read(url: str, stored: BinaryIO, position: int) -> None:
    """Raises DataError where the decompressor stopped before the end of the stored file.

    Python's takes a piece of a .bz2 or .xz that it does not understand for waste if a whole one went before.
    """
    if url.endswith((".bz2", ".xz")) and stored.read(1):
        raise _damaged(url, position)


def _damaged(url: str, position: int) -> DataError:
    return DataError(
        f"{url}: the compressed file is cut off or damaged (after byte {position} of its content); compare its checksum"
    )
