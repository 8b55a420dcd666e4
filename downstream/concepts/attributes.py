"""What is said of a mention, learned: one logistic regression for each attribute, on words, rules and place.

    words    of the sentence on either side, near ones with their distance; of the mention; of the sentence before
    rules    the cues that reach the mention (cues.py), with their distance
    place    section, share of the note

Attributes are learned from the spans that have them, so that corpora that label other things train together. With few
labels the rules carry it; with many the words correct them.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sparse
from sklearn.feature_extraction import FeatureHasher
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold

from downstream.concepts import sections
from downstream.concepts.cues import DEFAULTS, Cues, decide
from downstream.concepts.schema import Note, Section, Span
from downstream.concepts.words import Text, windows
from downstream.metrics import Floats

BUCKETS = 1 << 18
LEFT, RIGHT = 14, 10  # words
ORDERED = 4  # the nearest, with their distance
C = 1.0  # inverse regularization
PARTS = 4  # of documents, for the offsets
OFFSETS = np.linspace(-2, 4, 25)
RULE, WORD = 3.0, 1.0  # how much a feature counts beside the others: regularization is one for all


class Mention(NamedTuple):
    """A span as a learner sees it."""

    features: dict[str, float]
    rules: dict[str, str]
    cues: dict[str, tuple[int, int]]
    section: str | None


def mentions_of(note: Note, spans: Sequence[Span] | None = None, text: Text | None = None) -> list[Mention]:
    """The features of the spans of a note (all, if none are given), in their order. A span that does not say in which
    section it is is looked up, so that what is learned from and what is read are seen alike.
    """
    text = text or Text(note.text)
    cues = Cues(text)
    found = note.sections or sections_of(note.text)
    starts = [section.start for section in found]
    mentions = []
    for span in note.spans if spans is None else spans:
        place = bisect.bisect_right(starts, span.start) - 1
        within = found[place].label if place >= 0 and span.start < found[place].end else None
        mentions.append(_mention(note, text, cues, span, span.section or within))
    return mentions


def sections_of(text: str) -> list[Section]:
    """The sections of a text by its headings."""
    return [Section(**section._asdict()) for section in sections.find(text)]


def _mention(note: Note, text: Text, cues: Cues, span: Span, section: str | None) -> Mention:
    first, last = text.span_of(span.start, span.end)
    if first >= last:  # blanks only
        return Mention({}, dict(DEFAULTS), {}, section)
    hits = cues.of(first, last)
    rules = decide(hits, section)
    # Its label is no feature: in some corpora (MACCROBAT's History) that is the answer.
    found: dict[str, float] = {f"section={section}": WORD}
    left, right = windows(text, first, last, LEFT)[0], windows(text, first, last, RIGHT)[1]
    for side, words in (("l", left), ("r", right)):
        for i, word in enumerate(words):
            found[f"{side}:{word}"] = max(found.get(f"{side}:{word}", 0.0), WORD if i < 6 else 0.6 * WORD)
            if i < ORDERED:
                found[f"{side}{i}:{word}"] = WORD
            if i:
                found[f"{side}:{words[i - 1]}_{word}"] = WORD if i < 6 else 0.6 * WORD
    if not left:
        found["begins"] = WORD
    inside = text.lower[first:last]
    for word in inside:
        found[f"c:{word}"] = WORD
        found[f"c<{word[:4]}"] = found[f"c>{word[-4:]}"] = WORD / 2
    found["c0:" + inside[0]] = found["c:" + "_".join(inside)] = WORD
    found[f"words={min(last - first, 8)}"] = WORD
    begin, end = text.sentence(first)
    found[f"sentence={min(bisect.bisect_right(text.sentences, first), 8)}"] = WORD
    for word in dict.fromkeys(text.lower[begin:end]):
        found[f"all:{word}"] = 0.3 * WORD
    for word in text.lower[begin : begin + 3]:
        found[f"s:{word}"] = WORD
    for word in text.lower[max(0, begin - 12) : begin]:
        found[f"p:{word}"] = 0.3 * WORD
    share = span.start / len(note.text)
    found[f"place={int(5 * share)}"] = WORD
    for axis, default in DEFAULTS.items():
        value = rules[axis]
        found[f"rule:{axis}={value}"] = RULE
        for hit in hits.get(axis, ())[:2]:
            found[f"cue:{axis}={hit.value}:{hit.phrase}"] = RULE / 2
            found[f"cue:{axis}={hit.value}:{'near' if hit.distance < 3 else 'far'}"] = RULE / 2
        if value != default:
            found[f"rule:{axis}"] = RULE / 2
    told = {axis: (hits[axis][0].start, hits[axis][0].end) for axis in DEFAULTS if hits.get(axis)}
    return Mention(found, rules, told, section)


def matrix(mentions: Iterable[Mention]) -> sparse.csr_matrix:
    """[N, BUCKETS]: features by hash, so that nothing of a note's words is kept in a model."""
    hasher = FeatureHasher(BUCKETS, alternate_sign=False)
    return hasher.transform([mention.features for mention in mentions])


class Attribute(NamedTuple):
    """A learned attribute: classes, and a weight per bucket and class (two classes: of the second). `offsets_K` are
    added to log-probabilities before one is chosen: rare values, as "uncertain", are never likelier than not.
    """

    classes: tuple[str, ...]
    weights_PK: Floats
    bias_K: Floats
    offsets_K: Floats

    @classmethod
    def fit(cls, features: sparse.csr_matrix, values: Sequence[str], groups: Sequence[str], c: float = C) -> Attribute:
        """Learned from one value a row, of at least two. Offsets are those of the best macro-F1 on rows of groups
        (documents) that were left out in turn.
        """
        truth = np.array(values)
        learned = _regression(features, truth, c)
        classes = learned.classes_
        log_NK, seen = np.zeros((len(truth), len(classes))), np.zeros(len(truth), bool)
        if len(set(groups)) >= PARTS:
            for rows, held in GroupKFold(PARTS).split(truth, truth, groups):
                if len(set(truth[rows])) == len(classes):
                    log_NK[held] = _regression(features[rows], truth[rows], c).predict_log_proba(features[held])
                    seen[held] = True
        offsets_K = _offsets(np.maximum(log_NK[seen], -20), np.searchsorted(classes, truth[seen]))
        return cls(tuple(map(str, classes)), learned.coef_.T, learned.intercept_, offsets_K)

    def probabilities(self, features: sparse.csr_matrix) -> Floats:
        """[N, classes]."""
        scores = np.asarray(features @ self.weights_PK + self.bias_K)
        if len(self.classes) == 2:
            positive = 1 / (1 + np.exp(-scores[:, :1]))
            return np.concatenate([1 - positive, positive], 1)
        scores -= scores.max(1, keepdims=True)
        powers = np.exp(scores)
        return np.asarray(powers / powers.sum(1, keepdims=True))


def _regression(features: sparse.csr_matrix, truth: np.ndarray, c: float) -> LogisticRegression:
    used = {"solver": "liblinear"} if len(set(truth)) == 2 else {}  # ten times as fast, of two classes only
    return LogisticRegression(C=c, max_iter=400, **used).fit(features, truth)


def _offsets(log_NK: Floats, truth_N: np.ndarray) -> Floats:
    """For every class but the most frequent one what brings most macro-F1, one class after the other."""
    offsets_K = np.zeros(log_NK.shape[1])
    if not len(truth_N):
        return offsets_K
    usual = int(np.bincount(truth_N, minlength=len(offsets_K)).argmax())
    for k in range(len(offsets_K)):
        if k == usual:
            continue
        tried = []
        for step in OFFSETS:
            offsets_K[k] = step
            said_N = (log_NK + offsets_K).argmax(1)
            tried.append(f1_score(truth_N, said_N, average="macro", zero_division=0.0))
        # a plateau's middle: its edges are chance
        best = np.flatnonzero(np.array(tried) >= max(tried) - 1e-9)
        offsets_K[k] = OFFSETS[best[len(best) // 2]]
    return offsets_K


class Attributes:
    """Learned attributes by name."""

    def __init__(self, learned: dict[str, Attribute]):
        self.learned = learned

    @classmethod
    def fit(cls, notes: Sequence[Note], c: float = C) -> Attributes:
        """From the spans of annotated notes; an attribute of which only one value occurs is left to the rules."""
        mentions: list[Mention] = []
        spans: list[Span] = []
        for note in notes:
            mentions += mentions_of(note)
            spans += note.spans
        features = matrix(mentions)
        found = {}
        groups = [note.doc_id for note in notes for _ in note.spans]
        for name in sorted({name for span in spans for name in span.attributes}):
            rows = [i for i, span in enumerate(spans) if name in span.attributes]
            values = [spans[i].attributes[name] for i in rows]
            if len(set(values)) > 1:
                found[name] = Attribute.fit(features[rows], values, [groups[i] for i in rows], c)
        return cls(found)

    def __call__(self, mentions: Sequence[Mention]) -> list[tuple[dict[str, str], dict[str, float]]]:
        """For every mention its values and their probabilities; what was not learned is what the rules say."""
        said = [(dict(mention.rules), dict[str, float]()) for mention in mentions]
        if not mentions or not self.learned:
            return said
        features = matrix(mentions)
        for name, attribute in self.learned.items():
            for (values, scores), p in zip(said, attribute.probabilities(features), strict=True):
                best = int((np.log(np.maximum(p, 1e-9)) + attribute.offsets_K).argmax())
                values[name], scores[name] = attribute.classes[best], round(float(p[best]), 4)
        return said

    def arrays(self) -> dict[str, Any]:
        """All of it as arrays: only the buckets that weigh anything are kept."""
        found: dict[str, Any] = {"names": np.frombuffer(json.dumps(sorted(self.learned)).encode(), np.uint8)}
        for name, attribute in self.learned.items():
            rows = np.flatnonzero(np.abs(attribute.weights_PK).max(1) > 1e-9)
            found[f"{name}.classes"] = np.frombuffer(json.dumps(attribute.classes).encode(), np.uint8)
            found[f"{name}.rows"], found[f"{name}.bias"] = rows, attribute.bias_K
            found[f"{name}.offsets"] = attribute.offsets_K
            found[f"{name}.weights"] = attribute.weights_PK[rows].astype(np.float32)
        return found

    @classmethod
    def of(cls, arrays: Any) -> Attributes:
        """The learned attributes of such arrays."""
        found = {}
        for name in json.loads(bytes(arrays["names"])):
            weights = np.zeros((BUCKETS, arrays[f"{name}.weights"].shape[1]))
            weights[arrays[f"{name}.rows"]] = arrays[f"{name}.weights"]
            classes = tuple(json.loads(bytes(arrays[f"{name}.classes"])))
            found[name] = Attribute(classes, weights, arrays[f"{name}.bias"], arrays[f"{name}.offsets"])
        return cls(found)
