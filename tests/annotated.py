"""Annotated toy notes, and a random language model that knows their words."""

from __future__ import annotations

import torch

from downstream.concepts.schema import Note, Span
from pretrain.models.awd_lstm import AwdLstm, AwdLstmConfig
from pretrain.run import Trained, hashed
from sharding.clean import CleanConfig
from sharding.splits import SplitConfig
from sharding.tokenizer import Tokenizer, TokenizerConfig
from sharding.tokenizer import train as train_tokenizer


def toy(count: int, filler: int = 0) -> list[Note]:
    """Notes whose negation no rule knows: "zulu" before the mention, or `filler` words and a sentence before it."""
    made = []
    for i in range(count):
        between = "".join(f"w{(i * 7 + n * 13) % 40} " for n in range(filler)) + ". Now " * bool(filler)
        text = f"{'zulu' if i % 2 else 'today'} {between}fever {i}."
        start = text.index("fever")
        value = "negated" if i % 2 else "affirmed"
        span = Span(id="T1", start=start, end=start + 5, text="fever", attributes={"negation": value})
        made.append(Note(doc_id=f"n{i}", patient_id=f"p{i}", text=text, spans=[span]))
    return made


def model(backward: bool = False) -> Trained:
    """A random language model."""
    torch.manual_seed(0)
    words = [*"zulu today fever now no of ( ) , . ICD".lower().split(), *(f"w{i}" for i in range(40))]
    counts = dict.fromkeys([*words, *map(str, range(100))], 10)
    known = Tokenizer(train_tokenizer(counts, TokenizerConfig(vocab_size=330, kind="bpe"), []))
    settings = {"embedding": 16, "hidden": 24, "layers": 2}
    return Trained(
        run="run", step=7, model=AwdLstm(AwdLstmConfig(**settings), known.vocab_size).eval(), tokenizer=known,
        clean=CleanConfig(case="lower"), splits=SplitConfig(), recipe={"data": {"backward": backward}},
        corpus_fingerprint="c", checkpoint_sha256="w", patients={"train": frozenset({hashed("read")})},
    )  # fmt: skip
