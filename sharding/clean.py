"""Text of a note as the model sees it: de-identification tags become class tokens, blanks are single.

MIMIC writes `[**Known lastname 123**]` where a name stood. The words in the tag are invented and say nothing,
the kind of thing that stood there does: the tag becomes `<name>`. Lines are kept (headings matter),
indentation is not. Numbers, punctuation and everything else stay as they are. Cleaning twice is cleaning
once.

    texts ──one pass over their bytes──► words (numpy) ──► distinct words + ids ──case──► Words

A note leaves here as numbers of words, not as text: later steps look at every distinct word once instead of at
every word, which is what makes them fast. `clean` is the same for one text.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.config import Section

NEWLINE = "\n"


class CleanConfig(Section):
    """`keep` leaves capitals, `lower` folds them (a smaller vocabulary for small corpora), `flag` folds them and
    writes fastai's marks before the word: `Fever` → `xxmaj fever`, `COPD` → `xxup copd` (Howard and Ruder 2018).
    """

    case: Literal["keep", "lower", "flag"] = "keep"


# The first row that fits decides. Kinds as the published MIMIC-III preprocessors list them; numbers and
# remarks that follow a kind ("Name (NI) 12", "Hospital1 18") are MIMIC's own counters.
_KINDS: tuple[tuple[str, str], ...] = (
    ("<date>", r"^(\d{4}-\d{1,2}(-\d{1,2})?|\d{1,2}[-/]\d{1,2}([-/]\d{2,4})?|(19|20|21|22)\d\d)$"),
    ("<age>", r"\bage\b"),
    ("<phone>", r"telephone|phone|fax|pager"),
    ("<number>", r"(numeric|serial) |(clip|md|provider|job|record|account|unit) number|ssn|social security"),
    ("<hospital>", r"hospital|\bward|clinic"),
    ("<other>", r"e-?mail|url"),
    ("<location>", r"location|country|\bstate\b|address|po box|street|\bcity\b|\bzip"),
    ("<name>", r"name|initials|(attending|dictator|contact) info"),
    ("<date>", r"\b(date|day|month|year|holiday)\b|\d{4}-\d{1,2}-\d{1,2}"),
    ("<date>", r"^(january|february|march|april|may|june|july|august|september|october|november|december)\b"),
    ("<number>", r"^[\d #.,:/-]*\d[\d #.,:/-]*$"),
)
# Company, University/College, Job, URL, e-mail, the empty tag, and kinds nobody has listed yet.
_OTHER = "<other>"

CLASS_TOKENS: tuple[str, ...] = (*dict.fromkeys(token for token, _ in _KINDS if token != _OTHER), _OTHER)

_ROWS = [(token, re.compile(kinds, re.IGNORECASE)) for token, kinds in _KINDS]
# A tag may be wrapped over lines; the cap keeps a stray "[**" from swallowing the note.
_TAG = re.compile(rb"\[\*\*([^\[\]\x00]{0,200}?)\*\*\]")
# What Unicode calls a blank beyond ASCII (as str.split does), DEL, and the sign SentencePiece writes for a blank.
_BLANKS = [
    sign.encode()
    for sign in "\x7f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\u2581"
]
_SPACE, _LINE_END = 32, 10
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
# Bytes handled at a time: the arrays over them stay in the processor's cache.
_PIECE_BYTES = 1 << 19

# fastai's rules `replace_all_caps` and `replace_maj`, for one word.
_ALL_CAPS = re.compile(r"[A-Z]+[^a-z\s]*")
_CAPITALISED = re.compile(r"[A-Z][^A-Z\s]*")


@dataclass(frozen=True)
class Words:
    """Cleaned notes: note i is `vocabulary[ids[offsets[i]:offsets[i + 1]]]`; a line end is a word of its own."""

    vocabulary: list[str]  # distinct; with case "flag" an entry may be a mark, a blank and a word
    ids: np.ndarray  # int32
    offsets: np.ndarray  # int64, one more than there are notes
    n_bytes: np.ndarray  # int64 per note: UTF-8 bytes of the cleaned text before its case was changed
    blank: np.ndarray  # bool per note: it has no word but line ends


def clean(text: str, config: CleanConfig) -> str:
    """The text with class tokens for tags, `\\n` line ends, and single blanks inside lines only."""
    return _note(clean_notes(pa.array([text], pa.string()), config), 0)


def cleaned_around(
    text: str, spans: Sequence[tuple[int, int]], config: CleanConfig
) -> tuple[str, list[tuple[int, int]]]:
    """The cleaned text, and where in it the spans of `text` (in any order; they may overlap) lie."""
    cuts = sorted({0, len(text), *(edge for span in spans for edge in span)})
    words = clean_notes(pa.array([text[a:b] for a, b in itertools.pairwise(cuts)], pa.string()), config)
    parts: list[str] = []
    length, last = 0, NEWLINE
    first_at, end_at = {}, {0: 0}
    for number, (cut, end) in enumerate(itertools.pairwise(cuts)):
        part = _note(words, number)
        blank = any(map(str.isspace, text[max(cut - 1, 0) : cut + 1]))
        if part and blank and NEWLINE not in (last, part[0]):
            part = f" {part}"
        first_at[cut] = length + len(part) - len(part.lstrip(" \n"))
        length += len(part)
        end_at[end] = length
        parts.append(part)
        last = part[-1] if part else last
    return "".join(parts), [(min(first_at[start], end_at[end]), end_at[end]) for start, end in spans]


def _note(words: Words, number: int) -> str:
    ids = words.ids[words.offsets[number] : words.offsets[number + 1]]
    return re.sub(" ?\n ?", NEWLINE, " ".join([words.vocabulary[place] for place in ids]))


def clean_notes(texts: pa.StringArray, config: CleanConfig) -> Words:
    """The cleaned notes as words."""
    pieces = [_words(piece) for piece in _pieces(texts)]
    # The line end is put before all words, so that it is word 0.
    encoded = pa.chunked_array([pa.array([NEWLINE]), *(words for words, _ in pieces)]).dictionary_encode()
    # The chunks share one dictionary, the last knows all of it.
    vocabulary = encoded.chunk(encoded.num_chunks - 1).dictionary.to_pylist()
    ids = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])[1:]
    if config.case != "keep":
        cased = pa.array([_cased(word, config.case) for word in vocabulary]).dictionary_encode()
        vocabulary, ids = cased.dictionary.to_pylist(), cased.indices.to_numpy()[ids]
    measures = np.concatenate([np.zeros((3, 1), np.int64), *(sizes for _, sizes in pieces)], axis=1)
    counts, n_bytes, line_ends = measures
    return Words(vocabulary, ids, np.cumsum(counts), n_bytes[1:], (counts == line_ends)[1:])


def _cased(word: str, case: str) -> str:
    lower = word.lower()
    if case == "flag" and len(word) > 1 and _ALL_CAPS.fullmatch(word):
        return f"xxup {lower}"
    if case == "flag" and len(word) > 1 and _CAPITALISED.fullmatch(word):
        return f"xxmaj {lower}"
    return lower


def _pieces(texts: pa.StringArray) -> list[pa.StringArray]:
    """Slices of some megabytes; an Arrow string array counts its bytes with 31 bits."""
    ends = np.cumsum(pc.binary_length(texts).to_numpy(zero_copy_only=False))
    cuts = np.searchsorted(ends, np.arange(_PIECE_BYTES, ends[-1] if len(ends) else 0, _PIECE_BYTES))
    edges = np.unique(np.concatenate([[0], cuts, [len(texts)]]))
    return [texts.slice(start, end - start) for start, end in itertools.pairwise(edges.tolist())]


def _words(texts: pa.StringArray) -> tuple[pa.StringArray, np.ndarray]:
    """The words of all notes one after the other; per note [its words, its bytes, its line ends]."""
    data = _scrubbed(texts)
    codes = np.frombuffer(data, np.uint8)
    inside = np.zeros(len(codes) + 2, bool)
    np.greater(codes, _SPACE, out=inside[1:-1])
    inside[1:-1] |= codes == _LINE_END
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    offsets = np.zeros(len(starts) + 1, np.int32)
    np.cumsum(ends - starts, out=offsets[1:])
    packed = data.translate(None, bytes(code for code in range(_SPACE + 1) if code != _LINE_END))
    words = pa.StringArray.from_buffers(len(starts), pa.py_buffer(offsets), pa.py_buffer(packed))
    note_ends = np.searchsorted(starts, np.append(np.flatnonzero(codes == 0), len(codes)))
    line_end = np.concatenate([[True], codes[starts] == _LINE_END])
    # A blank stands before every word whose neighbour before it, in the same note, is a word too.
    spaced = ~(line_end[1:] | line_end[:-1])
    firsts = note_ends[:-1]
    spaced[firsts[firsts < len(starts)]] = False
    totals = [np.arange(len(starts) + 1), offsets + _totals(spaced), _totals(line_end[1:])]
    return words, np.stack([np.diff(total[note_ends], prepend=0) for total in totals])


def _totals(flags: np.ndarray) -> np.ndarray:
    """How many of the flags before each place are set; one more than there are flags."""
    return np.concatenate([[0], np.cumsum(flags, dtype=np.int32)])


def _scrubbed(texts: pa.StringArray) -> bytes:
    """The texts, NUL between them, with class tokens, `\\n` line ends between blanks, and ASCII blanks only."""
    joined = _joined(texts)
    if joined.count(b"\x00") != len(texts) - 1:
        joined = _joined(pc.replace_substring(texts, "\x00", " "))
    pieces = _TAG.split(joined)  # every other piece is the inside of a tag
    pieces[1::2] = _class_tokens(pieces[1::2])
    joined = b"".join(pieces)
    if b"\r" in joined:
        joined = joined.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    joined = joined.replace(b"\n", b" \n ")
    for sign in _BLANKS[:1] if joined.isascii() else _BLANKS:
        if sign[:1] in joined:  # one byte is found ten times faster than three
            joined = joined.replace(sign, b" ")
    return joined


def _joined(texts: pa.StringArray) -> bytes:
    whole = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
    return bytes(pc.binary_join(whole, "\x00")[0].as_buffer())


def _class_tokens(kinds: list[bytes]) -> list[bytes]:
    """The token of every tag. "Known lastname 123" and "… 456" are one kind; which digits they are counts in a year."""
    if not kinds:
        return []
    alike = b"\x00".join(kinds).translate(_DIGITS).split(b"\x00")
    tokens = {same: _token_of(same) for same in set(alike)}
    years = {same for same in tokens if same.strip() == b"0000"}
    if not years:
        return [tokens[same] for same in alike]
    return [_token_of(kind) if same in years else tokens[same] for kind, same in zip(kinds, alike, strict=True)]


@functools.lru_cache(maxsize=1 << 14)
def _token_of(tag: bytes) -> bytes:
    kind = " ".join(tag.decode().split())
    return next((token for token, row in _ROWS if row.search(kind)), _OTHER).encode()
