"""`check` tells the published NOTEEVENTS from a file that only looks like it."""

from __future__ import annotations

import io
from collections.abc import Iterator

import fsspec
import pyarrow as pa
import pyarrow.csv
import pytest

from cluster.errors import DataError
from sharding import check
from sharding.readers.mimic import COLUMNS, PUBLISHED_NOTES

URL = "memory://check/NOTEEVENTS.csv"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    if fsspec.filesystem("memory").exists("/check"):
        fsspec.filesystem("memory").rm("/check", recursive=True)


def put(notes: pa.Table) -> None:
    sink = io.BytesIO()
    pa.csv.write_csv(notes, sink)
    fsspec.filesystem("memory").pipe("/check/NOTEEVENTS.csv", sink.getvalue())


def published() -> pa.Table:
    """As many notes of every category as MIMIC-III v1.4 has, each with nothing to read."""
    # PhysioNet's file has blanks behind some names.
    names = [name + " " * (name in ("Physician", "Nutrition")) for name in PUBLISHED_NOTES]
    numbers = list(PUBLISHED_NOTES.values())
    kind = pa.array([place for place, number in enumerate(numbers) for _ in range(number)], pa.int32())
    category = pa.DictionaryArray.from_arrays(kind, pa.array(names)).cast(pa.string())
    columns = {name: pa.nulls(len(kind), pa.string()) for name in COLUMNS}
    columns |= {"ROW_ID": pa.array(range(len(kind))), "CATEGORY": category}
    return pa.table(columns)


def test_the_published_counts_and_four_notes_less(capsys: pytest.CaptureFixture[str]) -> None:
    notes = published()
    put(notes)
    check.main([URL])
    said = capsys.readouterr()
    assert "every count is the published one" in said.err + said.out
    # What public cleaners make of it that skip "bad lines".
    put(pa.concat_tables([notes.slice(0, 900_000), notes.slice(900_004)]))
    with pytest.raises(DataError, match="2,083,176 notes instead of 2,083,180, 1 categories differ"):
        check.main([URL])
    said = capsys.readouterr()
    assert "-4" in said.err + said.out


def test_repeated_and_unknown_and_unreadable(capsys: pytest.CaptureFixture[str]) -> None:
    notes = published().slice(0, 50)
    put(pa.concat_tables([notes, notes.slice(7, 3)]))
    with pytest.raises(DataError, match="3 notes have the ROW_ID of another"):
        check.main([URL])
    strange = notes.set_column(COLUMNS.index("CATEGORY"), "CATEGORY", pa.array(["a secret"] * 50))
    put(strange)
    with pytest.raises(DataError, match="50 notes instead of 2,083,180, 16 categories differ"):
        check.main([URL])
    put(notes.set_column(0, "ROW_ID", pa.array(["a secret"] * 50)))
    with pytest.raises(DataError, match="a ROW_ID between bytes"):
        check.main([URL])
    said = capsys.readouterr()
    assert "secret" not in said.err + said.out
