"""`./launch.sh score GOLD.jsonl PREDICTED.jsonl`: anybody's system against a hand-labelled set, in the same numbers.

Spans are those of the gold file: each is compared with the predicted span that shares most characters with it (of its
concept, where both name one); one that nobody found counts as the usual value, as it would in use. Of every value of an
attribute but the usual one: precision, recall, F1, with 95% intervals over documents. With `kappa=true` the files are
of two annotators, and agreement is Cohen's (1960) kappa.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field
from sklearn.metrics import cohen_kappa_score

from cluster import config, logs, storage
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from downstream.concepts import schema
from downstream.concepts.cues import DEFAULTS
from downstream.concepts.schema import Note, Span
from downstream.concepts.words import Text

DRAWS = 1000


class ScoreRecipe(Section):
    """`./launch.sh score GOLD PREDICTED [out=FILE]`."""

    gold: Place = Field(description="annotated by hand")
    predicted: Place = Field(description="annotated by the system, or by the second annotator")
    out: Place | None = Field(None, description="a JSON file for the numbers")
    kappa: bool = Field(False, description="two annotators: agreement by Cohen's kappa")
    skip_bad: bool = Field(False, description="notes that are wrong are left out and counted")


class Pair(NamedTuple):
    """What both say of a gold span. `found`: the system has a span there."""

    doc_id: str
    sentence: int  # its first word
    gold: dict[str, str]
    said: dict[str, str]
    found: bool


def main(args: list[str]) -> None:
    """The verb."""
    places = [word for word in args if "=" not in word]
    if len(places) != 2:
        raise ConfigError("score what? give a gold and a predicted file of annotated notes")
    named = [f"gold={places[0]}", f"predicted={places[1]}", *(word for word in args if "=" in word)]
    asked = config.load(ScoreRecipe, named, None)
    gold = {note.doc_id: note for note in schema.read(asked.gold, asked.skip_bad)}
    predicted = {note.doc_id: note for note in schema.read(asked.predicted, asked.skip_bad)}
    pairs = paired(gold, predicted, asked.gold, asked.predicted)
    found = scores(pairs)
    if asked.kappa:
        found["kappa"] = kappa(pairs)
    _show(found)
    if asked.out:
        storage.write_json(asked.out, found)


def paired(gold: dict[str, Note], predicted: dict[str, Note], gold_url: str, predicted_url: str) -> list[Pair]:
    """One pair a gold span. Raises DataError where a note is missing or its text is another."""
    if not gold:
        raise DataError(f"{gold_url}: has no note")
    pairs = []
    for name, note in gold.items():
        other = predicted.get(name)
        if other is None:
            raise DataError(f"{predicted_url}: has no note {name}, which {gold_url} has")
        if other.text != note.text:
            raise DataError(
                f"{predicted_url}: note {name} has another text than in {gold_url}; offsets cannot be compared"
            )
        text = Text(note.text)
        ordered = sorted(other.spans, key=lambda span: span.start)
        starts = [span.start for span in ordered]
        longest = max((span.end - span.start for span in ordered), default=0)
        for span in note.spans:
            near = slice(bisect.bisect_right(starts, span.start - longest), bisect.bisect_left(starts, span.end))
            match = _best(span, ordered[near])
            first, last = text.span_of(span.start, span.end)
            sentence = text.sentence(first)[0] if first < last else -1
            pairs.append(Pair(name, sentence, span.attributes, match.attributes if match else {}, match is not None))
    return pairs


def _best(span: Span, others: Sequence[Span]) -> Span | None:
    shared = [
        (min(span.end, other.end) - max(span.start, other.start), other)
        for other in others
        if other.start < span.end and other.end > span.start
        and (not span.concept or not other.concept or span.concept == other.concept)
    ]  # fmt: skip
    return max(shared, key=lambda one: one[0])[1] if shared else None


def scores(pairs: Sequence[Pair]) -> dict[str, Any]:
    """By "attribute:value": precision, recall, f1 with f1_low and f1_high, n; and mixed_accuracy of negation."""
    found: dict[str, Any] = {"spans": len(pairs), "found": sum(pair.found for pair in pairs)}
    axes: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        for name, value in pair.gold.items():
            axes[name].add(value)
    values: dict[str, Any] = {}
    for name in sorted(axes):
        of = [pair for pair in pairs if name in pair.gold]
        usual = DEFAULTS.get(name)
        for value in sorted(axes[name] - {usual or ""}):
            truth = np.array([pair.gold[name] == value for pair in of])
            said = np.array([pair.said.get(name, usual) == value for pair in of])
            values[f"{name}:{value}"] = prf(truth, said, [pair.doc_id for pair in of])
    found["values"] = values
    mixed = _mixed(pairs)
    if mixed:
        right = [pair.gold["negation"] == pair.said.get("negation", DEFAULTS["negation"]) for pair in mixed]
        found["mixed_accuracy"], found["mixed_mentions"] = round(float(np.mean(right)), 4), len(mixed)
    return found


def _mixed(pairs: Sequence[Pair]) -> list[Pair]:
    """Mentions of sentences that deny one thing and affirm another: who reads the sentence only cannot have both."""
    sentences: dict[tuple[str, int], list[Pair]] = defaultdict(list)
    for pair in pairs:
        if "negation" in pair.gold:
            sentences[pair.doc_id, pair.sentence].append(pair)
    return [pair for group in sentences.values() if len({p.gold["negation"] for p in group}) > 1 for pair in group]


def prf(truth: np.ndarray, said: np.ndarray, documents: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 with its 95% interval over documents (f1_low, f1_high), and n, how many are true."""
    f1s = _drawn_f1(truth, said, documents)
    hit, false, miss = (float(one.sum()) for one in (truth & said, said & ~truth, truth & ~said))
    low, high = np.percentile(f1s, [2.5, 97.5])
    return {
        "precision": round(hit / max(hit + false, 1), 4),
        "recall": round(hit / max(hit + miss, 1), 4),
        "f1": round(2 * hit / max(2 * hit + false + miss, 1), 4),
        "f1_low": round(float(low), 4),
        "f1_high": round(float(high), 4),
        "n": int(truth.sum()),
    }


def f1_gain(
    truth: np.ndarray, said: np.ndarray, other: np.ndarray, documents: Sequence[str]
) -> tuple[float, float, float]:
    """By how much F1 of `said` is beyond that of `other`, with its 95% interval over the same draws of documents."""
    gains = _drawn_f1(truth, said, documents) - _drawn_f1(truth, other, documents)
    value = prf(truth, said, documents)["f1"] - prf(truth, other, documents)["f1"]
    low, high = np.percentile(gains, [2.5, 97.5])
    return round(value, 4), round(float(low), 4), round(float(high), 4)


def _drawn_f1(truth: np.ndarray, said: np.ndarray, documents: Sequence[str]) -> np.ndarray:
    """[DRAWS]: F1 of draws of documents, the same ones for every system."""
    places = np.unique(documents, return_inverse=True)[1]
    size = int(places.max()) + 1
    sums = [
        np.bincount(places, weights=mask, minlength=size) for mask in (truth & said, said & ~truth, truth & ~said)
    ]  # true and false positives, false negatives of each document
    draws = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), DRAWS)
    hits, wrong, missed = (draws @ one for one in sums)
    return np.asarray(2 * hits / np.maximum(2 * hits + wrong + missed, 1))


def kappa(pairs: Sequence[Pair]) -> dict[str, float]:
    """Cohen's kappa by attribute, over the spans that both have annotated; left out where one value is all there is."""
    found = {}
    for name in sorted({name for pair in pairs for name in pair.gold}):
        both = [(pair.gold[name], pair.said[name]) for pair in pairs if name in pair.gold and name in pair.said]
        if len({value for one in both for value in one}) > 1:
            found[name] = round(float(cohen_kappa_score(*zip(*both, strict=True))), 4)
    return found


def _show(found: dict[str, Any]) -> None:
    lines = [
        [
            name,
            *(f"{100 * one[key]:.1f}" for key in ("precision", "recall")),
            f"{100 * one['f1']:.1f} [{100 * one['f1_low']:.1f}, {100 * one['f1_high']:.1f}]",
            f"{one['n']:,}",
        ]
        for name, one in found["values"].items()
    ]
    logs.table("what is said of mentions, 95% intervals over documents", ["value", "P", "R", "F1", "mentions"], lines)
    logs.say(f"{found['found']:,} of {found['spans']:,} gold mentions were found")
    if "mixed_accuracy" in found:
        logs.say(f"sentences with both: {100 * found['mixed_accuracy']:.1f}% of {found['mixed_mentions']:,} mentions")
    for name, value in found.get("kappa", {}).items():
        logs.say(f"agreement on {name}: kappa {value:.3f}")
