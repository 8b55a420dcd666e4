"""The statistics of a corpus are what a naive recount of its decoded notes gives."""

from __future__ import annotations

import csv
import io
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import cli, logs, storage
from cluster.config import validate
from cluster.errors import DataError
from sharding import job, stats
from sharding.clean import CLASS_TOKENS
from sharding.dedup import word_hashes
from sharding.shards import Corpus
from sharding.stats import SMALLEST_HASHES, distinct_words, main

TAGS = ["[**Known lastname 7**]", "[**2101-3-4**]", "[**Hospital1 18**]", "[**Telephone/Fax 3**]", "[**Age over 90 **]"]


def write(url: str, words: list[str], rows: int = 500) -> None:
    """A CSV of notes; every eleventh repeats an earlier one, some are empty."""
    draw = random.Random(len(words))
    texts: list[str] = []
    for row in range(rows):
        lines = [" ".join(draw.choices([*words, *TAGS], k=draw.randint(1, 60))) for _ in range(draw.randint(1, 9))]
        texts.append(texts[draw.randrange(row)] if row % 11 == 10 else " " if row % 50 == 7 else "\n".join(lines))
    kinds = draw.choices(["Nursing", "ECG", "", "Cost in $"], k=rows)
    written = io.StringIO()
    notes = [(row, row % 90, kinds[row], texts[row]) for row in range(rows)]
    csv.writer(written).writerows([("id", "patient", "kind", "text"), *notes])
    storage.write_bytes(url, written.getvalue().encode())


def make(name: str, words: list[str], **changes: Any) -> Corpus:
    """The corpus of such notes, made by the job in memory and in this process."""
    write(f"memory://stats/{name}.csv", words)
    recipe = {
        "input": f"memory://stats/{name}.csv",
        "output": f"memory://stats/{name}",
        "reader": {"name": "csv", "doc_id": "id", "text": "text", "patient_id": "patient", "category": "kind"},
        "splits": {"valid": 0.2, "test": 0.2},
        "block_mib": 0.05,
        "shard_mib": 0.05,
    }
    return job.run(validate(job.ShardRecipe, recipe | changes, "test"))


@pytest.fixture(scope="module")
def corpus() -> Any:
    """A corpus whose tokenizer was trained on other notes, which have no b, no q and no digits."""
    make("donor", ["heart", "lung", "pain", "fever", "iron"], tokenizer={"vocab_size": 283})
    words = ["heart", "pain", "bleed", "quiet", "12", "fever,", "x<date>y", *(f"lung{number}" for number in range(50))]
    yield make("corpus", words, tokenizer_from="memory://stats/donor")
    storage.remove("memory://stats")


def read(corpus: Corpus) -> dict[str, Any]:
    found: dict[str, Any] = storage.read_json(storage.join(corpus.url, stats.STATS))
    return found


def test_stats_are_those_of_a_naive_recount(corpus: Corpus) -> None:
    counted = read(corpus)
    known = corpus.tokenizer
    categories: dict[str, Counter[str]] = {}
    marks: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for name in ("train", "valid", "test"):
        split = corpus.split(name)
        lengths: Counter[int] = Counter()
        unknown = 0
        for note, kind in enumerate(split.column("category")):
            ids = split.tokens(note).tolist()
            text = known.decode(ids)
            lengths[len(ids).bit_length() - 1] += 1
            unknown += sum(bool(known.is_unknown[token]) for token in ids)
            own = categories.setdefault(kind or "", Counter())
            own.update(notes=1, tokens=len(ids), bytes=len(text.encode()))
            marks.update({token: text.count(token) for token in CLASS_TOKENS})
            words.update(text.split())
        assert counted["lengths"][name]["lengths"] == [lengths[power] for power in range(max(lengths) + 1)]
        assert counted["lengths"][name]["unknown_tokens"] == unknown
    assert counted["categories"] == {name: dict(own) for name, own in categories.items()}
    assert counted["class_tokens"] == {token: marks[token] for token in CLASS_TOKENS}
    assert min(marks[token] for token in ("<name>", "<date>", "<hospital>", "<phone>", "<age>")) > 0
    assert counted["words"] == words.total()
    assert counted["distinct_words"] == len(words)
    assert counted["distinct_word_rate"] == pytest.approx(len(words) / words.total())
    beyond = {word for word in words if known.is_unknown[known.encode([word])[0]].any()}
    assert {"bleed", "quiet", "12"} <= beyond
    assert {"heart", "pain"}.isdisjoint(beyond)
    assert counted["out_of_vocabulary_words"] == sum(words[word] for word in beyond) > 0


def test_records_are_kept_or_dropped_for_a_reason(corpus: Corpus) -> None:
    counted = read(corpus)
    assert counted["records"] == 500
    assert counted["drops"]["empty"] == 10
    assert counted["drops"]["duplicate"] > 30
    notes = sum(category["notes"] for category in counted["categories"].values())
    assert notes + sum(counted["drops"].values()) == 500


@pytest.mark.parametrize("parts", [1, 7])
def test_many_distinct_words_are_estimated(parts: int) -> None:
    """200,000 words; every part has some of them, and most words stand in several parts."""
    hashes = word_hashes([f"word{number}" for number in range(200_000)])
    draw = np.random.default_rng(4)
    chosen = [np.arange(200_000), *(draw.choice(200_000, 90_000, replace=False) for _ in range(parts - 1))]
    smallest = [stats.words(ids, np.zeros(200_000, bool), hashes)["smallest_hashes"] for ids in chosen]
    assert max(map(len, smallest)) == SMALLEST_HASHES
    assert distinct_words(smallest) == pytest.approx(199_999, rel=0.05)  # word 0 is the line end


def test_few_distinct_words_are_counted() -> None:
    hashes = word_hashes([f"word{number}" for number in range(4000)])
    ids = [np.arange(1, 3000), np.repeat(np.arange(2000, 4000), 2)]
    found = [stats.words(part, np.arange(4000) == 2500, hashes) for part in ids]
    assert distinct_words([part["smallest_hashes"] for part in found]) == 3999
    assert [(part["words"], part["unknown"]) for part in found] == [(2999, 1), (4000, 2)]


def test_token_counts_do_not_depend_on_where_the_tokens_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(1).integers(0, 300, 1000).astype(np.uint16)
    monkeypatch.setattr(stats, "TOKENS_AT_A_TIME", 64)
    assert stats._token_counts(tokens, 300).tolist() == np.bincount(tokens, minlength=300).tolist()


def test_the_verb_shows_tables_and_draws_a_picture(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with logs.console.capture() as capture:
        cli.run_verb("stats", [corpus.url])
        cli.run_verb("stats", [corpus.url, f"png={tmp_path}/own.png"])
    shown = re.sub(r" +", " ", capture.get())
    counted = read(corpus)
    tokens = sum(split["tokens"] for split in corpus.manifest["splits"].values())
    notes = sum(split["notes"] for split in corpus.manifest["splits"].values())
    for row in (
        f"│ all │ {notes:,} │ {tokens:,} │ 100.0% │",
        f"│ (none) │ {counted['categories']['']['notes']:,} │",
        f"│ kept │ {notes:,} │",
        "│ empty │ 10 │ 2.00% │",
        "│ records read │ 500 │ 100.00% │",
        f"│ different words │ {counted['distinct_words']:,} │",
        f"│ out-of-vocabulary words │ {counted['out_of_vocabulary_words']:,} │",
        f"│ <name> │ {counted['class_tokens']['<name>']:,} │",
    ):
        assert row in shown
    assert not any(word in shown for word in ("heart", "bleed", "lung1"))
    for url in (storage.join(corpus.url, "stats.png"), f"{tmp_path}/own.png"):
        picture = storage.read_bytes(url)
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(picture) > 20_000


def test_lengths_are_shown_as_ranges() -> None:
    lengths = np.array([0, 2, 0, 97, 1])  # notes with 1, 2 to 3, 4 to 7, … tokens
    shares = (0.0, 0.019, 0.02, 0.5, 0.99, 1.0)
    assert [stats._bin_of(lengths, share) for share in shares] == [1, 1, 3, 3, 4, 4]
    assert [stats._range(power) for power in (0, 1, 10)] == ["1", "2–3", "1,024–2,047"]
    assert [stats._short(number) for number in (0, 500, 2500, 7.5e6, 3e9)] == ["0", "500", "2.5k", "7.5M", "3G"]


def test_changed_stats_are_refused(corpus: Corpus) -> None:
    url = storage.join(corpus.url, stats.STATS)
    before = storage.read_bytes(url)
    storage.write_json(url, read(corpus) | {"words": 7})
    with pytest.raises(DataError, match=r"stats\.json was changed"):
        main([corpus.url])
    storage.write_bytes(url, before)
