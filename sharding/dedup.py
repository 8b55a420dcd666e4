"""Duplicates: exact ones over the whole corpus, near ones (notes copied forward) within a patient.

Capitals do not count: the same notes stay whatever `clean.case` does with them, so models of either are compared on
the same notes.

Copies would be learned by heart, and a copy of a training note in the test set would make the test too easy.
Of equal notes the first in input order stays. A near-duplicate is a note whose set of runs of five words has
at least a given Jaccard similarity with that of an earlier note of the same patient that stays. It is estimated from
sketches of 256 bytes (one-permutation MinHash: Li, Owen and Zhang 2012, https://arxiv.org/abs/1208.1259, eq. 9;
16 bits of each minimum: Li and König 2010), so that the notes themselves need not be compared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# 128 bits: among 10^9 notes the chance of one false match is about 10^-21.
DIGEST_BYTES = 16
SHINGLE_WORDS = 5
SKETCH_BINS = 128  # standard error of a similarity of 0.7: 0.04
SKETCH_BYTES = 2 * SKETCH_BINS
AT_A_TIME = 8192  # strings, whose bytes and what is made of them stay in the processor's cache

# The words of a cleaned text as `clean` counts them: a line end is one, and so is a word with its mark.
_WORDS = re.compile(r"\n|(?:xx(?:maj|up) )?[^ \n]+")


def text_digest(text: str) -> bytes:
    """Digest of a cleaned text; equal texts, equal digest, on every machine. The same as `note_digests` gives."""
    words = folded(_WORDS.findall(text))
    return hashlib.sha256(word_hashes(words).tobytes()).digest()[:DIGEST_BYTES]


def folded(vocabulary: Sequence[str]) -> list[str]:
    """Words as they are compared: without capitals, and without the marks that stand for them."""
    return [word.rpartition(" ")[2].lower() for word in vocabulary]


def word_hashes(vocabulary: Sequence[str]) -> np.ndarray:
    """A 64-bit hash of every word, the same on every machine."""
    digests = b"".join([hashlib.blake2b(word.encode(), digest_size=8).digest() for word in vocabulary])
    return np.frombuffer(digests, "<u8")


def note_digests(hashes: np.ndarray, ids: np.ndarray, offsets: np.ndarray) -> list[bytes]:
    """Digest of every note: equal for equal sequences of words. Note i is `ids[offsets[i]:offsets[i + 1]]`, and
    `hashes` those of the `folded` vocabulary.
    """
    spelled = memoryview(hashes[ids]).cast("B")
    # Processors have instructions for sha256: three times as fast as blake2b (measured).
    return [
        hashlib.sha256(spelled[8 * start : 8 * end]).digest()[:DIGEST_BYTES]
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]


def first_occurrences(digests: np.ndarray) -> np.ndarray:
    """Mask of the notes whose digest (a row of two uint64) no earlier note has."""
    halves = digests[:, 0]
    order = rows_by(halves)
    again = halves[order[1:]] == halves[order[:-1]]
    # Few notes share half a digest with another; only these are looked at again, in input order.
    shared = np.zeros(len(digests), bool)
    shared[order[1:][again]] = shared[order[:-1][again]] = True
    rows = np.flatnonzero(shared)
    order = rows[np.lexsort((digests[rows, 1], digests[rows, 0]))]  # stable: equal digests stay in input order
    first = np.ones(len(digests), bool)
    first[order[1:]] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    return first


def byte_sums(strings: pa.ChunkedArray) -> np.ndarray:
    """A number (uint64) for each string: of equal ones the same, of others nearly always another."""
    pieces = [one.slice(start, AT_A_TIME) for one in strings.chunks for start in range(0, len(one), AT_A_TIME)]
    return np.concatenate([np.empty(0, np.uint64), *map(_byte_sums, pieces)])


def _byte_sums(strings: pa.StringArray) -> np.ndarray:
    offsets = np.frombuffer(strings.buffers()[1] or bytes(4), np.int32)[strings.offset :][: len(strings) + 1]
    signs = np.frombuffer(strings.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    lengths = np.diff(offsets)
    within = np.arange(len(signs)) - np.repeat(offsets[:-1] - offsets[0], lengths)
    weights = mixed(np.arange(1, lengths.max(initial=0) + 1, dtype=np.uint64))
    summed = np.concatenate([np.zeros(1, np.uint64), np.cumsum((signs + np.uint64(1)) * weights[within])])
    places = offsets - offsets[0]
    return np.diff(summed[places])


def all_differ(strings: pa.ChunkedArray, sums: np.ndarray) -> bool:
    """Whether no string stands twice, none being null, by their `byte_sums`: a quarter of the time that a table of the
    strings takes, which is made only where two of these are equal.
    """
    ordered = np.sort(sums)
    return bool((ordered[1:] != ordered[:-1]).all()) or pc.count_distinct(strings).as_py() == len(strings)


def rows_by(values: np.ndarray) -> np.ndarray:
    """The rows of `values` (uint64) in their order, equal ones in order of row, int64.

    Numpy sorts numbers by vector instructions, but not rows by their numbers: a row takes the place of the low bits of
    its value, and the few values that are the same without these are looked at again. A quarter of `argsort`'s time.
    """
    low = np.uint64((1 << len(values).bit_length()) - 1)
    ordered = np.sort((values & ~low) | np.arange(len(values), dtype=np.uint64))
    rows = (ordered & low).astype(np.int64)
    alike = (ordered[1:] ^ ordered[:-1]) <= low
    places = np.flatnonzero(np.append(alike, False) | np.append(False, alike)) if len(rows) else rows
    doubtful = rows[places]
    rows[places] = doubtful[np.lexsort((doubtful, values[doubtful]))]
    return rows


def sketches(hashes: np.ndarray, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint16 [notes, SKETCH_BINS]: what of a note is compared; 0 marks a bin without a run of words."""
    notes = len(offsets) - 1
    found = np.full(notes * SKETCH_BINS, np.iinfo(np.uint64).max, np.uint64)
    note_of_word = np.repeat(np.arange(notes), np.diff(offsets))
    runs = len(ids) - SHINGLE_WORDS + 1
    if runs > 0:
        shingles = np.zeros(runs, np.uint64)
        for place in range(SHINGLE_WORDS):
            shingles = mixed(shingles + hashes[ids[place : place + runs]])
        within = note_of_word[:runs] == note_of_word[SHINGLE_WORDS - 1 :]
        shingles, note_of_run = shingles[within], note_of_word[:runs][within]
        bins = note_of_run * SKETCH_BINS + (shingles >> np.uint64(57)).astype(np.int64)
        np.minimum.at(found, bins, shingles << np.uint64(7))
    empty = found == np.iinfo(np.uint64).max
    kept = (mixed(found) % np.uint64(65_535)).astype(np.uint16) + np.uint16(1)
    return np.where(empty, np.uint16(0), kept).reshape(notes, SKETCH_BINS)


def mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values = values ^ (values >> np.uint64(31))
    return values


def similarity(sketch: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of one note (uint16 [SKETCH_BINS]) with each of others [n, SKETCH_BINS].

    0 where neither has a run of five words.
    """
    used = ((others | sketch) != 0).sum(axis=1)
    equal = ((others == sketch) & (others != 0)).sum(axis=1)
    estimate: np.ndarray = equal / np.maximum(used, 1)
    return estimate


def near_duplicates(sketches_of_notes: np.ndarray, threshold: float) -> np.ndarray:
    """Mask of the notes of one patient, in input order, that are near-duplicates of an earlier one that stays."""
    copies = np.zeros(len(sketches_of_notes), bool)
    kept = np.empty_like(sketches_of_notes)
    stay = 0
    for place, sketch in enumerate(sketches_of_notes):
        copies[place] = bool(stay) and bool((similarity(sketch, kept[:stay]) >= threshold).any())
        if not copies[place]:
            kept[stay] = sketch
            stay += 1
    return copies
