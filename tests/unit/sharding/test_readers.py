"""Contracts every reader keeps, and the facts of each format."""

from __future__ import annotations

import csv
import io
import json
import typing
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import validate
from cluster.errors import ConfigError, DataError, StorageError
from sharding.job import ShardRecipe
from sharding.readers import READERS, ReaderConfig, documents
from sharding.schema import NOTES_SCHEMA

MIMIC_HEADER = "ROW_ID,SUBJECT_ID,HADM_ID,CHARTDATE,CHARTTIME,STORETIME,CATEGORY,DESCRIPTION,CGID,ISERROR,TEXT"
MIMIC_ROWS = [
    ("1", "7", "", "2101-10-20", "", "", "ECG", "Report", "", "", "Sinus secret."),
    ("2", "7", "12", "2101-10-20", "2101-10-20 12:33:00", "", "Nutrition ", "a b", "", "", "Two\r\nsecrets"),
    ("3", "8", "13", "2101-10-21", "", "", "Nursing", "x", "5", "1", "wrong patient"),
    ("4", "8", "13", "2101-10-21", "", "", "Nursing", "x", "5", "", "\n"),
]
TEXTS = ["Sinus secret.", "", "Two\r\nsecret\nlines, é 漢 😀 \u2028", "NA", 'a "secret"\n', "a secret " * 40]
NAMED = {"text": "text", "doc_id": "row_id", "patient_id": "subject_id"}
CONFIGS = {
    "mimic": {"name": "mimic"},
    "csv": {"name": "csv", **NAMED},
    "jsonl": {"name": "jsonl", **NAMED},
    "parquet": {"name": "parquet", **NAMED},
    "wikipedia": {"name": "wikipedia"},
}
ROWS = [{"row_id": str(number), "subject_id": str(number // 2), "text": text} for number, text in enumerate(TEXTS)]


def notes(folder: Path, rows: Sequence[Sequence[str]] = MIMIC_ROWS, header: str = MIMIC_HEADER) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([header.split(","), *rows])
    path = folder / "NOTEEVENTS.csv"
    path.write_bytes(text.getvalue().encode())
    return path


def table(folder: Path) -> Path:
    return notes(folder, [list(row.values()) for row in ROWS], ",".join(ROWS[0]))


def lines(folder: Path) -> Path:
    path = folder / "notes.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), newline="")
    return path


def row_groups(folder: Path) -> Path:
    path = folder / "notes.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)
    return path


def dump(folder: Path) -> Path:
    pages = [
        f"  <page>\n<title>T{number}</title><ns>{number % 4}</ns><id>{number}</id>"
        f"<revision><timestamp>2012-01-31T13:45:00Z</timestamp><text>a '''secret''' {number}</text></revision></page>\n"
        for number in range(1, 10)
    ]
    path = folder / "wiki.xml"
    path.write_text(f"<mediawiki>\n<siteinfo></siteinfo>\n{''.join(pages)}</mediawiki>\n")
    return path


# Reader → what writes a file for it with at least four records, none of them under its own name twice.
SAMPLES: dict[str, Callable[[Path], Path]] = {
    "mimic": notes,
    "csv": table,
    "jsonl": lines,
    "parquet": row_groups,
    "wikipedia": dump,
}


def test_the_union_of_configs_is_the_registry() -> None:
    assert set(typing.get_args(ReaderConfig)) == set(READERS.values())
    assert all(kind.model_fields["name"].default == name for name, kind in READERS.items())


@pytest.mark.parametrize("name", READERS)
def test_contract(name: str, tmp_path: Path) -> None:
    reader = READERS[name].model_validate(CONFIGS[name])
    url = str(SAMPLES[name](tmp_path))
    found = list(documents(url, reader))
    assert len({note["doc_id"] for note in found}) == len(found) > 1
    assert all(note["doc_id"] and note["patient_id"] for note in found)
    numbers = []
    for block_bytes in (1, 50, 150, 10_000, 1 << 30):
        blocks = list(reader.blocks(url, block_bytes))
        assert all(first.end == second.start for first, second in pairwise(blocks))
        assert all(block.start < block.end and block.stored_end <= Path(url).stat().st_size for block in blocks)
        notes, before = [], 0
        for block in blocks:
            parsed = reader.parse(block)
            assert parsed.notes.schema == NOTES_SCHEMA
            parsed.notes.validate(full=True)
            assert parsed.notes.num_rows + sum(parsed.drops.values()) == parsed.records > 0
            numbered = parsed.notes.column("record").to_pylist()
            assert sorted(set(numbered) & set(range(parsed.records))) == numbered
            notes += [note | {"record": before + note["record"]} for note in parsed.notes.to_pylist()]
            before += parsed.records
        assert notes == found
        numbers.append((len(blocks), before))
    assert {records for _, records in numbers} == {numbers[0][1]}
    assert numbers[0][0] == numbers[0][1]  # one byte a block: one record a block
    assert numbers[-1][0] == 1


@pytest.mark.parametrize("name", READERS)
def test_a_file_cut_off_anywhere_shows_no_text(name: str, tmp_path: Path) -> None:
    reader = READERS[name].model_validate(CONFIGS[name])
    path = SAMPLES[name](tmp_path)
    data, said = path.read_bytes(), []
    step = 1 if len(data) < 3000 else 7
    for cut in range(0, len(data) - 1, step):
        path.write_bytes(data[:cut])
        try:
            for block in reader.blocks(str(path), 60):
                reader.parse(block)
        except DataError as exc:
            said.append(str(exc))
    assert len(said) > len(data) // step // 8
    assert not any("secret" in message or "\n" in message or str(path) not in message for message in said)


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    reader = READERS[name].model_validate(CONFIGS[name])
    with pytest.raises(StorageError, match="no such file"):
        list(reader.blocks(str(tmp_path / "none"), 1000))


def test_mimic_facts(tmp_path: Path) -> None:
    reader = READERS["mimic"]()
    url = str(notes(tmp_path, header=MIMIC_HEADER.lower()))
    first, second, third = documents(url, reader)
    assert (first["encounter_id"], first["time"], first["category"]) == (None, "2101-10-20", "ECG")
    assert (second["encounter_id"], second["time"]) == ("12", "2101-10-20 12:33:00")
    assert (second["category"], second["text"]) == ("Nutrition", "Two\r\nsecrets")
    assert (third["doc_id"], third["record"]) == ("4", 3)
    (block,) = reader.blocks(url, 10_000)
    assert reader.parse(block).drops == {"iserror": 1}
    some = READERS["mimic"].model_validate({"categories": ["ECG"]})
    assert some.parse(block).drops == {"iserror": 1, "category": 2}


def test_mimic_note_without_patient_is_an_error(tmp_path: Path) -> None:
    path = notes(tmp_path, [*MIMIC_ROWS, ("5", "", "", "", "", "", "ECG", "", "", "", "secret")])
    place = path.read_bytes().index(b"5,,,,")
    for block_bytes in (1, 100, 10_000):
        with pytest.raises(DataError, match=f"the record at byte {place}: empty SUBJECT_ID") as caught:
            for block in READERS["mimic"]().blocks(str(path), block_bytes):
                READERS["mimic"]().parse(block)
        assert "secret" not in str(caught.value)


def test_csv_without_ids_leaves_them_open(tmp_path: Path) -> None:
    reader = READERS["csv"].model_validate({"text": "TEXT"})
    found = list(documents(str(notes(tmp_path)), reader))
    assert [note["record"] for note in found] == [0, 1, 2, 3]
    assert {note[field] for note in found for field in ("doc_id", "patient_id", "time")} == {None}


def test_a_wrong_key_of_a_reader_is_named() -> None:
    values = {
        "input": "a",
        "output": "b",
        "tokenizer": {"vocab_size": 9},
        "reader": {"name": "csv", "txt": "x"},
    }
    with pytest.raises(ConfigError, match="reader"):
        validate(ShardRecipe, values, "test")
