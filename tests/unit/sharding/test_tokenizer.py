"""Ids are SentencePiece's own, training gives the same bytes, and decoding gives back what cleaning made."""

from __future__ import annotations

import io
import itertools
import random
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, DataError
from sharding import tokenizer as module
from sharding.clean import CLASS_TOKENS, CleanConfig, clean, clean_notes
from sharding.schema import token_dtype
from sharding.tokenizer import NEWLINE_PIECE, Tokenizer, TokenizerConfig, thinned, train, units

STEMS = ["card", "pulmon", "ren", "hepat", "neur", "gastr", "derm", "oste", "arthr", "my", "cyst", "nephr"]
ENDS = ["itis", "osis", "algia", "opathy", "ectomy", "oma", "emia", "uria", "ogram"]


def texts(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)

    def word() -> str:
        common = (
            draw.choice(STEMS) + "o" + draw.choice(ENDS),
            "the",
            "of",
            "patient",
            f"{draw.randint(1, 400)} mg,",
        )
        return draw.choice((*common, "<name>", "<date>.", "10²"))

    lines = [" ".join(word() for _ in range(draw.randint(0, 9))) for _ in range(number * 5)]
    return ["\n".join(lines[start : start + 5]) for start in range(0, len(lines), 5)]


NOTES = texts(300)
COUNTS = Counter(word for text in NOTES for word in text.split())
KINDS = ("unigram", "bpe", "char", "word")


def trained(kind: str, counts: Mapping[str, int] = COUNTS, vocab_size: int = 370) -> bytes:
    cut: Counter[str] = Counter()
    for word, count in counts.items():
        for unit in units(word, kind):
            cut[unit] += count
    return train(cut, TokenizerConfig(kind=kind, vocab_size=vocab_size), CLASS_TOKENS)


MODELS = {kind: trained(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", MODELS)
def test_cached_ids_equal_those_of_sentencepiece(kind: str) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_proto=MODELS[kind])
    ours = Tokenizer(MODELS[kind], bos=False, eos=False)
    newline = plain.piece_to_id(NEWLINE_PIECE)
    fresh = [*texts(50, seed=1), "unseen words: zqx 漢字 <name>,<name>", "", "\n\n", "w" * 5000]
    for _ in range(2):
        for text, ids in zip(fresh, ours.encode(fresh), strict=True):
            expected: list[int] = []
            for line in text.split("\n"):
                # Of a word model unit by unit: SentencePiece makes one <unk> of several in a row.
                cut = [unit for word in line.split() for unit in units(word, kind)] if kind == "word" else [line]
                expected += [*itertools.chain(*plain.encode(cut)), newline]
            assert ids.tolist() == expected[:-1]
            assert ids.dtype == np.uint16


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_decoding_gives_back_cleaned_text(kind: str) -> None:
    ours = Tokenizer(MODELS[kind])

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=60) | st.text(alphabet='Ka1.²\n <>"\t', max_size=60))
    def round_trip(text: str) -> None:
        text = clean(text, CleanConfig())
        assert ours.decode(ours.encode([text])[0].tolist()) == text

    round_trip()


def test_class_tokens_are_one_token_and_newline_cannot_be_spelled() -> None:
    ours = Tokenizer(MODELS["unigram"])
    for token in CLASS_TOKENS:
        assert len(ours.encode([f"a{token}"])[0]) == len(ours.encode(["a"])[0]) + 1
    assert ours.newline_id in ours.encode(["a\nb"])[0]
    assert ours.newline_id not in ours.encode([f"a {NEWLINE_PIECE} b"])[0]
    assert ours.eos_id not in ours.encode(["</s> <s>"])[0][1:-1]


def test_marks() -> None:
    both, none = Tokenizer(MODELS["bpe"]), Tokenizer(MODELS["bpe"], bos=False, eos=False)
    (body,) = none.encode(["the patient"])
    assert both.encode(["the patient"])[0].tolist() == [both.bos_id, *body, both.eos_id]
    assert both.encode_prompt("the patient").tolist() == [both.bos_id, *body]
    assert none.encode_prompt("the patient").tolist() == body.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_begins_once(kind: str) -> None:
    ours = Tokenizer(MODELS[kind])
    for text in [*texts(20, seed=2), "<name>,<name> <date> <d", "漢字 zqx\n\nthe end", ""]:
        words = sum(len(units(word, kind)) for word in text.split()) if kind == "word" else len(text.split())
        assert ours.begins_word[ours.encode([text])[0]].sum() == words


def test_the_cache_stays_bounded_and_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_WORDS", 40)
    small, large = Tokenizer(MODELS["bpe"]), Tokenizer(MODELS["bpe"])
    for start in range(0, len(NOTES), 3):
        batch = [*NOTES[start : start + 3], "z" * 100]
        monkeypatch.setattr(module, "CACHED_WORDS", 40)
        few = small.encode(batch)
        assert len(small._words) <= 40 + len({word for text in batch for word in text.split()})
        assert "z" * 100 not in small._words
        monkeypatch.setattr(module, "CACHED_WORDS", 10**6)
        for here, there in zip(few, large.encode(batch), strict=True):
            assert here.tolist() == there.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bitwise_deterministic(kind: str) -> None:
    shuffled = list(COUNTS.items())
    random.Random(1).shuffle(shuffled)
    assert trained(kind, dict(shuffled)) == MODELS[kind]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_size_that_cannot_be_names_the_one_that_can(kind: str) -> None:
    for asked, limit in ((9000, "largest"), (100, "smallest")):
        with pytest.raises(ConfigError, match=f"the {limit} possible is") as caught:
            train(COUNTS, TokenizerConfig(kind=kind, vocab_size=asked), CLASS_TOKENS)
        possible = int(re.findall(r"\d+", str(caught.value))[-1])
        model = train(COUNTS, TokenizerConfig(kind=kind, vocab_size=possible), CLASS_TOKENS)
        assert Tokenizer(model).vocab_size == possible


def test_large_counts_are_divided_so_that_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINING_CHARS", 1000)
    monkeypatch.setattr(module, "RARE_CHARS", 9)
    words = pa.table({"word": ["abcde", "rar2", "none", "rare", "z"], "count": [1000, 3, 2, 3, 40]})
    # 5,072 characters: a sixth of every count, and 9 characters of the words that are then left with none.
    assert thinned(words) == {"abcde": 166, "z": 6, "rar2": 1, "rare": 1}
    assert thinned(words.take([4, 3, 2, 1, 0])) == thinned(words)
    assert thinned(words.slice(0, 0)) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_notes_of_distinct_words_get_the_ids_of_their_texts(kind: str, bos: bool, eos: bool) -> None:
    ours = Tokenizer(MODELS[kind], bos=bos, eos=eos)
    fresh = [*texts(20, seed=2), "unseen zqx 漢字 <name>,<name> 10.2", "\n\n", "", "w" * 500]
    words = clean_notes(pa.array(fresh), CleanConfig())
    tokens, starts, unknown = ours.encode_notes(words.vocabulary, words.ids, words.offsets)
    expected = ours.encode([clean(text, CleanConfig()) for text in fresh])
    assert [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)] == [ids.tolist() for ids in expected]
    assert tokens.dtype == ours.dtype
    beyond = {word for word, lacks in zip(words.vocabulary, unknown, strict=True) if lacks}
    assert {"漢字", "zqx"} <= beyond
    assert not beyond & {"\n", "<name>,<name>", "the", "patient"}


def test_a_word_model_knows_words_numbers_and_signs() -> None:
    ours = Tokenizer(MODELS["word"])
    assert units("<name>,10.2(12:30)don't-5/6", "word") == [
        "<name>",
        ",",
        "10.2",
        "(",
        "12:30",
        ")",
        "don't",
        "-",
        "5/6",
    ]
    text = "patient of <name> ."
    assert ours.decode(ours.encode([text])[0].tolist()) == text
    assert ours.decode(ours.encode(["the zqx\n10² mg,"])[0].tolist()) == "the <unk>\n10² mg ,"
    assert set(ours.encode(["<name>"])[0][1:-1].tolist()) == {ours.symbols["<name>"]}


def test_flagged_words_are_two_words_for_sentencepiece() -> None:
    assert units("xxup copd,", "bpe") == ["xxup", "copd,"]
    assert units("xxup copd,", "word") == ["xxup", "copd", ","]


def test_no_words_and_foreign_models_are_errors() -> None:
    with pytest.raises(DataError, match="no words"):
        train({}, TokenizerConfig(vocab_size=370), CLASS_TOKENS)
    with pytest.raises(DataError, match="not made by"):
        Tokenizer(foreign())


def foreign() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(NOTES), model_writer=written, vocab_size=60, minloglevel=2, model_type="bpe"
    )
    return written.getvalue()


def test_more_than_65536_tokens_take_32_bits() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32
