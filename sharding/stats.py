"""`./launch.sh stats SHARDS`: what a corpus is made of, counted while its shards were written.

    encode (words of a part) ─┐
    pack (tokens of a shard) ─┴─► stats.json ──► a table and stats.png

Every note is looked at once. Distinct words are not collected: the smallest hashes of a part tell how many there are
(k minimum values, Bar-Yossef et al. 2002), to 1.6% beyond 4,096 words and exactly below.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import config, logs, storage
from cluster.errors import DataError
from sharding.clean import CLASS_TOKENS
from sharding.schema import SPLITS
from sharding.shards import Corpus, seal_holds
from sharding.tokenizer import Tokenizer

STATS = "stats.json"
PICTURE = "stats.png"
SMALLEST_HASHES = 4096
# Tokens counted at a time: numpy widens them first, and that many stay in the processor's cache (a third faster).
TOKENS_AT_A_TIME = 1 << 16
# Categories with a bar of their own; the smaller ones share one.
BARS = 15
COLOURS = {"train": "#4878a8", "valid": "#dd8452", "test": "#55a868"}


class StatsConfig(config.Section):
    """`./launch.sh stats SHARDS [png=FILE]`."""

    shards: str
    png: str | None = None  # where the picture goes; into the shard directory if not given


def main(args: list[str]) -> None:
    """The verb `stats`: tables on the terminal, and a picture."""
    asked = config.load(StatsConfig, args, positional="shards")
    manifest = Corpus.open(asked.shards).manifest
    counted = storage.read_json(storage.join(asked.shards, STATS))
    if not isinstance(counted, dict) or not seal_holds(counted):
        raise DataError(f"{asked.shards}: {STATS} was changed after it was written; make the shards again")
    _show(asked.shards, manifest, counted)
    picture = asked.png or storage.join(asked.shards, PICTURE)
    storage.write_bytes(picture, draw(asked.shards, manifest, counted))
    logs.say(f"drawn: {picture}")


def words(ids: np.ndarray, unknown: np.ndarray, hashes: np.ndarray) -> dict[str, Any]:
    """Counts of the words of some notes, line ends (word 0) left out.

    `unknown` says of every word whether the tokenizer lacks it, `hashes` what its hash is.
    """
    counts = np.bincount(ids, minlength=len(unknown))
    counts[0] = 0
    return {
        "words": int(counts.sum()),
        "unknown": int(counts[unknown].sum()),
        "smallest_hashes": np.sort(hashes[counts > 0])[:SMALLEST_HASHES].tolist(),
    }


def distinct_words(smallest: Sequence[Sequence[int]]) -> int:
    """How many different words some parts have together, from the smallest hashes of each."""
    together = np.unique(np.array([value for part in smallest for value in part], np.uint64))
    if len(together) < SMALLEST_HASHES:
        return len(together)
    return round((SMALLEST_HASHES - 1) * 2.0**64 / float(together[SMALLEST_HASHES - 1]))


def of_shard(notes: pa.Table, tokenizer: Tokenizer) -> dict[str, Any]:
    """Counts of one shard: notes, tokens and bytes by category, notes by length, class tokens."""
    lists = notes.column("tokens").combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    encoded = notes.column("category").combine_chunks().fill_null("").dictionary_encode()
    kinds, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    n_bytes = notes.column("n_bytes").to_numpy()
    columns = [np.bincount(kinds, weights, len(names)) for weights in (None, lengths, n_bytes)]
    counts = _token_counts(lists.flatten().to_numpy(), tokenizer.vocab_size)
    return {
        "categories": {
            name: [int(column[place]) for column in columns]
            for place, name in sorted(enumerate(names), key=lambda x: x[1])
        },
        "lengths": np.bincount(np.log2(lengths).astype(int)).tolist(),
        "class_tokens": {token: int(counts[tokenizer.symbols[token]]) for token in CLASS_TOKENS},
        "unknown_tokens": int(counts[tokenizer.is_unknown].sum()),
    }


def whole(
    splits: dict[str, list[dict[str, Any]]], encoded: Sequence[dict[str, Any]], rows: int, drops: dict[str, int]
) -> dict[str, Any]:
    """The statistics of a corpus from those of its shards, by split, and of the words of its parts."""
    categories: dict[str, np.ndarray] = {}
    class_tokens: Counter[str] = Counter()
    by_split: dict[str, Any] = {}
    for split, shards in splits.items():
        lengths = np.zeros(32, np.int64)
        unknown = 0
        for shard in shards:
            lengths[: len(shard["lengths"])] += np.array(shard["lengths"], np.int64)
            unknown += shard["unknown_tokens"]
            class_tokens.update(shard["class_tokens"])
            for name, counts in shard["categories"].items():
                categories[name] = categories.get(name, np.zeros(3, np.int64)) + counts
        by_split[split] = {"lengths": np.trim_zeros(lengths, "b").tolist(), "unknown_tokens": unknown}
    parts = [part["words"] for part in encoded]
    total = sum(part["words"] for part in parts)
    distinct = distinct_words([part["smallest_hashes"] for part in parts])
    return {
        "records": rows,
        "drops": drops,
        "categories": {
            name: dict(zip(("notes", "tokens", "bytes"), counts.tolist(), strict=True))
            for name, counts in sorted(categories.items())
        },
        "lengths": by_split,  # notes with 2^i to 2^(i+1) - 1 tokens
        "words": total,
        "distinct_words": distinct,
        "distinct_word_rate": distinct / total if total else 0.0,
        "out_of_vocabulary_words": sum(part["unknown"] for part in parts),
        "class_tokens": {token: class_tokens[token] for token in CLASS_TOKENS},
    }


def _token_counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), TOKENS_AT_A_TIME):
        counts += np.bincount(tokens[start : start + TOKENS_AT_A_TIME], minlength=vocab_size)
    return counts


def _show(url: str, manifest: dict[str, Any], counted: dict[str, Any]) -> None:
    categories = _by_tokens(counted)
    total = {key: sum(one[key] for _, one in categories) for key in ("notes", "tokens", "bytes")}
    logs.table(
        f"{url}: notes by category",
        ("category", "notes", "tokens", "share", "text MB", "tokens a note"),
        [_category_row(name, one, total["tokens"]) for name, one in [*categories, ("all", total)]],
    )
    lengths = {split: np.array(counted["lengths"][split]["lengths"], np.int64) for split in SPLITS}
    filled = [split for split in SPLITS if lengths[split].sum()]
    rows = [
        ("notes", *(f"{lengths[split].sum():,}" for split in filled)),
        ("mean", *(f"{manifest['splits'][split]['tokens'] / lengths[split].sum():,.1f}" for split in filled)),
        *(
            (name, *(_range(_bin_of(lengths[split], share)) for split in filled))
            for name, share in [("shortest", 0.0), ("5%", 0.05), ("median", 0.5), ("95%", 0.95), ("longest", 1.0)]
        ),
    ]
    logs.table("length of a note in tokens", ("", *filled), rows)
    records = [*_records(manifest, counted), ("records read", counted["records"])]
    shares = [(name, f"{number:,}", f"{number / max(counted['records'], 1):.2%}") for name, number in records]
    logs.table("records", ("what became of them", "number", "share"), shares)
    about = "" if counted["distinct_words"] < SMALLEST_HASHES else "about "
    unknown, words_read = counted["out_of_vocabulary_words"], max(counted["words"], 1)
    rows = [
        ("words", f"{counted['words']:,}", ""),
        ("different words", f"{about}{counted['distinct_words']:,}", f"{counted['distinct_word_rate']:.3%}"),
        ("out-of-vocabulary words", f"{unknown:,}", f"{unknown / words_read:.3%}"),
    ]
    logs.table("words (kept notes of all splits)", ("", "number", "of all words"), rows)
    tokens = max(total["tokens"], 1)
    marks = [(name, f"{number:,}", f"{number / tokens:.3%}") for name, number in counted["class_tokens"].items()]
    logs.table("class tokens", ("token", "number", "of all tokens"), marks)


def _by_tokens(counted: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """Categories with their counts, most tokens first."""
    named = [(name or "(none)", one) for name, one in counted["categories"].items()]
    return sorted(named, key=lambda item: (-item[1]["tokens"], item[0]))


def _category_row(name: str, one: dict[str, int], tokens: int) -> tuple[str, ...]:
    share, mean = one["tokens"] / max(tokens, 1), one["tokens"] / max(one["notes"], 1)
    return name, f"{one['notes']:,}", f"{one['tokens']:,}", f"{share:.1%}", f"{one['bytes'] / 1e6:,.1f}", f"{mean:,.1f}"


def _bin_of(lengths: np.ndarray, share: float) -> int:
    """The bin in which the note stands that is longer than this share of the notes."""
    place = min(int(share * lengths.sum()), int(lengths.sum()) - 1)
    return int(np.searchsorted(np.cumsum(lengths), place, side="right"))


def _range(power: int) -> str:
    return f"{1 << power:,}–{(2 << power) - 1:,}" if power else "1"


def _records(manifest: dict[str, Any], counted: dict[str, Any]) -> list[tuple[str, int]]:
    """What became of the records: kept, or dropped and why."""
    kept = sum(split["notes"] for split in manifest["splits"].values())
    return [("kept", kept), *((reason.replace("_", " "), number) for reason, number in counted["drops"].items())]


def draw(url: str, manifest: dict[str, Any], counted: dict[str, Any]) -> bytes:
    """The statistics as a PNG of four panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    categories = _by_tokens(counted)
    if len(categories) > BARS:
        rest = sum(one["tokens"] for _, one in categories[BARS - 1 :])
        categories = [*categories[: BARS - 1], (f"{len(categories) - BARS + 1} others", {"tokens": rest})]
    splits = manifest["splits"]
    notes, tokens, size = (sum(split[key] for split in splits.values()) for key in ("notes", "tokens", "bytes"))
    patients = sum(split["patients"] for split in splits.values())
    figure, ((by_category, by_length), (records, marks)) = pyplot.subplots(
        2, 2, figsize=(12, 8.5), dpi=120, height_ratios=(3, 2), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    )
    name = _plain(storage.absolute(url).rstrip("/").rsplit("/", 1)[-1])
    figure.suptitle(
        f"{name}: {notes:,} notes of {patients:,} patients, {tokens:,} tokens, {size / 1e6:,.1f} MB of text",
        fontweight="bold",
    )
    _bars(by_category, [(name, one["tokens"]) for name, one in categories], tokens)
    by_category.set(title="tokens by category", xlabel="tokens (share of all)")
    _lengths(by_length, counted["lengths"])
    _bars(records, _records(manifest, counted), counted["records"])
    records.set(title=f"what became of {counted['records']:,} records", xlabel="records (share of all)")
    _bars(marks, sorted(counted["class_tokens"].items(), key=lambda item: -item[1]), tokens)
    marks.set(title="class tokens", xlabel="tokens (share of all)")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return picture.getvalue()


def _bars(axes: Any, rows: Sequence[tuple[str, int]], whole: int) -> None:
    """A horizontal bar for every row, the first on top, with its number and its share of the whole."""
    bars = axes.barh(range(len(rows)), [number for _, number in rows], color="#4878a8")
    labels = [f"{number:,} ({number / max(whole, 1):.2%})" for _, number in rows]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [_plain(name) for name, _ in rows], fontsize=9)
    axes.margins(x=0.3)  # room for the numbers
    axes.set_xlim(left=0)
    axes.set_ylim(max(len(rows), 6) - 0.4, -0.6)  # few bars are no thicker than many
    axes.xaxis.set_major_formatter(lambda number, _: _short(number))
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.tick_params(axis="y", length=0)


def _short(number: float) -> str:
    """The number as a mark on an axis: 250k, 7.5M."""
    size, sign = next(((size, sign) for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= size), (1, ""))
    return f"{number / size:g}{sign}"


def _plain(name: str) -> str:
    """The name as matplotlib shall write it: a `$` would begin a formula."""
    return (name if len(name) <= 28 else f"{name[:27]}…").replace("$", r"\$")


def _lengths(axes: Any, by_split: dict[str, Any]) -> None:
    """Shares of the notes of every split by length, in bins that double."""
    filled = [split for split in SPLITS if sum(by_split[split]["lengths"])]
    last = max((len(by_split[split]["lengths"]) for split in filled), default=1)
    first = min((int(np.flatnonzero(by_split[split]["lengths"])[0]) for split in filled), default=0)
    width = 0.8 / max(len(filled), 1)
    for number, split in enumerate(filled):
        counts = np.zeros(last)
        counts[: len(by_split[split]["lengths"])] = by_split[split]["lengths"]
        places = np.arange(first, last) + (number - (len(filled) - 1) / 2) * width
        axes.bar(places, 100 * counts[first:] / counts.sum(), width, label=split, color=COLOURS[split])
    axes.set_xticks(range(first, last), [_range(power) for power in range(first, last)], rotation=40, ha="right")
    axes.tick_params(axis="x", labelsize=8)
    axes.set(title="length of notes", xlabel="tokens of a note", ylabel="share of the notes of a split (%)")
    axes.legend(frameon=False)
