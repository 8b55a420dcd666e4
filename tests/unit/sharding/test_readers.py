"""Contracts every reader keeps, and the facts of each format."""

from __future__ import annotations

import csv
import io
import typing
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.config import validate
from cluster.errors import ConfigError, DataError
from sharding.job import ShardRecipe
from sharding.readers import READERS, ReaderConfig, documents

MIMIC_HEADER = "ROW_ID,SUBJECT_ID,HADM_ID,CHARTDATE,CHARTTIME,STORETIME,CATEGORY,DESCRIPTION,CGID,ISERROR,TEXT"
MIMIC_ROWS = [
    ("1", "7", "", "2101-10-20", "", "", "ECG", "Report", "", "", "Sinus rhythm."),
    ("2", "7", "12", "2101-10-20", "2101-10-20 12:33:00", "", "Nutrition ", "a b", "", "", "Two\r\nlines"),
    ("3", "8", "13", "2101-10-21", "", "", "Nursing", "x", "5", "1", "wrong patient"),
    ("4", "8", "13", "2101-10-21", "", "", "Nursing", "x", "5", "", "\n"),
]
CONFIGS = {
    "mimic": {"name": "mimic"},
    "csv": {"name": "csv", "text": "text", "doc_id": "row_id", "patient_id": "subject_id"},
}


def notes(folder: Path, rows: Sequence[Sequence[str]] = MIMIC_ROWS, header: str = MIMIC_HEADER) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header.split(","), *rows])
    path = folder / "NOTEEVENTS.csv"
    path.write_bytes(text.getvalue().encode())
    return str(path)


def test_the_union_of_configs_is_the_registry() -> None:
    assert set(typing.get_args(ReaderConfig)) == set(READERS.values())
    assert all(kind.model_fields["name"].default == name for name, kind in READERS.items())


@pytest.mark.parametrize("name", READERS)
def test_contract(name: str, tmp_path: Path) -> None:
    reader = READERS[name].model_validate(CONFIGS[name])
    url = notes(tmp_path)
    found = list(documents(url, reader))
    assert len({document.doc_id for document in found}) == len(found) > 0
    for block_bytes in (1, 150, 10_000):
        blocks = list(reader.blocks(url, block_bytes))
        parsed = [reader.parse(block) for block in blocks]
        assert [document for part in parsed for document in part.documents] == found
        for block, part in zip(blocks, parsed, strict=True):
            assert len(part.documents) + sum(part.drops.values()) == block.records


def test_mimic_facts(tmp_path: Path) -> None:
    reader = READERS["mimic"]()
    url = notes(tmp_path, header=MIMIC_HEADER.lower())
    first, second, third = documents(url, reader)
    assert (first.encounter_id, first.time, first.category) == (None, "2101-10-20", "ECG")
    assert (second.encounter_id, second.time) == ("12", "2101-10-20 12:33:00")
    assert (second.category, second.text) == ("Nutrition", "Two\r\nlines")
    assert third.doc_id == "4"
    (block,) = reader.blocks(url, 10_000)
    assert reader.parse(block).drops == {"iserror": 1}
    some = READERS["mimic"].model_validate({"categories": ["ECG"]})
    assert some.parse(block).drops == {"iserror": 1, "category": 2}


def test_mimic_note_without_patient_is_an_error(tmp_path: Path) -> None:
    url = notes(tmp_path, [*MIMIC_ROWS, ("5", "", "", "", "", "", "ECG", "", "", "", "secret")])
    with pytest.raises(DataError, match="record 5: empty SUBJECT_ID") as caught:
        list(documents(url, READERS["mimic"]()))
    assert "secret" not in str(caught.value)


def test_csv_without_ids_counts_rows_and_leaves_the_patient_open(tmp_path: Path) -> None:
    reader = READERS["csv"].model_validate({"text": "TEXT"})
    url = notes(tmp_path)
    for block_bytes in (1, 10_000):
        found = [document for block in reader.blocks(url, block_bytes) for document in reader.parse(block).documents]
        assert [document.doc_id for document in found] == ["1", "2", "3", "4"]
        assert {document.patient_id for document in found} == {None}


def test_a_wrong_key_of_a_reader_is_named() -> None:
    values = {
        "input": "a",
        "output": "b",
        "tokenizer": {"vocab_size": 9},
        "reader": {"name": "csv", "txt": "x"},
    }
    with pytest.raises(ConfigError, match="reader"):
        validate(ShardRecipe, values, "test")
