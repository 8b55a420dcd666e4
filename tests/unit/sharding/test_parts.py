"""Steps of one block, called directly: what is written, what is counted, what counts as done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sharding import parts
from sharding.clean import CleanConfig
from sharding.dedup import text_digest
from sharding.readers.csv_notes import CsvReader
from sharding.schema import SPLITS
from sharding.splits import SplitConfig, split_of

SPLITTING = SplitConfig(valid=0.3, test=0.3)
READER = CsvReader(text="text", patient_id="patient")
# Every patient has a word of his own, so it shows whose notes were counted.
TEXTS = [(str(patient), f"own{patient} Shared word{note}") for note in range(2) for patient in range(30)]


def read(folder: Path, case: str = "keep", reader: CsvReader = READER, compare: parts.Compare = "near") -> str:
    source = folder / "notes.csv"
    source.write_text("patient,text\n31, \n" + "".join(f"{patient},{text}\n" for patient, text in TEXTS))
    (block,) = reader.blocks(str(source), 1 << 20)
    work = str(folder / "work")
    config = CleanConfig.model_validate({"case": case})
    counts = parts.read_block(0, block, reader, config, SPLITTING, compare, work)
    assert (counts["rows"], counts["notes"], counts["drops"]) == (61, 60, {"empty": 1})
    assert counts["bytes_read"] == sum(len(text) for _, text in TEXTS)
    return work


def counted(work: str, mask: np.ndarray, kind: str) -> dict[str, int]:
    table = parts.count_words(work, 0, mask, kind)
    return dict(zip(table["word"].to_pylist(), table["count"].to_pylist(), strict=True))


@pytest.mark.parametrize(("kind", "case"), [("bpe", "keep"), ("word", "keep"), ("unigram", "flag"), ("word", "lower")])
def test_only_chosen_notes_are_counted_for_the_tokenizer(tmp_path: Path, kind: str, case: str) -> None:
    mask = np.arange(60) % 4 != 0
    chosen = [text for (_, text), stays in zip(TEXTS, mask, strict=True) if stays]
    shared = {"keep": "Shared", "flag": "xxmaj shared", "lower": "shared"}[case]
    expected = Counter(word for text in chosen for word in text.replace("Shared", shared).split())
    assert counted(read(tmp_path, case), mask, kind) == expected


def test_a_part_holds_what_decides_about_its_notes(tmp_path: Path) -> None:
    notes = parts.notes_of(read(tmp_path), 0)
    assert notes.schema == parts.NOTE_SCHEMA
    assert notes["record"].to_pylist() == list(range(1, 61))  # the empty one was record 0
    assert notes["doc_id"].null_count == 60
    assert notes["n_bytes"].to_pylist() == [len(text) for _, text in TEXTS]
    assert notes["digest"].to_pylist() == [text_digest(text) for _, text in TEXTS]
    assert [SPLITS[place] for place in notes["split"].to_pylist()] == [split_of(p, SPLITTING) for p, _ in TEXTS]


@pytest.mark.parametrize(("compare", "digests", "sketches"), [("off", 1, 0), ("exact", 60, 0), ("near", 60, 60)])
def test_a_part_holds_no_more_than_later_steps_ask_for(
    tmp_path: Path, compare: parts.Compare, digests: int, sketches: int
) -> None:
    notes = parts.notes_of(read(tmp_path, compare=compare), 0)
    assert len(set(notes["digest"].to_pylist())) == digests
    assert len(notes) - notes["sketch"].null_count == sketches


def test_a_note_without_a_patient_is_its_own(tmp_path: Path) -> None:
    notes = parts.notes_of(read(tmp_path, reader=CsvReader(text="text"), compare="off"), 0)
    assert notes["patient_id"].to_pylist() == [text_digest(text).hex() for _, text in TEXTS]


def test_a_step_is_done_when_its_json_and_whole_files_are_there(tmp_path: Path) -> None:
    work = read(tmp_path)
    assert parts.done(work, "read", 1) is None
    assert parts.done(work, "encode", 0) is None
    assert parts.done(work, "read", 0) is not None
    for kind in ("notes", "words", "vocabulary"):
        path = Path(work) / f"part-00000.{kind}"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert parts.done(work, "read", 0) is None
        path.unlink()
        assert parts.done(work, "read", 0) is None
        path.write_bytes(whole)
    assert parts.done(work, "read", 0) is not None
