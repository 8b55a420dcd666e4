"""Text to token ids and back: the only door to SentencePiece.

A text is cut at every newline and every blank; each word is encoded alone, each newline is one control token
that no text can spell. So ids do not depend on neighbours, and a dictionary from word to ids may stand in
front of SentencePiece (3 to 10 times faster). For BPE the ids are those of `sp.encode(line)`; for unigram
too, except where two segmentations of a word have the same score and rounding decides. Text is not normalised
(`10²` stays apart from `102`) and unknown characters fall back to bytes, so decoding gives back what `clean`
made.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import sentencepiece
from pydantic import Field

from cluster.config import Section
from cluster.errors import ConfigError, DataError
from sharding.schema import token_dtype

NEWLINE_PIECE = "<newline>"
# Unigram training takes 18.5 bytes of memory per character counted (measured): 100 M of them take 1.9 GB.
TRAINING_CHARS = 100_000_000
# About 200 bytes a word (measured): 400 MB in a worker.
CACHED_WORDS = 2_000_000
# A longer word is a table or base64; it will not come again.
CACHED_WORD_CHARS = 64


class TokenizerConfig(Section):
    """Model and size of the vocabulary, and which marks stand around every note."""

    kind: Literal["unigram", "bpe"] = "unigram"
    vocab_size: int = Field(gt=0)
    bos: bool = True
    eos: bool = True


def train(word_counts: Mapping[str, int], config: TokenizerConfig, symbols: Sequence[str]) -> bytes:
    """A SentencePiece model from word counts; each of `symbols` becomes one token.

    Equal counts give equal bytes, in whatever order they were collected. Raises ConfigError where the
    vocabulary cannot have the size that was asked for, with the size that it can have.
    """
    written = io.BytesIO()
    lines = list(_training_lines(word_counts))
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
            byte_fallback=True,
            control_symbols=[NEWLINE_PIECE],
            user_defined_symbols=list(symbols),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as exc:
        raise _size_error(str(exc), config.vocab_size) from None
    return written.getvalue()


def _training_lines(word_counts: Mapping[str, int]) -> Iterator[str]:
    """`word TAB count` in order, counts divided so that memory stays bounded; words that fall to 0 go."""
    chars = sum(len(word) * count for word, count in word_counts.items())
    divisor = -(-chars // TRAINING_CHARS) or 1
    for word in sorted(word_counts):
        if count := word_counts[word] // divisor:
            yield f"{word}\t{count}"


def _size_error(message: str, vocab_size: int) -> ConfigError:
    """SentencePiece's refusal as one line; only numbers are taken from it, for it may quote training text."""
    if largest := re.search(r"value <= (\d+)", message):
        return ConfigError(
            f"tokenizer.vocab_size={vocab_size} is more than the training notes allow; "
            f"the largest possible is {largest[1]}"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            f"tokenizer.vocab_size={vocab_size} has no room for bytes and characters; "
            f"the smallest possible is {smallest[1]}"
        )
    return ConfigError(f"tokenizer.vocab_size={vocab_size}: SentencePiece cannot train on these notes")


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
        self.dtype = token_dtype(self.vocab_size)
        self._words: dict[str, bytes] = {}
        self._forget()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, with BOS and EOS as configured."""
        head = self._packed([self.bos_id] if self.bos else [])
        tail = self._packed([self.eos_id] if self.eos else [])
        return [np.frombuffer(head + body + tail, dtype=self.dtype) for body in self._bodies(texts)]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Token ids of the beginning of a note: BOS as configured, no EOS."""
        head = self._packed([self.bos_id] if self.bos else [])
        return np.frombuffer(head + self._bodies([text])[0], dtype=self.dtype)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; newline tokens become newlines, BOS and EOS nothing."""
        lines: list[list[int]] = [[]]
        for token in map(int, ids):
            if token == self.newline_id:
                lines.append([])
            elif token not in (self.bos_id, self.eos_id):
                lines[-1].append(token)
        return "\n".join(self._pieces.decode(line) for line in lines)

    def _bodies(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as packed bytes; words not met before go to SentencePiece in one batch."""
        notes = [text.replace("\n", " \n ").split(" ") for text in texts]
        unknown = sorted(set().union(*notes) - self._words.keys())
        if len(self._words) + len(unknown) > CACHED_WORDS:
            self._forget()
            unknown = sorted(set().union(*notes) - self._words.keys())
        self._words.update(zip(unknown, map(self._packed, self._pieces.encode(unknown)), strict=True))
        bodies = [b"".join(map(self._words.__getitem__, note)) for note in notes]
        for word in unknown:
            if len(word) > CACHED_WORD_CHARS:
                del self._words[word]
        return bodies

    def _packed(self, ids: Sequence[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()

    def _forget(self) -> None:
        self._words.clear()
        self._words["\n"] = self._packed([self.newline_id])
        self._words[""] = b""
