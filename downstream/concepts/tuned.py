"""Language models that learn from annotated spans themselves: what is said of each, and what it is.

    note ─► the models, both ways ─► states beside each mention (states.py) ─► 256 units ─┬─► a softmax an attribute
                                                                                          └─► one of the spans' labels

    other annotated notes, what headings say (clauses.py): one pass ─► one's own annotated notes: as many as asked

All attributes are learned at once, each from the spans that have it, as in Collobert & Weston 2008. The label is asked
for while it learns only: that a phrase is a drug, a finding or a date is most of what few notes can teach.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import GroupKFold
from torch import Tensor, nn
from torch.nn import functional

from cluster.config import fingerprint
from downstream.classifier import Encoder
from downstream.concepts.features import Examples
from downstream.concepts.learning import Head, Learning, OnTop, Passed, TuneConfig, batches, noisy
from downstream.concepts.schema import Note, Span
from downstream.concepts.states import SEGMENT, tokens_at, windows_of
from downstream.metrics import Floats
from pretrain.run import Trained

VALUES = 4.0  # how much a value counts beside a label
PARTS = 3  # of the documents learned from, each read by models that learned from the others
TOGETHER = 2  # pieces a step
# A long note is learned from in pieces, with what stands before and after the mentions of each.
LONGEST, BEFORE, AFTER = 4000, 1000, 400  # characters

Said = dict[str, dict[str, Floats]]  # by attribute and value log-probabilities [N]


class _Piece(NamedTuple):
    read: list[tuple[Tensor, Tensor]]  # by model: tokens [T], edges of the windows [N, W, 2]
    truths: list[Tensor]  # by what the head says the places of the values [N], -1 where a span has none


class Tuned(OnTop):
    """Models that learned from annotated spans."""

    @classmethod
    def fit(
        cls,
        models: Sequence[Trained],
        notes: Sequence[Note],
        classes: Mapping[str, list[str]],
        labels: list[str],
        config: TuneConfig,
        passed: Passed,
        head: Head | None = None,
    ) -> Tuned:
        """Learned from the spans of the notes: the values given by attribute, and the labels where any are; the same
        notes in the same order give the same. `passed` is called after each pass over them. `head` is what the models
        were tuned with before, if they were.
        """
        known = [*classes.values(), *([labels] if labels else [])]
        sizes, seed = [*map(len, known)], fingerprint([note.doc_id for note in notes])
        learning = Learning(models, len(windows_of(1, (0, 1))), sizes, seed, config)
        if head:
            learning.head.load_state_dict(head.state_dict(), strict=False)  # it has no labels
        pieces = [_piece(models, *cut, classes, labels) for note in notes for cut in _cuts(note)]
        lengths_N = torch.tensor([len(piece.read[0][0]) for piece in pieces])
        step = learning.steps(config.epochs * -(-len(pieces) // TOGETHER))
        for _ in range(config.epochs):
            for rows in batches(lengths_N, TOGETHER, learning.draws):
                read = [zip(*(pieces[row].read[number] for row in rows), strict=True) for number in range(len(models))]
                given = [([noisy(one, learning.draws) for one in tokens], windows) for tokens, windows in read]
                truths = [torch.cat(parts) for parts in zip(*(pieces[row].truths for row in rows), strict=True)]
                learning.add_gradients(_means, given, partial(_loss, truths, len(classes)))
                step()
            passed()
        learning.head.values = learning.head.values[: len(classes)]
        return cls(learning.learned(), learning.head, classes)

    @torch.no_grad()
    def __call__(self, text: str, spans: Sequence[tuple[int, int]]) -> Said:
        """What the attributes of the spans of a note are."""
        device = next(self.head.parameters()).device
        states_NP = torch.from_numpy(self.states(text, spans)).float().to(device)
        said: Said = {}
        for (name, values), logits_NK in zip(self.classes.items(), self.head(states_NP, lambda x: x), strict=True):
            logs_NK = logits_NK.log_softmax(1).double().cpu().numpy()
            said[name] = dict(zip(values, logs_NK.T, strict=True))
        return said

    def of(self, notes: Sequence[Note]) -> Said:
        """The same of all spans of the notes, one after the other."""
        said = [self(note.text, [(span.start, span.end) for span in note.spans]) for note in notes if note.spans]
        return {
            name: {value: np.concatenate([one[name][value] for one in said]) for value in values}
            for name, values in self.classes.items()
        }


def _cuts(note: Note) -> Iterator[tuple[str, list[Span]]]:
    """Pieces of a note with their spans, whose places are those in the piece."""
    spans = sorted(note.spans, key=lambda span: span.start)
    while spans:
        count = next((i for i, span in enumerate(spans) if span.end - spans[0].start > LONGEST), len(spans)) or 1
        group, spans = spans[:count], spans[count:]
        begin = max(0, note.text.rfind(" ", 0, max(0, group[0].start - BEFORE)))
        end = note.text.find(" ", max(span.end for span in group) + AFTER)
        places = [{"start": span.start - begin, "end": span.end - begin} for span in group]
        yield (
            note.text[begin : None if end < 0 else end],
            [span.model_copy(update=place) for span, place in zip(group, places, strict=True)],
        )


def _piece(
    models: Sequence[Trained], text: str, spans: Sequence[Span], classes: Mapping[str, list[str]], labels: list[str]
) -> _Piece:
    read = []
    for trained in models:
        tokens_T, places = tokens_at(trained, text, [(span.start, span.end) for span in spans])
        windows_NW2 = torch.tensor([windows_of(len(tokens_T), place) for place in places])
        read.append((torch.from_numpy(tokens_T.astype(np.int64)), windows_NW2))
    place_of = lambda known, value: known.index(value) if value in known else -1  # noqa: E731
    truths = [[place_of(known, span.attributes.get(name)) for span in spans] for name, known in classes.items()]
    if labels:
        truths.append([labels.index(span.label) for span in spans])
    return _Piece(read, [*map(torch.tensor, truths)])


def _loss(truths: list[Tensor], attributes: int, said: list[Tensor]) -> Tensor:
    """Mean over spans; what is said beyond the attributes counts as a label."""
    losses = [
        functional.cross_entropy(logits_NK, truth_N.to(logits_NK.device), ignore_index=-1, reduction="sum")
        for truth_N, logits_NK in zip(truths, said, strict=True)
    ]
    counts = [VALUES] * attributes + [1.0] * (len(losses) - attributes)
    return torch.stack(losses) @ torch.tensor(counts, device=losses[0].device) / len(truths[0])


def _means(encoder: Encoder, tokens: list[Tensor], windows: list[Tensor]) -> Tensor:
    """[N, W·E]: the states over each window of the pieces, as states.py reads them; gradients stay within a segment."""
    device = next(encoder.parameters()).device  # type: ignore[attr-defined]
    tokens_BT = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)
    carry = encoder.initial_carry(len(tokens))
    hidden = []
    for segment_BS in tokens_BT.split(SEGMENT, 1):
        states, carry = encoder(segment_BS, carry, None)
        hidden.append(states.raw_BTE)
    found = []
    for sums_TE, windows_NW2 in zip(torch.cat(hidden, 1).cumsum(1), windows, strict=True):
        first_NW, last_NW = windows_NW2.to(device).unbind(-1)
        from_start_TE = functional.pad(sums_TE, (0, 0, 1, 0))
        found.append((from_start_TE[last_NW] - from_start_TE[first_NW]) / (last_NW - first_NW)[..., None])
    return torch.cat(found).flatten(1)


class Tuner:
    """Tunes models on some of the annotated notes, after one pass over others, and reads the rest with them."""

    def __init__(
        self,
        models: Sequence[Trained],
        notes: Sequence[Note],
        config: TuneConfig,
        others: Sequence[Note] = (),
        passed: Passed = lambda: None,
    ):
        """`passed` is called after each pass over any notes."""
        self.models, self.config, self.passed = models, config, passed
        self.notes = [note for note in notes if note.spans]
        spans = [span for note in notes for span in note.spans]
        self.classes: dict[str, list[str]] = {}
        for name in sorted({name for span in spans for name in span.attributes}):
            self.classes[name] = sorted({span.attributes[name] for span in spans if name in span.attributes})
        self.labels = sorted({span.label for span in spans})
        tells = lambda span: any(span.attributes.get(name) in known for name, known in self.classes.items())  # noqa: E731
        told = [note.model_copy(update={"spans": [*filter(tells, note.spans)]}) for note in others]
        self.others = [note for note in told if note.spans]

    @cached_property
    def begun(self) -> Tuned | None:
        """What all begin from: learned from the others, whose labels are not those of these notes."""
        if not self.others:
            return None
        once = self.config.model_copy(update={"epochs": 1})
        return Tuned.fit(self.models, self.others, self.classes, [], once, self.passed)

    def fit(self, documents: Iterable[str]) -> Tuned:
        """Learned from the notes of some documents (patients)."""
        notes, begun = self._of(documents), self.begun
        models, head = (begun.states.models, begun.head) if begun else (self.models, None)
        return Tuned.fit(models, notes, self.classes, self.labels, self.config, self.passed, head)

    def read(self, tuned: Tuned, asked: Examples) -> Examples:
        """Mentions with what a tuned model says of them: all of their documents, in the order of the notes."""
        return asked._replace(tuned=tuned.of(self._of(asked.documents)))

    def crossed(self, known: Examples) -> Examples:
        """The same, each document read by models that were tuned on others of these."""
        said: Said = {name: {value: np.zeros(len(known.spans)) for value in of} for name, of in self.classes.items()}
        parts = GroupKFold(min(PARTS, len(set(known.documents))))
        for rows, held in parts.split(known.documents, groups=known.documents):
            read = self.read(self.fit(known.documents[rows]), known.rows(held))
            for name, values in read.tuned.items():
                for value, logs_N in values.items():
                    said[name][value][held] = logs_N
        return known._replace(tuned=said)

    def _of(self, documents: Iterable[str]) -> list[Note]:
        chosen = set(documents)
        return [note for note in self.notes if (note.patient_id or note.doc_id) in chosen]
