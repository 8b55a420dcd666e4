"""Language models that learn from annotated spans themselves: what is said of each, and what it is.

    note ─► the models, both ways ─► states beside each mention (states.py) ─► 256 units ─┬─► a softmax an attribute
                                                                                          └─► one of the spans' labels

    other annotated notes, what headings say (clauses.py): one pass ─► one's own annotated notes: as many as asked

All attributes are learned at once, each from the spans that have it, as in Collobert & Weston 2008. The label is asked
for while it learns only: that a phrase is a drug, a finding or a date is most of what few notes can teach.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field
from sklearn.model_selection import GroupKFold
from torch import Tensor, nn
from torch.nn import functional

from cluster import memory
from cluster.config import Section, fingerprint
from downstream.classifier import Encoder
from downstream.concepts.features import Examples
from downstream.concepts.schema import Note, Span
from downstream.concepts.states import SEGMENT, States, tokens_at, windows_of
from downstream.metrics import Floats
from pretrain.run import Trained

TAUGHT = 256  # units
DROP, NOISE = 0.5, 0.1  # of what the head sees; tokens that stand in another's place
VALUES = 4.0  # how much a value counts beside a label
PARTS = 3  # of the documents learned from, each read by models that learned from the others
WARMUP, CLIP, TOGETHER = 0.1, 1.0, 2  # of the steps; norm of gradients; pieces a step
# A long note is learned from in pieces, with what stands before and after the mentions of each.
LONGEST, BEFORE, AFTER = 4000, 1000, 400  # characters


class TuneConfig(Section):
    """`[tune]`: the language models learn from the annotated notes."""

    epochs: int = Field(0, ge=0, description="passes over the annotated notes; 0: the models stay as they are")
    lr: float = Field(3e-4, gt=0, description="highest learning rate of the models")
    lr_head: float = Field(1e-3, gt=0, description="that of the layers on top")


Said = dict[str, dict[str, Floats]]  # by attribute and value log-probabilities [N]
Passed = Callable[[], None]


class _Piece(NamedTuple):
    read: list[tuple[Tensor, Tensor]]  # by model: tokens [1, T], edges of the windows [N, W, 2]
    truths: list[Tensor]  # by what the head says the places of the values [N], -1 where a span has none

    @property
    def spans(self) -> int:
        """How many."""
        return len(self.truths[0])


class OnTop:
    """Tuned models, the layers on top of them, and the values that these know by attribute."""

    PREFIX = "tuned"  # of its arrays

    def __init__(self, models: Sequence[Trained], head: Head, classes: Mapping[str, Sequence[str]]):
        self.states = States(models)
        self.head = head
        self.classes = {name: tuple(values) for name, values in classes.items()}

    def arrays(self) -> dict[str, Any]:
        """All of it as arrays, by names that begin with the prefix."""
        own = self.PREFIX
        found: dict[str, Any] = {f"{own}.classes": np.frombuffer(json.dumps(self.classes).encode(), np.uint8)}
        found |= {f"{own}.head.{name}": one.cpu().numpy() for name, one in self.head.state_dict().items()}
        for number, trained in enumerate(self.states.models):
            state = trained.model.state_dict()
            found |= {f"{own}.{number}.{name}": one.cpu().numpy() for name, one in state.items()}
        return found

    @classmethod
    def load(cls, arrays: Mapping[str, Any], models: Sequence[Trained]) -> Self:
        """From such arrays, and the models that were tuned. Raises KeyError, ValueError or RuntimeError for others."""
        own = cls.PREFIX
        classes: dict[str, list[str]] = json.loads(bytes(arrays[f"{own}.classes"]))
        learned = []
        for number, trained in enumerate(models):
            model = copy.deepcopy(trained.model)
            known = {name: torch.from_numpy(arrays[f"{own}.{number}.{name}"]) for name in model.state_dict()}
            model.load_state_dict(known)
            learned.append(trained.with_model(model))
        head = Head(arrays[f"{own}.head.norm.weight"].shape[0], [*map(len, classes.values())])
        head.load_state_dict({name: torch.from_numpy(arrays[f"{own}.head.{name}"]) for name in head.state_dict()})
        return cls(learned, head.to(next(learned[0].model.parameters()).device), classes)


class Learning:
    """Copies of the models and the layers on top of them while they learn."""

    def __init__(self, models: Sequence[Trained], states: int, sizes: Sequence[int], seed: str, config: TuneConfig):
        """`states` numbers of each unit of a model go into the head, which says `sizes`."""
        memory.keep_freed()
        self.models, self.config = models, config
        self.draws = torch.Generator().manual_seed(int(seed[:15], 16))
        self.device = next(models[0].model.parameters()).device
        self.encoders = nn.ModuleList(copy.deepcopy(trained.model) for trained in models).requires_grad_(True)
        self.head = Head(states * sum(one.width for one in self.encoders), sizes)  # type: ignore[misc]
        for layer in (self.head.taught, *self.head.values):
            nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=self.draws)
            nn.init.zeros_(layer.bias)
        self.head.to(self.device)
        # At a time, as they read (states.py).
        threads = max(1, torch.get_num_threads() // len(models))
        self._pool = ThreadPoolExecutor(len(models), "learning", torch.set_num_threads, (threads,))

    def add_gradients(
        self, reads: Callable[..., Tensor], given: Sequence[tuple[Any, ...]], loss_of: Callable[[list[Tensor]], Tensor]
    ) -> None:
        """Those of the loss of what the head says, where every model `reads` what it is given: [N, its numbers]."""
        read = [*self._pool.map(lambda encoder, one: reads(encoder, *one), self.encoders, given)]
        seen_NP = torch.cat([one.detach() for one in read], 1).requires_grad_()
        loss_of(self.head(seen_NP, self.drop)).backward()  # type: ignore[no-untyped-call]
        assert seen_NP.grad is not None
        parts = seen_NP.grad.split([one.shape[1] for one in read], 1)
        list(self._pool.map(Tensor.backward, read, parts))

    def steps(self, total: int) -> Callable[[], None]:
        """What takes a step with the gradients at hand: of so many, whose rate rises and falls."""
        groups = [(self.encoders, self.config.lr), (self.head, self.config.lr_head)]
        optimizer = torch.optim.AdamW([{"params": one.parameters(), "lr": lr} for one, lr in groups], weight_decay=0.01)
        rate = lambda step: min((step + 1) / (WARMUP * total), (total - step) / ((1 - WARMUP) * total))  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

        def step() -> None:
            nn.utils.clip_grad_norm_([*self.encoders.parameters(), *self.head.parameters()], CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def drop(self, x: Tensor) -> Tensor:
        """What the head sees of it."""
        return x * (torch.rand(x.shape, generator=self.draws) >= DROP).to(self.device) / (1 - DROP)

    def learned(self) -> list[Trained]:
        """The models as they are now."""
        return [
            trained.with_model(encoder.requires_grad_(False))
            for trained, encoder in zip(self.models, self.encoders, strict=True)
        ]


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
        step = learning.steps(config.epochs * -(-len(pieces) // TOGETHER))
        for _ in range(config.epochs):
            order = torch.randperm(len(pieces), generator=learning.draws).tolist()
            for first in range(0, len(order), TOGETHER):
                together = [pieces[place] for place in order[first : first + TOGETHER]]
                spans_together = sum(piece.spans for piece in together)
                for piece in together:
                    given = [_noisy(learning, *read) for read in piece.read]
                    loss_of = partial(_loss, piece.truths, len(classes), spans_together)
                    learning.add_gradients(_means, given, loss_of)
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


class Head(nn.Module):
    """From the states beside mentions to scores of the values of each attribute."""

    def __init__(self, width: int, sizes: Sequence[int]):
        super().__init__()
        self.norm, self.taught = nn.LayerNorm(width), nn.Linear(width, TAUGHT)
        self.values = nn.ModuleList(nn.Linear(TAUGHT, size) for size in sizes)

    def forward(self, states_NP: Tensor, drop: Callable[[Tensor], Tensor]) -> list[Tensor]:
        taught_ND = drop(functional.relu(self.taught(drop(self.norm(states_NP)))))
        return [one(taught_ND) for one in self.values]


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
        read.append((torch.from_numpy(tokens_T.astype(np.int64))[None], windows_NW2))
    place_of = lambda known, value: known.index(value) if value in known else -1  # noqa: E731
    truths = [[place_of(known, span.attributes.get(name)) for span in spans] for name, known in classes.items()]
    if labels:
        truths.append([labels.index(span.label) for span in spans])
    return _Piece(read, [*map(torch.tensor, truths)])


def _noisy(learning: Learning, tokens_1T: Tensor, windows_NW2: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the tokens stand in another's place."""
    others_1T = tokens_1T[:, torch.randperm(tokens_1T.shape[1], generator=learning.draws)]
    noisy_1T = torch.where(torch.rand(tokens_1T.shape, generator=learning.draws) < NOISE, others_1T, tokens_1T)
    return noisy_1T.to(learning.device), windows_NW2.to(learning.device)


def _loss(truths: list[Tensor], attributes: int, spans: int, said: list[Tensor]) -> Tensor:
    """Of a piece, of whose step so many spans are; what is said beyond the attributes counts as a label."""
    losses = [
        functional.cross_entropy(logits_NK, truth_N.to(logits_NK.device), ignore_index=-1, reduction="sum")
        for truth_N, logits_NK in zip(truths, said, strict=True)
    ]
    counts = [VALUES] * attributes + [1.0] * (len(losses) - attributes)
    return torch.stack(losses) @ torch.tensor(counts, device=losses[0].device) / spans


def _means(encoder: Encoder, tokens_1T: Tensor, windows_NW2: Tensor) -> Tensor:
    """[N, W·E]: the states over each window, as states.py reads them, with gradients within each segment."""
    carry = encoder.initial_carry(1)
    hidden = []
    for segment_1S in tokens_1T.split(SEGMENT, 1):
        states, carry = encoder(segment_1S, carry, None)
        hidden.append(states.raw_BTE[0])
    sums_TE = functional.pad(torch.cat(hidden).cumsum(0), (0, 0, 1, 0))
    first_NW, last_NW = windows_NW2.unbind(-1)
    return ((sums_TE[last_NW] - sums_TE[first_NW]) / (last_NW - first_NW)[..., None]).flatten(1)


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
