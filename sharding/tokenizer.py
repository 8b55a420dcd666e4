"""Text to token ids and back: the only door to SentencePiece.

A text is cut at every newline and every blank; each word is encoded alone, each newline is one control token
that no text can spell. So ids do not depend on neighbours: a corpus is encoded by encoding its distinct words once
and copying their ids (3 to 10 times faster than encoding the text). For BPE, words and characters the ids are those of
`sp.encode(line)`; for unigram too, except where two segmentations of a word have the same score and rounding
decides. Text is not normalised (`10²` stays apart from `102`) and unknown characters fall back to bytes, so decoding
gives back what `clean` made. The kind "word" has no bytes to fall back to and takes punctuation for words of its
own: `fever,` is `fever` and `,`; each word it does not know is one `<unk>` (SentencePiece joins those in a row).
"""

from __future__ import annotations

import hashlib
import io
import re
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sentencepiece
from pydantic import Field
from sentencepiece import sentencepiece_model_pb2

from cluster.config import Section
from cluster.errors import ConfigError, DataError
from sharding.schema import token_dtype

NEWLINE_PIECE = "<newline>"
# Unigram training takes 18.5 bytes of memory per character counted (measured): 40 M of them take 0.74 GB.
TRAINING_CHARS = 40_000_000
# … and this many more of rare words: about 600,000 of them.
RARE_CHARS = TRAINING_CHARS // 8
# About 200 bytes a word (measured): 400 MB in a worker.
CACHED_WORDS = 2_000_000
# Words of the kind "word": numbers with what joins them (10.2, 5/6, 12:30), words with their apostrophes, signs.
_UNITS = re.compile(r"<[a-z]+>|\d+(?:[.,:/-]\d+)*\w*|\w+(?:['’]\w+)*|[^\w\s]")
# A longer word is a table or base64; it will not come again.
CACHED_WORD_CHARS = 64

# The sign that SentencePiece writes for the blank before a word.
_BLANK = "\u2581"
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
# As SentencePiece numbers them in a model.
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class TokenizerConfig(Section):
    """Model and size of the vocabulary, and which marks stand around every note."""

    kind: Literal["unigram", "bpe", "word", "char"] = "unigram"
    vocab_size: int = Field(gt=0)
    bos: bool = True
    eos: bool = True
    sample: float = Field(default=1, gt=0, le=1, description="fraction of the training notes it is trained on")


def units(word: str, kind: str) -> list[str]:
    """The words that SentencePiece sees of a word of `clean`: its mark and itself, or word by word."""
    return _UNITS.findall(word) if kind == "word" else word.split(" ")


def thinned(words: pa.Table) -> dict[str, int]:
    """What is left of a table (word, count) when counts are divided so that training fits into memory.

    Of words too rare to be left with a count, the most frequent stay with 1: a vocabulary needs different words.
    A pure function of the counts, whatever their order.
    """
    words = words.append_column("chars", pc.utf8_length(words["word"]).cast(pa.int64()))
    chars = pc.sum(pc.multiply(words["chars"], words["count"])).as_py() or 0
    divided = pc.divide(words["count"], max(-(-chars // TRAINING_CHARS), 1))
    rare = words.filter(pc.equal(divided, 0)).sort_by([("count", "descending"), ("word", "ascending")])
    rare = rare.filter(pc.less_equal(pc.cumulative_sum(rare["chars"]), RARE_CHARS))
    stay = words.set_column(1, "count", divided).filter(pc.greater(divided, 0))
    counts = dict(zip(stay["word"].to_pylist(), stay["count"].to_pylist(), strict=True))
    return counts | dict.fromkeys(rare["word"].to_pylist(), 1)


def train_on_table(words: pa.Table, config: TokenizerConfig, symbols: Sequence[str]) -> bytes:
    """`train` on what `thinned` leaves of a table (word, count)."""
    return train(thinned(words), config, symbols)


def train(word_counts: Mapping[str, int], config: TokenizerConfig, symbols: Sequence[str]) -> bytes:
    """A SentencePiece model from word counts; each of `symbols` becomes one token.

    Equal counts give equal bytes, in whatever order they were collected. Raises ConfigError where the
    vocabulary cannot have the size that was asked for, with the size that it can have.
    """
    written = io.BytesIO()
    # Of a word model, symbols are words like others but for their names, and have their place already.
    lines = [
        f"{word}\t{count}"
        for word, count in sorted(word_counts.items())
        if config.kind != "word" or word not in symbols
    ]
    if not lines:
        raise DataError("there are no words to train a tokenizer on; every training note is empty")
    try:
        sentencepiece.SentencePieceTrainer.Train(
            # An iterator, not a file: the name of a temporary file would become part of the model's bytes.
            sentence_iterator=iter(lines),
            model_writer=written,
            input_format="tsv",
            model_type=config.kind,
            vocab_size=config.vocab_size,
            num_threads=1,  # unigram scores depend on the number of threads
            normalization_rule_name="identity",
            byte_fallback=config.kind != "word",
            control_symbols=[NEWLINE_PIECE],
            user_defined_symbols=list(symbols),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as exc:
        raise _size_error(str(exc), config, len(symbols)) from None
    return written.getvalue()


def _size_error(message: str, config: TokenizerConfig, symbols: int) -> ConfigError:
    """SentencePiece's refusal as one line; only numbers are taken from it, for it may quote training text."""
    asked = f"tokenizer.vocab_size={config.vocab_size}"
    if largest := re.search(r"value <= (\d+)", message):
        return ConfigError(f"{asked} is more than the training notes allow; the largest possible is {largest[1]}")
    smallest = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if smallest or "vocab_size" in message:
        # <unk>, BOS, EOS, the newline, the symbols, the bytes to fall back to, and something to say.
        least = int(smallest[1]) if smallest else 4 + symbols + 256 * (config.kind != "word") + 1
        return ConfigError(f"{asked} has no room for bytes and characters; the smallest possible is {least}")
    return ConfigError(f"{asked}: SentencePiece cannot train on these notes")


class Tokenizer:
    """A trained SentencePiece model with newlines, note marks and a word cache."""

    def __init__(self, model: bytes, bos: bool = True, eos: bool = True) -> None:
        self._pieces: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.bos, self.eos = bos, eos
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.newline_id: int = self._pieces.piece_to_id(NEWLINE_PIECE)
        if self.newline_id == self._pieces.unk_id():
            raise DataError(f"the tokenizer has no {NEWLINE_PIECE}; it was not made by ./launch.sh shard")
        spec = sentencepiece_model_pb2.ModelProto.FromString(model)
        self.kind = _KINDS[spec.trainer_spec.model_type]
        # SentencePiece gives a word model each symbol twice; as a word it has a blank before it.
        before = _BLANK if self.kind == "word" else ""
        symbols = spec.trainer_spec.user_defined_symbols
        self.symbols = {symbol: self._pieces.piece_to_id(before + symbol) for symbol in symbols}
        self.dtype = token_dtype(self.vocab_size)
        # Tokens that spell what the vocabulary does not have.
        self.is_unknown = np.isin([piece.type for piece in spec.pieces], [_Piece.UNKNOWN, _Piece.BYTE])
        # Tokens that are the first of a word: one for every word of a text.
        kinds = np.array([piece.type for piece in spec.pieces])
        plain = np.isin(kinds, [_Piece.NORMAL, _Piece.USER_DEFINED, _Piece.UNKNOWN])
        blank = np.array([piece.piece.startswith(_BLANK) for piece in spec.pieces])
        self.begins_word = plain if self.kind == "word" else plain & blank
        self._words: dict[str, bytes] = {}
        self._forget()

    def pieces(self) -> list[str]:
        """The text of every token, by id."""
        return [self._pieces.id_to_piece(token) for token in range(self.vocab_size)]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each cleaned text, with BOS and EOS as configured."""
        return [self._marked(self._body(text), self.eos) for text in texts]

    def encode_words(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a note of these words, as `encode` gives them, and where the tokens of each word begin (int64,
        one more than there are words).
        """
        spelled = self._spelled(words)
        lengths = [int(self.bos), *(len(word) // self.dtype.itemsize for word in spelled)]
        return self._marked(b"".join(spelled), self.eos), np.cumsum(lengths)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Token ids of the beginning of a note: BOS as configured, no EOS."""
        return self._marked(self._body(text), False)

    def encode_notes(
        self, vocabulary: Sequence[str], ids: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of many notes, where note i is the words `vocabulary[ids[offsets[i]:offsets[i + 1]]]`.

        Returns the tokens of all notes one after the other, where each begins (int64, one more than there are
        notes), and for every word of the vocabulary whether it is spelled with unknown tokens or bytes.
        """
        spelled = self._spelled(vocabulary)
        entries = pa.array([*spelled, self._packed([self.bos_id]), self._packed([self.eos_id])], pa.binary())
        marked, ends = self._with_marks(ids, offsets, len(spelled))
        taken = entries.take(pa.array(marked))
        _, places, values = taken.buffers()
        item = self.dtype.itemsize
        starts = np.frombuffer(places, np.int32, len(marked) + 1).astype(np.int64)[ends] // item
        tokens = np.frombuffer(values, self.dtype, int(starts[-1])) if starts[-1] else np.empty(0, self.dtype)
        known, lengths = np.frombuffer(b"".join(spelled), self.dtype), [len(word) // item for word in spelled]
        word_of_token = np.repeat(np.arange(len(spelled)), lengths)
        unknown = np.zeros(len(spelled), bool)
        unknown[word_of_token[self.is_unknown[known]]] = True
        return tokens, starts, unknown

    def _with_marks(self, ids: np.ndarray, offsets: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
        """The words of all notes with BOS (entry `words`) and EOS (the next), and where each note begins."""
        notes = len(offsets) - 1
        marks = self.bos + self.eos
        marked = np.empty(len(ids) + marks * notes, np.int32)
        ends = offsets + marks * np.arange(notes + 1)
        is_word = np.ones(len(marked), bool)
        if self.bos:
            marked[ends[:-1]] = words
            is_word[ends[:-1]] = False
        if self.eos:
            marked[ends[1:] - 1] = words + 1
            is_word[ends[1:] - 1] = False
        marked[is_word] = ids
        return marked, ends

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; newline tokens become newlines, BOS and EOS nothing."""
        lines: list[list[int]] = [[]]
        for token in map(int, ids):
            if token == self.newline_id:
                lines.append([])
            elif token not in (self.bos_id, self.eos_id):
                lines[-1].append(token)
        if self.kind == "word":
            return "\n".join(" ".join(map(self._word, line)) for line in lines)
        return "\n".join(self._pieces.decode(line) for line in lines)

    def _word(self, token: int) -> str:
        piece: str = self._pieces.id_to_piece(token)
        return piece.removeprefix(_BLANK)

    def _body(self, text: str) -> bytes:
        return b"".join(self._spelled(text.replace("\n", " \n ").split(" ")))

    def _marked(self, body: bytes, eos: bool) -> np.ndarray:
        head = self._packed([self.bos_id] if self.bos else [])
        tail = self._packed([self.eos_id] if eos else [])
        return np.frombuffer(head + body + tail, dtype=self.dtype)

    def _spelled(self, words: Sequence[str]) -> list[bytes]:
        """The packed ids of every word; those not met before go to SentencePiece in one batch."""
        unknown = sorted(set(words) - self._words.keys())
        if len(self._words) + len(unknown) > CACHED_WORDS:
            self._forget()
            unknown = sorted(set(words) - self._words.keys())
        self._words.update(zip(unknown, map(self._packed, self._encoded(unknown)), strict=True))
        spelled = [self._words[word] for word in words]
        for word in unknown:
            if len(word) > CACHED_WORD_CHARS:
                del self._words[word]
        return spelled

    def _encoded(self, words: Sequence[str]) -> list[list[int]]:
        if self.kind != "word":
            ids: list[list[int]] = self._pieces.encode(words)
            return ids
        cut = [units(word, self.kind) for word in words]
        known = {unit: self._pieces.piece_to_id(_BLANK + unit) for unit in {*chain(*cut)}}
        return [[known[unit] for unit in parts] for parts in cut]

    def _packed(self, ids: Sequence[int]) -> bytes:
        return array("H" if self.dtype.itemsize == 2 else "I", ids).tobytes()

    def _forget(self) -> None:
        self._words.clear()
        self._words["\n"] = self._packed([self.newline_id])
        self._words[""] = b""
