"""Small corpora for tests: real tokenizer, real shards, text made from a seed. No Ray needed."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa

from cluster import storage
from sharding import shards
from sharding.clean import CLASS_TOKENS
from sharding.schema import FORMAT_VERSION
from sharding.tokenizer import Tokenizer, TokenizerConfig, train

# Sizes for tests, by model: a line in MODELS needs one here, and is then in every proof.
SMALL_MODELS = {
    "awd-lstm": {"embedding": 12, "hidden": 16, "layers": 2},
    "transformer-xl": {"width": 12, "layers": 2, "heads": 2, "head_width": 6, "inner": 16, "memory": 9},
}

WORDS = (
    "patient denies chest pain shortness of breath fever admitted for heart failure exacerbation given lasix "
    "blood loss estimated cc stable discharged home with services follow up in clinic history diabetes copd"
).split()


def notes(seed: int, count: int) -> list[str]:
    """`count` notes of 5 to 120 words in lines; some order in them, so that there is something to learn."""
    draws = random.Random(seed)
    made = []
    for _ in range(count):
        at = draws.randrange(len(WORDS))
        words = []
        for _ in range(draws.randint(5, 120)):
            words.append(WORDS[at % len(WORDS)])
            at = at + 1 if draws.random() < 0.8 else draws.randrange(len(WORDS))
        made.append("\n".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12)))
    return made


def tiny_corpus(folder: Path, seed: int = 1, train_notes: int = 60, vocab_size: int = 320) -> str:
    """Writes a finished shard directory with two training shards and one for validation and test; returns its URL."""
    texts = {"train": notes(seed, train_notes), "valid": notes(seed + 1, 12), "test": notes(seed + 2, 12)}
    counts = Counter(word for text in texts["train"] for word in text.split())
    config = TokenizerConfig(vocab_size=vocab_size)
    model = train(counts, config, CLASS_TOKENS)
    tokenizer = Tokenizer(model)
    url = str(folder)
    storage.write_bytes(storage.join(url, shards.TOKENIZER), model)
    splits = {}
    for split, written in texts.items():
        half = max(len(written) // 2, 1)
        parts = [written[:half], written[half:]] if split == "train" else [written]
        entries = []
        for index, part in enumerate(parts):
            ids = [f"{split}-{index}-{row}" for row in range(len(part))]
            table = pa.table(
                {
                    "doc_id": pa.array(ids, pa.string()),
                    "patient_id": pa.array(ids, pa.string()),
                    "encounter_id": pa.array([None] * len(ids), pa.string()),
                    "category": pa.array(["Nursing"] * len(ids), pa.string()),
                    "time": pa.array([None] * len(ids), pa.string()),
                    "n_bytes": pa.array([len(text.encode()) for text in part], pa.int64()),
                    "tokens": shards.token_lists(tokenizer.encode(part), tokenizer.dtype),
                }
            )
            place = storage.join(url, f"{split}-{index:05d}.arrow")
            entries.append(shards.write_shard(place, table, tokenizer))
        splits[split] = {"notes": len(written), "shards": entries}
    manifest = {
        "format": FORMAT_VERSION,
        "dtype": str(tokenizer.dtype),
        "recipe": {"clean": {"case": "keep"}, "splits": {"salt": "chartlm", "valid": 0.05, "test": 0.05}},
        "tokenizer": {
            "file": shards.TOKENIZER,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos": True,
            "eos": True,
        },
        "splits": splits,
    }
    manifest["fingerprint"] = shards.content_fingerprint(manifest)
    storage.write_json(storage.join(url, shards.MANIFEST), shards.sealed(manifest))
    return url
