"""JSON lines give back every text, wherever blocks are cut, or the byte where the file is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError, StorageError
from sharding.readers import documents, jsonl, ranges
from sharding.readers.jsonl import JsonlReader
from sharding.schema import Block

READER = JsonlReader(text="text", doc_id="id", patient_id="who", encounter_id="stay", category="kind", time="at")
TEXTS = [
    "plain",
    "",
    "NA",
    'a\n"b"\r\n\\ \\n \\u0041',
    "\x00\x1f\x7f",
    "\u2028 \u2029 \x85 \xa0",
    "é 漢 😀",
    "x" * 150_000,
]


def read(path: Path, block_bytes: int, reader: JsonlReader = READER) -> tuple[list[dict[str, Any]], list[Block]]:
    found: list[dict[str, Any]] = []
    blocks = list(reader.blocks(str(path), block_bytes))
    for block in blocks:
        parsed = reader.parse(block)
        assert parsed.notes.column("record").to_pylist() == list(range(parsed.records))
        assert parsed.drops == {}
        found += parsed.notes.drop_columns("record").to_pylist()
    return found, blocks


def write(path: Path, objects: list[Any], ascii_only: bool = False) -> Path:
    path.write_bytes(b"".join(json.dumps(found, ensure_ascii=ascii_only).encode() + b"\n" for found in objects))
    return path


@pytest.mark.parametrize("ascii_only", [False, True])
def test_every_text_for_every_number_of_ranges_plain_and_packed(tmp_path: Path, ascii_only: bool) -> None:
    texts = [TEXTS[number % 7] * (number % 40) for number in range(1000)] + TEXTS[-1:]
    plain = write(
        tmp_path / "notes.jsonl", [{"id": n, "who": "p", "text": text} for n, text in enumerate(texts)], ascii_only
    )
    packed = tmp_path / "notes.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), 1))
    most = 0
    for wanted in [*range(1, 20), *range(20, 201, 20)]:
        block_bytes = -(-plain.stat().st_size // wanted)
        found, blocks = read(plain, block_bytes)
        assert [note["text"] for note in found] == texts
        assert [note["doc_id"] for note in found] == [str(number) for number in range(len(texts))]
        again, streamed = read(packed, block_bytes)
        assert again == found
        assert [(b.start, b.end) for b in streamed] == [(b.start, b.end) for b in blocks]
        assert [ranges.data_of(b) for b in streamed] == [ranges.data_of(b) for b in blocks]
        most = max(most, len(blocks))
    assert most > 50


LINE = st.one_of(
    st.sampled_from([b"", b"  ", b"\r", b"\t\r"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6).map(
        lambda text: json.dumps({"text": text, "id": 1, "who": 2}, ensure_ascii=False).encode()
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(LINE, max_size=8), block_bytes=st.integers(1, 90), mark=st.booleans(), final_newline=st.booleans()
)
def test_any_lines_any_block_size(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block_bytes: int, mark: bool, final_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "any.jsonl"
    content = b"\n".join(lines) + b"\n" * final_newline
    path.write_bytes(b"\xef\xbb\xbf" * mark + content)
    found, blocks = read(path, block_bytes)
    assert [note["text"] for note in found] == [json.loads(line)["text"] for line in lines if line.strip()]
    assert b"".join(ranges.data_of(block) for block in blocks) == content
    starts = [block.start for block in blocks]
    assert len({start // block_bytes for start in starts}) == len(starts)
    packed = path.with_name("any.jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    streamed = read(packed, block_bytes)[1]
    assert [(b.start, b.end) for b in streamed] == [(b.start, b.end) for b in blocks]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (" a ", "a"),
        (" ", None),
        (17, "17"),
        (17.0, "17"),
        (-1, "-1"),
        (10**30, "1" + "0" * 30),
        (None, None),
    ],
)
def test_labels(tmp_path: Path, value: Any, text: str | None) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": 1, "who": 1, "stay": value, "kind": value, "at": value, "text": "x"}])
    (note,) = documents(str(path), READER)
    assert [note[field] for field in ("encounter_id", "category", "time")] == [text] * 3


def test_absent_keys_are_null_and_an_absent_text_is_empty(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"id": 1, "who": 1}, {"id": 2, "who": 1, "text": None}, {"text": " x", "id": 3}]
    )
    reader = JsonlReader(text="text", doc_id="id", category="kind")
    for block_bytes in (1, 1000):
        found, _ = read(path, block_bytes, reader)
        assert [note["text"] for note in found] == ["", "", " x"]
        assert [note["doc_id"] for note in found] == ["1", "2", "3"]
        assert {note["patient_id"] for note in found} == {note["category"] for note in found} == {None}


def test_a_text_key_that_no_object_has_is_an_error_for_every_block_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"body": "secret", "id": 1}, {"id": 2}])
    for block_bytes in (1, 1000):
        with pytest.raises(DataError, match=r"no key 'text' in the first objects; the keys are body, id$"):
            list(READER.blocks(str(path), block_bytes))


@pytest.mark.parametrize("key", ["secret " * 10, "secret\nnote", ""])
def test_keys_that_may_be_notes_are_not_shown(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.jsonl", [{key: "secret"} if key else {}])
    with pytest.raises(DataError, match="no key 'text'") as caught:
        list(READER.blocks(str(path), 1000))
    assert "secret" not in str(caught.value)


def test_the_keys_shown_are_few(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{f"key{number}": 1 for number in range(1000)}])
    with pytest.raises(DataError, match=r"key19, …$"):
        list(READER.blocks(str(path), 1000))


def test_the_text_key_is_looked_for_in_a_first_line_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "HEAD_BYTES", 4)
    path = write(tmp_path / "a.jsonl", [{"body": "x" * 100, "id": 1}, {"text": "late", "id": 2}])
    with pytest.raises(DataError, match="no key 'text'"):
        list(READER.blocks(str(path), 1000))


OK = b'{"id": 1, "who": 2, "text": "secret"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"id": 1, "who": 2, "text": "secr', "the record at byte 38 is not JSON"),
        (b'{"id": 1, "who": 2, "text": "secret", "kind": NaN}', "the record at byte 38 is not JSON"),
        (b'{"id": 1, "who": 2, "text": "secret\x00"}', "the record at byte 38 is not JSON"),
        (b"[" * 5_000, "the record at byte 38 is not JSON"),
        (b'{"id": ' + b"1" * 5000 + b"}", "the record at byte 38 is not JSON"),
        (b'["secret"]', "the record at byte 38 is no JSON object"),
        (b'"secret"', "the record at byte 38 is no JSON object"),
        (b'{"id": 1, "who": 2, "text": "secret \xff"}', "byte 74 is not UTF-8"),
        ('{"id": 1, "who": 2, "text": "secret é'.encode()[:-1], "byte 74 is not UTF-8"),
        (b'{"id": 1, "who": 2, "text": "secret \xed\xa0\x80"}', "byte 74 is not UTF-8"),
        (b'{"id": 1, "who": 2, "text": "secret \\ud83d"}', "the record at byte 38 has half of a surrogate pair"),
        (b'{"id": "\\ude00", "who": 2, "text": "secret"}', "the record at byte 38 has half of a surrogate pair"),
        (b'{"id": 1, "who": 2, "text": ["secret"]}', "the record at byte 38: text is not text"),
        (b'{"id": 1, "who": 2, "text": 5}', "the record at byte 38: text is not text"),
        (b'{"id": {"secret": 1}, "who": 2, "text": ""}', "the record at byte 38: id is not text or a whole number"),
        (b'{"id": 1.5, "who": 2, "text": ""}', "the record at byte 38: id is not text or a whole number"),
        (b'{"id": 1e300, "who": 2, "text": ""}', "the record at byte 38: id is not text or a whole number"),
        (b'{"id": true, "who": 2, "text": ""}', "the record at byte 38: id is not text or a whole number"),
        (b'{"id": 1, "who": null, "text": "secret"}', "the record at byte 38: empty who"),
        (b'{"id": 1, "text": "secret"}', "the record at byte 38: empty who"),
        (b'{"id": "  ", "who": 1, "text": "secret"}', "the record at byte 38: empty id"),
    ],
)
@pytest.mark.parametrize("after", [b"", b"\n" + OK])
def test_a_wrong_line_is_an_error_that_says_where_and_shows_no_text(
    tmp_path: Path, line: bytes, said: str, after: bytes
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(OK + line + after)
    for block_bytes in (1, 10, 37, 38, 39, 60, 1 << 20):
        with pytest.raises(DataError) as caught:
            read(path, block_bytes)
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
        assert "secret" not in str(caught.value)
        assert "secr" not in str(caught.value)


def test_utf16_and_missing_and_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(OK.decode().encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        read(path, 1000)
    with pytest.raises(StorageError, match="no such file"):
        read(tmp_path / "none.jsonl", 1000)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(OK * 100)[:-10])
    with pytest.raises(DataError, match="cut off or damaged"):
        read(packed, 1000)
    path.write_bytes(b"")
    assert read(path, 1000) == ([], [])
