"""A mention as a learner sees it: words, rules and place as features, and a language model's states.

words    of the sentence on either side, near ones with their distance; of the mention; of the sentence before
rules    the cues that reach the mention (cues.py), with their distance
place    section, share of the note
kinds    all of these once more for mentions of one label: a drug is denied in other words than a symptom
states   those of a language model beside the mention, if there is one (states.py)
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import scipy.sparse as sparse
from sklearn.feature_extraction import FeatureHasher

from cluster.logs import Advance
from downstream.concepts import sections
from downstream.concepts.cues import DEFAULTS, Cues, decide
from downstream.concepts.schema import Note, Section, Span
from downstream.concepts.states import States
from downstream.concepts.tagger import SectionTagger, tag
from downstream.concepts.words import Text, windows
from downstream.metrics import Floats, Ints

BUCKETS = 1 << 18
LEFT, RIGHT = 14, 10  # words
BESIDE = 6  # words
ORDERED = 4  # the nearest, with their distance
RULE, WORD = 3.0, 1.0  # how much a feature counts beside the others: regularization is one for all
KIND = 0.6  # … of those of one label (the augmentation of Daumé III 2007, arXiv:0907.1815, a label a domain)


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


def sections_of(text: str, tagger: SectionTagger | None = None) -> list[Section]:
    """The sections of a text by its headings, and, with a tagger, of what stands before the first by its words."""
    return [Section(**one._asdict()) for one in (tag(text, tagger) if tagger else sections.find(text))]


def _mention(note: Note, text: Text, cues: Cues, span: Span, section: str | None) -> Mention:
    first, last = text.span_of(span.start, span.end)
    if first >= last:  # blanks only
        return Mention({}, dict(DEFAULTS), {}, section)
    hits = cues.of(first, last)
    rules = decide(hits, section)
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
    for axis, reaching in hits.items():
        for hit in reaching[:2]:
            found[f"cue:{axis}={hit.value}:{hit.phrase}"] = RULE / 2
            found[f"cue:{axis}={hit.value}:{'near' if hit.distance < 3 else 'far'}"] = RULE / 2
        value = rules.get(axis, reaching[0].value if reaching else "")
        found[f"rule:{axis}={value}"] = RULE
        if value != DEFAULTS.get(axis, ""):
            found[f"rule:{axis}"] = RULE / 2
    told = {axis: (hits[axis][0].start, hits[axis][0].end) for axis in DEFAULTS if hits.get(axis)}
    return Mention(found, rules, told, section)


def _hashed(rows: Iterable[dict[str, float]]) -> sparse.csr_matrix:
    """[N, BUCKETS]: features by hash, so that nothing of a note's words is kept in a model."""
    return FeatureHasher(BUCKETS, alternate_sign=False).transform(rows)


class Examples(NamedTuple):
    """Mentions as rows."""

    mentions: list[Mention]
    spans: list[Span]
    documents: np.ndarray  # of each mention
    words: sparse.csr_matrix
    kinds: sparse.csr_matrix  # the same features, each of its label
    states_NP: Floats  # P = 0 without a language model
    beside: Sequence[str] = ()  # the words on either side and of the mention, marked: what a plain linear model is told
    # By attribute and value the log-probabilities [N] of models tuned on other documents (tuned.py), if there are any.
    tuned: Mapping[str, Mapping[str, Floats]] = MappingProxyType({})

    @classmethod
    def of(cls, notes: Iterable[Note], states: States | None = None, advance: Advance | None = None) -> Examples:
        """All spans of the notes; those of one patient are one document. `advance` hears how many are done."""
        mentions: list[Mention] = []
        spans: list[Span] = []
        documents: list[str] = []
        beside: list[str] = []
        read: list[Floats] = []
        for done, note in enumerate(notes, start=1):
            if advance:
                advance(done, "")
            if not note.spans:
                continue
            text = Text(note.text)
            mentions += mentions_of(note, None, text)
            spans += note.spans
            beside += [_beside(text, span) for span in note.spans]
            documents += [note.patient_id or note.doc_id] * len(note.spans)
            if states is not None:
                read.append(states(note.text, [(span.start, span.end) for span in note.spans]))
        states_NP = np.concatenate(read) if read else np.zeros((len(spans), 0))
        return cls.seen(mentions, spans, np.array(documents), states_NP)._replace(beside=beside)

    @classmethod
    def seen(cls, mentions: list[Mention], spans: Sequence[Span], documents: np.ndarray, states_NP: Floats) -> Examples:
        """Mentions and the spans that they are of."""
        words = _hashed(mention.features for mention in mentions)
        kinds = _hashed(
            {f"{span.label}|{name}": KIND * value for name, value in mention.features.items()}
            for mention, span in zip(mentions, spans, strict=True)
        )
        return cls(mentions, list(spans), documents, words, kinds, states_NP)

    def rows(self, places: Ints) -> Examples:
        """Some of them."""
        mentions, spans = [self.mentions[i] for i in places], [self.spans[i] for i in places]
        documents, states_NP = self.documents[places], self.states_NP[places]
        beside = [self.beside[i] for i in places]
        tuned = {name: {value: one[places] for value, one in of.items()} for name, of in self.tuned.items()}
        return Examples(mentions, spans, documents, self.words[places], self.kinds[places], states_NP, beside, tuned)

    def without_states(self) -> Examples:
        """The same without a language model."""
        return self._replace(states_NP=self.states_NP[:, :0], tuned={})

    def having(self, name: str) -> Examples:
        """Those that have an attribute."""
        return self.rows(np.array([i for i, span in enumerate(self.spans) if name in span.attributes], int))


def _beside(text: Text, span: Span) -> str:
    first, last = text.span_of(span.start, span.end)
    left, right = windows(text, first, last, BESIDE)
    words = [*(f"l_{w}" for w in left[::-1]), *(f"c_{w}" for w in text.lower[first:last]), *(f"r_{w}" for w in right)]
    return " ".join(words)
