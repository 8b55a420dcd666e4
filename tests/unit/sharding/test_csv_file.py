"""The CSV reader gives back every field, wherever blocks are cut, or says where the file is wrong."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError, StorageError
from sharding.readers import csv_file, ranges
from sharding.schema import Block

csv.field_size_limit(1 << 30)

TEXTS = [
    "plain",
    "",
    "NA",
    "null",
    "two\r\nlines and\nthree\n\n\n",
    '"quoted" at both "ends"',
    'he said ""',
    '"',
    '""',
    'looks like\n17,3,"x","y"\n"18",4,',
    'ends in a quote and comma",',
    'back\\slash \\" and tab\t',
    "line\u2028separator \u0085 \u00a0 é 漢 😀",
    ",\r",
    " leading and trailing ",
]


def write(path: Path, records: list[list[str]], quoting: int = csv.QUOTE_MINIMAL, end: str = "\r\n") -> Path:
    text = io.StringIO()
    csv.writer(text, quoting=quoting, lineterminator=end).writerows(records)
    path.write_bytes(text.getvalue().encode())
    return path


def torture() -> list[list[str]]:
    rows = [[str(number), TEXTS[number % len(TEXTS)], "m" * (number % 7)] for number in range(600)]
    return [["ROW_ID", "text", "More"], *rows, ["600", '"x\r\n' * 30_000, ""], ["601", "", "last"]]


def read(path: Path, block_bytes: int) -> tuple[list[tuple[str, ...]], list[Block]]:
    found: list[tuple[str, ...]] = []
    blocks = list(csv_file.blocks(str(path), ["TEXT", "row_id"], block_bytes))
    for block in blocks:
        found += zip(*(column.to_pylist() for column in csv_file.parse(block, ["TEXT", "row_id"])), strict=True)
    return found, blocks


def places(blocks: list[Block]) -> list[tuple[int, int]]:
    return [(block.start, block.end) for block in blocks]


@pytest.mark.parametrize(
    "numbers",
    [[*range(1, 21), *range(21, 201, 12)], pytest.param(range(1, 201), marks=pytest.mark.slow)],
    ids=["", "all"],
)
@pytest.mark.parametrize(
    ("quoting", "end", "mark"), [(csv.QUOTE_MINIMAL, "\r\n", csv_file.BOM), (csv.QUOTE_ALL, "\n", b"")]
)
def test_every_text_of_the_torture_file_for_every_number_of_ranges(
    tmp_path: Path, quoting: int, end: str, mark: bytes, numbers: Sequence[int]
) -> None:
    records = torture()
    plain = write(tmp_path / "notes.csv", records, quoting, end)
    plain.write_bytes(mark + plain.read_bytes().removesuffix(end.encode()))
    packed = tmp_path / "notes.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), 1))
    size = plain.stat().st_size
    serial = list(csv.reader(io.StringIO(plain.read_bytes().decode("utf-8-sig"), newline="")))
    assert serial == records
    wanted = [(record[1], record[0]) for record in serial[1:]]
    cuts = set()
    for ranges_wanted in numbers:
        block_bytes = -(-size // ranges_wanted)
        found, blocks = read(plain, block_bytes)
        assert found == wanted
        assert all(block.data is None for block in blocks)
        assert all(first.end == second.start for first, second in pairwise(blocks))
        assert blocks[-1].end == size
        cuts.add(len(blocks))
        found, streamed = read(packed, block_bytes)
        assert found == wanted
        assert places(streamed) == places(blocks)
    # Many of up to 200 ranges lie in the one record of 150 kB.
    assert min(cuts) == 1
    assert max(cuts) > 15


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(
        st.tuples(st.text(alphabet='ab,"\r\n é', max_size=8), st.text(alphabet='1",\n', max_size=4)),
        max_size=8,
    ),
    block_bytes=st.integers(1, 60),
    final_newline=st.booleans(),
)
def test_any_records_any_block_size(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[tuple[str, str]],
    block_bytes: int,
    final_newline: bool,
) -> None:
    path = tmp_path_factory.mktemp("csv") / "any.csv"
    write(path, [["text", "row_id"], *map(list, records)], csv.QUOTE_ALL, "\n")
    if not final_newline:
        path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    found, blocks = read(path, block_bytes)
    assert found == records
    starts = [block.start for block in blocks]
    assert len({start // block_bytes for start in starts}) == len(starts)  # the rule: one block a chunk
    packed = path.with_name("any.csv.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert places(read(packed, block_bytes)[1]) == places(blocks)


def test_blocks_hold_the_same_bytes_for_plain_and_packed(tmp_path: Path) -> None:
    plain = write(tmp_path / "notes.csv", torture())
    data = plain.read_bytes()
    ways = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    cuts = [[(b.start, b.end, ranges.data_of(b)) for b in csv_file.blocks(str(plain), ["text"], 1000)]]
    for ending, pack in ways.items():
        packed = tmp_path / f"notes.csv.{ending}"
        packed.write_bytes(pack(data))
        cuts.append([(b.start, b.end, ranges.data_of(b)) for b in csv_file.blocks(str(packed), ["text"], 1000)])
        assert cuts[-1] == cuts[0]
    assert len(cuts[0]) > 5
    assert b"".join(piece for _, _, piece in cuts[0]) == data.split(b"\r\n", 1)[1]


def test_a_header_longer_than_a_block_does_not_move_blocks(tmp_path: Path) -> None:
    plain = tmp_path / "notes.csv"
    plain.write_bytes(b"text,row_id," + b"x" * 60 + b"\n" + b"a,1,\n" * 8)
    packed = tmp_path / "notes.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for block_bytes in range(1, 130):
        assert places(read(packed, block_bytes)[1]) == places(read(plain, block_bytes)[1])


def test_bom_blank_lines_and_missing_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_bytes(b'\xef\xbb\xbftext,ROW_ID\n\na,1\r\n\r\n"b\n\nc",2\n\n\n,3')
    for block_bytes in (1, 5, 7, 100):
        assert read(path, block_bytes)[0] == [("a", "1"), ("b\n\nc", "2"), ("", "3")]
    assert list(csv_file.rows(str(path), ["row_id"])) == [("1",), ("2",), ("3",)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'text,row_id\nsecret,1\n"secret,2\n', "ends inside a quoted field; the record starts at byte 21"),
        (b'text,row_id\nsecret,1\nsecret 5" long,2\n', "stray quote at byte 29"),
        (b'text,row_id\n"secret"s,1\n', "stray quote at byte 19"),
        (b'text,row_id\n"secret" ,1\n"x",2\n', "stray quote at byte 19"),
        (b"text,row_id\na,1\n\nsecret,2,3\n", "the record at byte 17 has 3 fields, the header has 2"),
        (b"text,row_id\na,1\nsecret\nb,2\n", "the record at byte 16 has 1 fields, the header has 2"),
        (b"text,row_id\na,1\nsecret \xff,2\n", "byte 23 is not UTF-8"),
        (b"text,row_id\nsecret,1\rsecret,2\n", "a carriage return stands alone"),
        (b"text,row_id\rsecret,1\rsecret,2\r", "CR alone"),
        (b"text,date\nsecret,1\n", "no column row_id; the columns are text, date"),
        (b"", "no header"),
        ("text,row_id\nsecret,1\n".encode("utf-16"), "UTF-16"),
        (b'"secret\nnote",17\n', "the first line is no header"),
        (b"secret " * 20 + b",17\n", "the first line is no header"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_malformed_file_is_an_error_that_says_where_and_shows_no_text(
    tmp_path: Path, content: bytes, said: str, packed: bool
) -> None:
    path = tmp_path / ("notes.csv.gz" if packed else "notes.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    for block_bytes in range(1, len(content) + 2):
        with pytest.raises(DataError) as caught:
            read(path, block_bytes)
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
        assert "secret" not in str(caught.value)


def test_the_error_of_the_lowest_block_is_the_true_one(tmp_path: Path) -> None:
    # Blocks behind a stray quote are cut inside of quotes; what they say is not to be shown.
    path = tmp_path / "notes.csv"
    path.write_bytes(b"text,row_id\n" + b"ok,1\n" * 9 + b'5" long,2\n' + b'"fine ""x""\n",3\n' * 9)
    said = []
    for block in csv_file.blocks(str(path), ["text"], 20):
        try:
            csv_file.parse(block, ["text"])
        except DataError as exc:
            said.append(str(exc))
    assert f"stray quote at byte {path.read_bytes().index(b'5') + 1}" in said[0]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        list(csv_file.rows(str(tmp_path / "none.csv"), ["text"]))


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_a_damaged_packed_file_is_never_a_shorter_one(tmp_path: Path, ending: str, pack: Callable[..., bytes]) -> None:
    draws = random.Random(1)
    path = tmp_path / f"notes.csv.{ending}"
    first = pack(b"text\n" + b"".join(b"%x\n" % draws.getrandbits(256) for _ in range(2000)))
    second = pack(b"".join(b"%x\n" % draws.getrandbits(256) for _ in range(2000)))
    path.write_bytes(first + second)
    assert sum(1 for _ in csv_file.rows(str(path), ["text"])) == 4000
    for damaged in (first[:-40], first[: len(first) // 2], first + b"Q" + second[1:], b"no such format"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cut off or damaged \(after byte \d+"):
            for block in csv_file.blocks(str(path), ["text"], 1000):
                csv_file.parse(block, ["text"])
    inside = bytearray(first)
    inside[len(inside) // 2] ^= 77
    path.write_bytes(inside)
    with pytest.raises(DataError):
        list(csv_file.rows(str(path), ["text"]))
