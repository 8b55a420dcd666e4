"""The CSV reader gives back every field, wherever blocks are cut, or says where the file is wrong."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError, StorageError
from sharding.readers import csv_file

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
    rows = [[str(number), TEXTS[number % len(TEXTS)], "m" * (number % 7)] for number in range(200)]
    return [["ROW_ID", "text", "More"], *rows, ["200", '"x\r\n' * 30_000, ""], ["201", "", "last"]]


def read(path: Path, block_bytes: int) -> tuple[list[tuple[str, ...]], int]:
    found: list[tuple[str, ...]] = []
    blocks = list(csv_file.blocks(str(path), ["TEXT", "row_id"], block_bytes))
    for block in blocks:
        assert block.first_record == len(found) + 1
        found += zip(*csv_file.parse(block, ["TEXT", "row_id"]), strict=True)
        assert block.records == len(found) - block.first_record + 1
    return found, len(blocks)


@pytest.mark.parametrize("end", ["\r\n", "\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_every_text_of_the_torture_file_for_many_block_sizes(tmp_path: Path, quoting: int, end: str) -> None:
    records = torture()
    path = write(tmp_path / "notes.csv", records, quoting, end)
    serial = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert serial == records
    cuts = set()
    for block_bytes in [64, 100, 999, 1000, 1001, 4096, 65_537, 200_000, 10_000_000]:
        found, blocks = read(path, block_bytes)
        assert found == [(record[1], record[0]) for record in serial[1:]]
        cuts.add(blocks)
    assert max(cuts) > 40
    assert min(cuts) == 1


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
    assert read(path, block_bytes)[0] == records


def test_blocks_begin_at_the_same_bytes_for_plain_and_gz(tmp_path: Path) -> None:
    plain = write(tmp_path / "notes.csv", torture())
    packed = tmp_path / "notes.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    cuts = [[(b.offset, b.data) for b in csv_file.blocks(str(p), ["text"], 1000)] for p in (plain, packed)]
    assert cuts[0] == cuts[1]
    assert b"".join(data for _, data in cuts[0]) == plain.read_bytes().split(b"\r\n", 1)[1]


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
        (b"text,row_id\na,1\n\nsecret,2,3\n", "record 2 at byte 17 has 3 fields, the header has 2"),
        (b"text,row_id\na,1\nsecret\nb,2\n", "record 2 at byte 16 has 1 fields, the header has 2"),
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
@pytest.mark.parametrize("block_bytes", [8, 1000])
def test_a_malformed_file_is_an_error_that_says_where_and_shows_no_text(
    tmp_path: Path, content: bytes, said: str, block_bytes: int
) -> None:
    path = tmp_path / "notes.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path, block_bytes)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_missing_file_and_truncated_gz(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        list(csv_file.rows(str(tmp_path / "none.csv"), ["text"]))
    packed = tmp_path / "notes.csv.gz"
    packed.write_bytes(gzip.compress(write(tmp_path / "n.csv", torture()).read_bytes())[:-40])
    with pytest.raises(DataError, match="cut off or damaged"):
        list(csv_file.rows(str(packed), ["text"]))
