"""The first of equal texts stays; of nearly equal ones of a patient too; and the estimate is as good as it says."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from sharding.clean import CleanConfig, clean, clean_notes
from sharding.dedup import (
    AT_A_TIME,
    SHINGLE_WORDS,
    all_differ,
    byte_sums,
    first_occurrences,
    folded,
    near_duplicates,
    note_digests,
    rows_by,
    similarity,
    sketches,
    text_digest,
    word_hashes,
)


def pairs(texts: str) -> np.ndarray:
    return np.frombuffer(b"".join(text_digest(text) for text in texts), "<u8").reshape(-1, 2)


def test_first_occurrence_stays() -> None:
    assert first_occurrences(pairs("abacbcd")).tolist() == [True, True, False, True, False, False, True]
    half = np.array([[1, 2], [1, 3], [2, 2], [1, 2]], np.uint64)
    assert first_occurrences(half).tolist() == [True, True, True, False]
    assert first_occurrences(np.empty((0, 2), np.uint64)).tolist() == []


def test_rows_come_in_the_order_of_their_values() -> None:
    drawn = np.random.default_rng(1)
    near = np.uint64(7 << 40) + drawn.integers(0, 90, 500, dtype=np.uint64)  # alike in all but their last bits
    far = drawn.integers(0, 1 << 64, 3000, dtype=np.uint64)
    ends = np.array([0, (1 << 64) - 1, 0], np.uint64)
    for values in (np.concatenate([far, near, ends, far[:10], near]), near, ends, ends[:1], ends[:0]):
        assert rows_by(values).tolist() == np.argsort(values, kind="stable").tolist()


def test_digest_is_the_same_on_every_machine() -> None:
    assert text_digest("10² mg").hex() == "face3831ee1a333dbed8a1f50f7bec11"


@pytest.mark.parametrize("case", ["keep", "lower", "flag"])
def test_the_digest_of_a_note_is_that_of_its_cleaned_text(case: str) -> None:
    config = CleanConfig(case=case)
    texts = ["Two  lines\r\n of COPD", "a b", "ab", "a\nb", "", "xxmaj", "\n", "A [**Hospital 3**] x"]
    words = clean_notes(pa.array(texts), config)
    digests = note_digests(word_hashes(folded(words.vocabulary)), words.ids, words.offsets)
    assert digests == [text_digest(clean(text, config)) for text in texts]
    assert len(set(digests)) == len(texts)
    as_written = CleanConfig(case="keep")
    assert digests == [text_digest(clean(text, as_written)) for text in texts]  # the same notes stay


def sketched(texts: list[list[str]]) -> np.ndarray:
    vocabulary = sorted({word for text in texts for word in text})
    place = {word: number for number, word in enumerate(vocabulary)}
    ids = np.array([place[word] for text in texts for word in text], np.int32)
    offsets = np.cumsum([0, *map(len, texts)])
    return sketches(word_hashes(vocabulary), ids, offsets)


def jaccard(one: list[str], other: list[str]) -> float:
    runs = [
        {tuple(text[start : start + SHINGLE_WORDS]) for start in range(len(text) - SHINGLE_WORDS + 1)}
        for text in (one, other)
    ]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_sketches_estimate_the_jaccard_similarity() -> None:
    draw = random.Random(3)
    errors = []
    for length in (40, 200, 1500):
        for changed in (0, 1, 3, 10, 40):
            one = [f"w{draw.randrange(3000)}" for _ in range(length)]
            other = list(one)
            for _ in range(changed):
                other[draw.randrange(length)] = f"new{draw.randrange(10**6)}"
            found = sketched([one, other])
            errors.append(similarity(found[0], found[1:])[0] - jaccard(one, other))
    assert max(map(abs, errors)) < 0.15
    assert np.sqrt(np.mean(np.square(errors))) < 0.05


def test_notes_of_few_words_are_never_near_duplicates_and_no_run_crosses_notes() -> None:
    short = [["a", "b", "c", "d"], ["a", "b", "c", "d"], []]
    assert not sketched(short).any()
    assert near_duplicates(sketched(short), 0.1).tolist() == [False] * 3
    alone, neighbour = [f"x{place}" for place in range(9)], [f"y{place}" for place in range(9)]
    assert (sketched([alone, neighbour])[0] == sketched([alone])[0]).all()


def test_a_copy_of_a_copy_that_went_stays_only_if_it_differs_from_what_stayed() -> None:
    draw = random.Random(4)
    first = [f"w{draw.randrange(9999)}" for _ in range(400)]
    second = [*first[:380], *(f"new{place}" for place in range(20))]
    other = [f"o{draw.randrange(9999)}" for _ in range(400)]
    found = sketched([first, other, second, first, second])
    assert near_duplicates(found, 0.8).tolist() == [False, False, True, True, True]
    assert near_duplicates(found, 1.0).tolist() == [False, False, False, True, True]


def test_strings_that_stand_twice_are_found_and_no_others() -> None:
    signs = ["", "a", "b", "ab", "ba", "a\0", "\0a", "é" * 5, "x" * 1000, "x" * 999 + "y"]
    many = [f"n{number}" for number in range(2 * AT_A_TIME + 5)]
    for strings in (signs, many, [], [""], [*many, *signs]):
        whole = pa.array(strings, pa.string())
        cut = pa.chunked_array([whole.slice(0, len(whole) // 3), whole.slice(len(whole) // 3)], pa.string())
        sums = byte_sums(cut)
        assert sums.tolist() == byte_sums(pa.chunked_array([whole])).tolist()
        assert len(set(sums.tolist())) == len(strings)
        assert all_differ(cut, sums)
        assert all_differ(cut, np.zeros(len(strings), np.uint64))  # equal sums: the strings themselves are compared
        for twice in strings[:1] + strings[-1:]:
            again = pa.chunked_array([*cut.chunks, pa.array([twice])])
            assert not all_differ(again, byte_sums(again))
