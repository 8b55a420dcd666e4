"""Parquet files give the same notes for every block size; what no column of notes can be is an error."""

from __future__ import annotations

import datetime
import decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.errors import DataError, StorageError
from sharding.readers import documents, ranges
from sharding.readers.parquet import ParquetReader

READER = ParquetReader(text="text", doc_id="id", patient_id="who", encounter_id="stay", category="kind", time="at")
TEXTS = ["plain", "", "NA", "two\r\nlines\n", "\x00 \u2028 é 漢 😀", '"quoted", ', "x" * 150_000]
NOON = datetime.datetime(2101, 10, 20, 12, 33)


def columns(rows: int = 40) -> dict[str, pa.Array]:
    numbers = range(rows)
    return {
        "id": pa.array(numbers, pa.int32()),
        "who": pa.array([f"p{number // 3}" for number in numbers]),
        "stay": pa.array([None if number % 4 else float(number) for number in numbers], pa.float64()),
        "kind": pa.array([["ECG", "Nursing ", None][number % 3] for number in numbers]).dictionary_encode(),
        "at": pa.array([NOON] * rows, pa.timestamp("us")),
        "other": pa.array([[1, 2]] * rows),
        "text": pa.array([TEXTS[number % len(TEXTS)] for number in numbers]),
    }


def write(path: Path, rows_a_group: int = 3, **changed: Any) -> str:
    pq.write_table(pa.table(columns() | changed), path, row_group_size=rows_a_group)
    return str(path)


def text_of(tmp_path: Path, field: str, values: pa.Array) -> list[Any]:
    """What becomes of these values in a column for `field`."""
    path = tmp_path / "one.parquet"
    key = {"encounter_id": "stay", "category": "kind", "time": "at", "doc_id": "id"}.get(field, field)
    pq.write_table(
        pa.table({name: column[: len(values)] for name, column in (columns() | {key: values}).items()}), path
    )
    return [note[field] for note in documents(str(path), READER)]


def test_the_same_notes_for_every_block_size(tmp_path: Path) -> None:
    url = write(tmp_path / "notes.parquet")
    found = list(documents(url, READER))
    assert [note["text"] for note in found] == [TEXTS[number % len(TEXTS)] for number in range(40)]
    assert [note["doc_id"] for note in found] == [str(number) for number in range(40)]
    assert [note["encounter_id"] for note in found[:5]] == ["0", None, None, None, "4"]
    assert [note["category"] for note in found[:3]] == ["ECG", "Nursing", None]
    assert {note["time"] for note in found} == {"2101-10-20 12:33:00"}
    numbers = set()
    for block_bytes in [1, 200, 300, 500, 1000, 5000, 10_000, 50_000, 1 << 30]:
        blocks = list(READER.blocks(url, block_bytes))
        assert (blocks[0].start, blocks[-1].end) == (0, 14)
        assert all(first.end == second.start for first, second in pairwise(blocks))
        assert blocks[-1].stored_end == Path(url).stat().st_size
        before = 0
        for block in blocks:
            parsed = READER.parse(block)
            notes = parsed.notes.to_pylist()
            assert [note["record"] for note in notes] == list(range(parsed.records))
            assert [note | {"record": before + note["record"]} for note in notes] == found[before:][: len(notes)]
            before += parsed.records
        assert before == 40
        numbers.add(len(blocks))
    assert {1, 14} < numbers


def test_blocks_are_as_large_as_asked(tmp_path: Path) -> None:
    texts = pa.array([f"{number:01000}" for number in range(40)])
    url = write(tmp_path / "notes.parquet", 2, text=texts, other=pa.array([f"{n:0100000}" for n in range(40)]))
    # A group has 200 kB of `other`, which nobody asked for, and 4 kB of text and its statistics.
    blocks = list(READER.blocks(url, 6500))
    assert [(block.start, block.end) for block in blocks[:3]] == [(0, 2), (2, 4), (4, 6)]
    assert blocks[0].stored_end < blocks[1].stored_end


def test_only_the_wanted_columns_are_named_by_the_recipe(tmp_path: Path) -> None:
    url = write(tmp_path / "notes.parquet")
    found = list(documents(url, ParquetReader(text="text")))
    assert {note[field] for note in found for field in ("doc_id", "patient_id", "category", "time")} == {None}
    assert [note["record"] for note in found] == list(range(40))


def test_from_a_store_that_is_not_local(tmp_path: Path) -> None:
    url = "memory://readers/notes.parquet"
    storage.write_bytes(url, Path(write(tmp_path / "notes.parquet")).read_bytes())
    assert list(documents(url, READER)) == list(documents(str(tmp_path / "notes.parquet"), READER))
    storage.remove(url)


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_texts_of_every_kind(tmp_path: Path, kind: pa.DataType) -> None:
    plain = columns()["text"]
    values = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    url = write(tmp_path / "notes.parquet", text=values)
    assert [note["text"] for note in documents(url, READER)] == plain.to_pylist()


def test_a_text_that_is_null_is_empty(tmp_path: Path) -> None:
    assert text_of(tmp_path, "text", pa.array(["a", None, " "])) == ["a", "", " "]
    assert text_of(tmp_path, "text", pa.array([None, None, None])) == ["", "", ""]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array([1, None, -3], pa.int64()), ["1", None, "-3"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([17.0, None, float("nan"), -0.0]), ["17", None, None, "0"]),
        (pa.array([17.0], pa.float32()), ["17"]),
        (pa.array([None, None], pa.float64()), [None, None]),
        (pa.array([None, None]), [None, None]),
        (pa.array([decimal.Decimal(17), None], pa.decimal128(20, 0)), ["17", None]),
        (pa.array([" a ", "  ", "\u00e9"]), ["a", None, "é"]),
        (pa.array([b"a", None]), ["a", None]),
        (pa.array([NOON, None], pa.timestamp("ns")), ["2101-10-20 12:33:00", None]),
        (pa.array([NOON], pa.timestamp("s")), ["2101-10-20 12:33:00"]),
        (pa.array([NOON.replace(microsecond=999_999)], pa.timestamp("us")), ["2101-10-20 12:33:00"]),
        (pa.array([NOON.replace(year=1901, microsecond=1)], pa.timestamp("us")), ["1901-10-20 12:33:00"]),
        (pa.array([NOON], pa.timestamp("us", "UTC")), ["2101-10-20 12:33:00"]),
        (pa.array([NOON], pa.timestamp("us", "America/New_York")), ["2101-10-20 12:33:00"]),
        (pa.array([NOON.date(), None], pa.date32()), ["2101-10-20", None]),
        (pa.array([NOON.date()], pa.date64()), ["2101-10-20"]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
@pytest.mark.parametrize("field", ["encounter_id", "time"])
def test_labels_of_every_kind(tmp_path: Path, field: str, values: pa.Array, texts: list[str | None]) -> None:
    assert text_of(tmp_path, field, values) == texts


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"id": pa.array([1.5] * 40)}, r"column id \(double\) holds numbers that are not whole"),
        ({"stay": pa.array([1e300] * 40)}, r"column stay \(double\) holds numbers that are not whole"),
        ({"stay": pa.array([float("inf")] * 40)}, r"column stay \(double\) holds numbers that are not whole"),
        ({"text": pa.array([1] * 40)}, "column text is int64; write it as text"),
        ({"text": pa.array([["secret"]] * 40)}, "column text is list"),
        ({"kind": pa.array([{"secret": 1}] * 40)}, "column kind is struct"),
        ({"kind": pa.array([True] * 40)}, "column kind is bool"),
        ({"who": pa.array(["a"] * 30 + [None] + ["b"] * 9)}, "row 31: empty who; every note needs one"),
        ({"who": pa.array(["a"] * 30 + ["  "] + ["b"] * 9)}, "row 31: empty who; every note needs one"),
        ({"text": pa.array([b"secret"] * 30 + [b"secret \xff"] * 10)}, "row 31: text is not UTF-8"),
        ({"kind": pa.array([b"secret"] * 30 + [b"secret \xff"] * 10)}, "row 31: kind is not UTF-8"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 30])
def test_values_that_fit_no_note(tmp_path: Path, changed: dict[str, pa.Array], said: str, block_bytes: int) -> None:
    url = write(tmp_path / "notes.parquet", **changed)
    with pytest.raises(DataError, match=said) as caught:
        for block in READER.blocks(url, block_bytes):
            READER.parse(block)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None or "secret" not in str(caught.value)


def test_text_marked_as_utf8_is_not_trusted(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 40, pa.array([b"secret \xff"] * 40, pa.binary()).buffers())
    url = write(tmp_path / "notes.parquet", text=bad)
    with pytest.raises(DataError, match="row 1: text is not UTF-8") as caught:
        list(documents(url, READER))
    assert "secret" not in str(caught.value)


def test_missing_and_doubled_columns(tmp_path: Path) -> None:
    url = write(tmp_path / "notes.parquet")
    with pytest.raises(
        DataError, match=r"no column note.id, txt; the columns are id, who, stay, kind, at, other, text$"
    ):
        list(ParquetReader(text="txt", doc_id="note.id").blocks(url, 1000))
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    pq.write_table(twice, url)
    with pytest.raises(DataError, match="2 columns are named text"):
        list(ParquetReader(text="text").blocks(url, 1000))


def test_a_row_group_that_is_too_large_says_how_to_write_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write(tmp_path / "notes.parquet", 20, text=pa.array(["secret" * 1000] * 40))
    monkeypatch.setattr(ranges, "LONGEST_RECORD_BYTES", 10_000)
    blocks = list(READER.blocks(url, 1000))  # a dictionary makes it small in the file
    with pytest.raises(DataError, match=r"row group 0 holds 120,\d+ bytes; write smaller ones"):
        READER.parse(blocks[0])
    monkeypatch.setattr(ranges, "LONGEST_RECORD_BYTES", 100)
    with pytest.raises(DataError, match="row group 0 holds"):
        list(READER.blocks(url, 1000))


def test_files_that_are_none_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "notes.parquet"
    data = Path(write(path, text=pa.array([f"secret {number:0999}" for number in range(40)]))).read_bytes()
    whole = list(documents(str(path), READER))
    for damaged in (b"", b"PAR1", b"secret,note\n1,2\n", data[:-1], data[:-200], data[200:], data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="no Parquet file, or a damaged one") as caught:
            list(documents(str(path), READER))
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="no such file"):
        list(documents(str(tmp_path / "none.parquet"), READER))
    path.write_bytes(data)
    assert list(documents(str(path), READER)) == whole


def test_pages_are_checked_where_the_file_has_checksums(tmp_path: Path) -> None:
    path = tmp_path / "notes.parquet"
    table = pa.table(columns() | {"text": pa.array([f"secret {number:0999}" for number in range(40)])})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    page = data.index(b"secret 000", data.index(b"secret 000") + 2500)  # the header of a page holds its extremes
    data[page + 500] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        list(documents(str(path), READER))


def test_a_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "notes.parquet"
    pq.write_table(pa.table(columns()).slice(0, 0), path)
    assert list(documents(str(path), READER)) == []
