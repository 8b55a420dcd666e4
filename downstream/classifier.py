"""A note classifier: a pretrained language model that reads the whole note, detectors, pooling, one layer.

B notes, T positions, S positions of a segment, E width of the language model, D detectors, K classes.

    tokens_BT ─ segments of S with the carry ─► states_BSE ─► detectors_BSD ─ pooling over T ─► logits_BK

From ULMFiT (Howard & Ruder 2018, arXiv:1801.06146): pooling [last, max, mean] over all real positions (§3.3,
concat pooling), and gradients through the last segments of a long note while the pooling sees all of it
(BPT3C, §3.3). Unlike there, the hidden layer stands before the pooling: a detector looks for a thing at every
position and the maximum says whether it was found (Kim 2014, arXiv:1408.5882). On 430 long notes of a
synthetic hospital that was worth 0.1 AUROC (0.78 for 0.62, the latter untuned, two folds): the mean state of 900
tokens is a blur, and a hidden layer on 384 such numbers learns the training notes by heart.

Notes are padded on the right: the models are causal, so padding comes after everything that counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from cluster.config import Section
from pretrain.models.dropout import Masks

Notes = Sequence[NDArray[np.integer]]
Carry = dict[str, Tensor]


class Hidden(Protocol):
    """Hidden states [B, T, E] of the top layer, before the output dropout."""

    @property
    def raw_BTE(self) -> Tensor: ...


class Encoder(Protocol):
    """What a language model of `pretrain.models` offers, as far as it is used here."""

    width: int

    def initial_carry(self, lanes: int) -> Carry: ...

    def layer_groups(self) -> list[list[nn.Parameter]]: ...

    def __call__(self, tokens_BT: Tensor, carry: Carry, masks: Masks | None) -> tuple[Hidden, Carry]: ...


class HeadConfig(Section):
    """The layers on top of the language model, and how a note is read."""

    detectors: int = Field(64, ge=1, description="features that are looked for at every position")
    pooling: tuple[Literal["last", "max", "mean"], ...] = Field(("last", "max", "mean"), min_length=1)
    dropout: float = Field(0.5, ge=0, lt=1, description="on the pooled detectors")
    segment_tokens: int = Field(128, ge=1, description="positions read at a time")
    bptt_segments: int = Field(4, ge=1, description="segments at a note's end that gradients flow through")


class NoteClassifier(nn.Module):
    """`states`, then `score`: they are apart so that a frozen language model reads every note once."""

    def __init__(self, encoder: nn.Module, classes: int, config: HeadConfig):
        super().__init__()
        self.config, self.classes = config, classes
        self.encoder = encoder
        self.width = self._encoder.width
        self.norm = nn.LayerNorm(self.width)
        self.detectors = nn.Linear(self.width, config.detectors)
        self.output = nn.Linear(config.detectors * len(config.pooling), classes)
        nn.init.zeros_(self.output.weight)  # the first predictions are the bias alone, whatever is pooled

    @property
    def _encoder(self) -> Encoder:
        """The language model, typed as what is used of it."""
        return cast(Encoder, self.encoder)

    def states(self, tokens_BT: Tensor, lengths_B: Tensor, masks: Masks | None) -> Iterator[Tensor]:
        """States [B, S, E] of one segment after the other.

        Gradients flow through the last `bptt_segments` of the shortest note and through all that follows.
        """
        segment = self.config.segment_tokens
        graded_from = segment * max(0, -(-int(lengths_B.min()) // segment) - self.config.bptt_segments)
        carry = self._encoder.initial_carry(len(tokens_BT))
        for start in range(0, tokens_BT.shape[1], segment):
            with torch.set_grad_enabled(torch.is_grad_enabled() and start >= graded_from):
                hidden, carry = self._encoder(tokens_BT[:, start : start + segment], carry, masks)
            yield hidden.raw_BTE

    def score(self, segments: Iterable[Tensor], lengths_B: Tensor, masks: Masks | None) -> Tensor:
        """Logits [B, K] from the states of consecutive segments; positions beyond a note do not count."""
        start = 0
        last_BD = peak_BD = total_BD = torch.zeros((), device=lengths_B.device)
        for states_BSE in segments:
            found_BSD = torch.tanh(self.detectors(self.norm(states_BSE)))
            left_B1 = (lengths_B - start).unsqueeze(1)  # real positions from here on; ≤ 0: it is over
            place_S = torch.arange(states_BSE.shape[1], device=lengths_B.device)
            padding_BS1 = (place_S >= left_B1).unsqueeze(2)
            # tanh is above -1: where a whole segment is padding its maximum changes nothing.
            here_BD = found_BSD.masked_fill(padding_BS1, -1).amax(1)
            peak_BD = here_BD if start == 0 else torch.maximum(peak_BD, here_BD)
            total_BD = total_BD + found_BSD.masked_fill(padding_BS1, 0).sum(1)
            last_BD = last_BD + (found_BSD * (place_S == left_B1 - 1).unsqueeze(2)).sum(1)
            start += states_BSE.shape[1]
        pools = {"last": last_BD, "max": peak_BD, "mean": total_BD / lengths_B.unsqueeze(1)}
        pooled_BP = torch.cat([pools[name] for name in self.config.pooling], 1)
        if masks is not None:
            # Of its own strength: `masks.scale` is meant for the dropouts of the language model.
            head = Masks(masks.seed, masks.step, masks.lanes, masks.device)
            mask_B1P = head.per_lane("pooled", self.config.dropout, pooled_BP.shape[1])
            pooled_BP = pooled_BP if mask_B1P is None else pooled_BP * mask_B1P.squeeze(1)
        logits_BK: Tensor = self.output(pooled_BP)
        return logits_BK

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor, masks: Masks | None) -> Tensor:
        """Logits [B, K]."""
        return self.score(self.states(tokens_BT, lengths_B, masks), lengths_B, masks)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """From the embedding to the top layer of the language model, then the head."""
        head = [*self.norm.parameters(), *self.detectors.parameters(), *self.output.parameters()]
        return [*self._encoder.layer_groups(), head]


def padded(notes: Notes, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], lengths [B]) of notes, padded on the right with token 0."""
    lengths = [len(note) for note in notes]
    tokens_BT = np.zeros((len(notes), max(lengths)), dtype=np.int64)
    for row, note in zip(tokens_BT, notes, strict=True):
        row[: len(note)] = note
    return torch.from_numpy(tokens_BT).to(device), torch.tensor(lengths, device=device)


def batches(lengths: Sequence[int], size: int, shuffle: np.random.Generator | None) -> list[NDArray[np.int64]]:
    """Indices of batches of at most `size` notes of about the same length, so that little padding is read.

    With a generator the lengths are jittered by a quarter before sorting and the batches come in random
    order.
    """
    keys = np.asarray(lengths, dtype=np.float64)
    if shuffle is not None:
        keys = keys * shuffle.uniform(0.75, 1.25, len(keys))
    parts = np.array_split(np.argsort(keys, kind="stable"), -(-len(keys) // size))
    order = np.arange(len(parts)) if shuffle is None else shuffle.permutation(len(parts))
    return [parts[i] for i in order]
