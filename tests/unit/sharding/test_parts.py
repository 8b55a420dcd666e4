"""Steps of one block, called directly: what is written, what is counted, what counts as done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sharding import parts
from sharding.clean import CleanConfig
from sharding.readers.csv_notes import CsvReader
from sharding.splits import SplitConfig, split_of

SPLITTING = SplitConfig(valid=0.3, test=0.3)
READER = CsvReader(text="text", patient_id="patient")
# Every patient has a word of his own, so it shows whose notes were counted.
TEXTS = [(str(patient), f"own{patient} shared word{note}") for note in range(2) for patient in range(30)]


@pytest.fixture
def work(tmp_path: Path) -> str:
    source = tmp_path / "notes.csv"
    source.write_text("patient,text\n" + "".join(f"{patient},{text}\n" for patient, text in TEXTS) + "31, \n")
    (block,) = READER.blocks(str(source), 1 << 20)
    folder = str(tmp_path / "work")
    counts = parts.read_block(block, READER, CleanConfig(), SPLITTING, folder)
    assert (counts["rows"], counts["notes"], counts["drops"]) == (61, 60, {"empty": 1})
    return folder


def test_only_kept_training_notes_are_counted_for_the_tokenizer(work: str) -> None:
    keep = np.arange(60) % 4 != 0
    training = [
        text
        for (patient, text), kept in zip(TEXTS, keep, strict=True)
        if kept and split_of(patient, SPLITTING) == "train"
    ]
    assert 5 < len(training) < 40
    assert parts.count_words(work, 0, keep) == Counter(word for text in training for word in text.split())


def test_a_part_reads_back_by_column(work: str) -> None:
    table = parts.read_columns(work, 0, ["text", "doc_id"])
    assert table.column_names == ["doc_id", "text"]
    assert table.column("text").to_pylist() == [text for _, text in TEXTS]
    assert table.column("doc_id").to_pylist() == [str(row) for row in range(1, 61)]


def test_a_step_is_done_when_its_json_and_whole_files_are_there(work: str) -> None:
    assert parts.done(work, "part", 1, work) is None
    found = parts.done(work, "part", 0, work)
    assert found is not None
    path = Path(work) / "part-00000.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    assert parts.done(work, "part", 0, work) is None
    path.unlink()
    assert parts.done(work, "part", 0, work) is None
