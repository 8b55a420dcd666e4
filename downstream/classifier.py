"""A note classifier: a pretrained language model that reads the whole note, a pooling, a small head.

B notes, T positions, S positions of a segment, E width of the language model, K classes.

    tokens_BT ─ segments of S with the carry ─► raw_BTE ─ concat pooling ─► pooled [B, 3E] ─ head ─► logits_BK

Howard & Ruder 2018 (ULMFiT, arXiv:1801.06146): concat pooling [last, max, mean] over all positions and a head with batch
normalization, dropout and one hidden layer of 50 (§3.3), backpropagation through the last segments of a long note while
max and mean see all of it (BPT3C, §3.3). Notes are padded on the right: the models are causal, so padding comes after
everything that counts and is left out of the pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

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
    """The head on the pooled states, and how a note is read."""

    hidden: int = Field(50, ge=1, description="width of the hidden layer (ULMFiT §3.3)")
    drop_pooled: float = Field(0.4, ge=0, lt=1, description="dropout on the pooled states")
    drop_hidden: float = Field(0.1, ge=0, lt=1, description="dropout on the hidden layer")
    segment_tokens: int = Field(128, ge=1, description="positions read at a time")
    bptt_segments: int = Field(4, ge=1, description="segments at a note's end that gradients flow through")


class NoteClassifier(nn.Module):
    """`read` then `head`; the two are apart so that a frozen language model reads every note once."""

    def __init__(self, encoder: nn.Module, classes: int, config: HeadConfig):
        super().__init__()
        self.config, self.classes = config, classes
        self.encoder = encoder
        pooled = 3 * self._encoder.width
        self.norm_pooled = nn.BatchNorm1d(pooled)
        self.linear_hidden = nn.Linear(pooled, config.hidden)
        self.norm_hidden = nn.BatchNorm1d(config.hidden)
        self.linear_classes = nn.Linear(config.hidden, classes)

    @property
    def _encoder(self) -> Encoder:
        """The language model, typed as what is used of it."""
        return cast(Encoder, self.encoder)

    def read(self, tokens_BT: Tensor, lengths_B: Tensor, masks: Masks | None) -> Tensor:
        """Pooled states [B, 3E]. Gradients flow through the last `bptt_segments` of the shortest note and all after."""
        encoder = self._encoder
        segment = self.config.segment_tokens
        graded_from = segment * max(0, -(-int(lengths_B.min()) // segment) - self.config.bptt_segments)
        carry = encoder.initial_carry(len(tokens_BT))
        total_BE = torch.zeros(len(tokens_BT), encoder.width, device=tokens_BT.device)
        last_BE, peak_BE = total_BE, torch.full_like(total_BE, -torch.inf)
        for start in range(0, tokens_BT.shape[1], segment):
            with torch.set_grad_enabled(torch.is_grad_enabled() and start >= graded_from):
                hidden, carry = encoder(tokens_BT[:, start : start + segment], carry, masks)
                raw_BSE = hidden.raw_BTE
                left_B1 = (lengths_B - start).unsqueeze(
                    1
                )  # real positions from here on; ≤ 0 where the note is over
                place_S = torch.arange(raw_BSE.shape[1], device=tokens_BT.device)
                padding_BS1 = (place_S >= left_B1).unsqueeze(2)
                total_BE = total_BE + raw_BSE.masked_fill(padding_BS1, 0).sum(1)
                peak_BE = torch.maximum(peak_BE, raw_BSE.masked_fill(padding_BS1, -torch.inf).amax(1))
                end_BS1 = (place_S == left_B1 - 1).unsqueeze(2)
                last_BE = last_BE + (raw_BSE * end_BS1).sum(1)
        return torch.cat([last_BE, peak_BE, total_BE / lengths_B.unsqueeze(1)], 1)

    def head(self, pooled_BP: Tensor, masks: Masks | None) -> Tensor:
        """Logits [B, K] from pooled states [B, 3E]."""
        x_BP = _dropped(self.norm_pooled(pooled_BP), masks, "pooled", self.config.drop_pooled)
        x_BH = torch.relu(self.linear_hidden(x_BP))
        x_BH = _dropped(self.norm_hidden(x_BH), masks, "hidden", self.config.drop_hidden)
        logits_BK: Tensor = self.linear_classes(x_BH)
        return logits_BK

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor, masks: Masks | None) -> Tensor:
        """Logits [B, K]."""
        return self.head(self.read(tokens_BT, lengths_B, masks), masks)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """From the embedding to the top layer of the language model, then the head."""
        parts = [self.norm_pooled, self.linear_hidden, self.norm_hidden, self.linear_classes]
        return [
            *self._encoder.layer_groups(),
            [parameter for part in parts for parameter in part.parameters()],
        ]


def _dropped(x_BD: Tensor, masks: Masks | None, name: str, p: float) -> Tensor:
    mask_B1D = None if masks is None else masks.per_lane(f"head-{name}", p, x_BD.shape[1])
    return x_BD if mask_B1D is None else x_BD * mask_B1D.squeeze(1)


def padded(notes: Notes, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], lengths [B]) of notes, padded on the right with token 0."""
    lengths = [len(note) for note in notes]
    tokens_BT = np.zeros((len(notes), max(lengths)), dtype=np.int64)
    for row, note in zip(tokens_BT, notes, strict=True):
        row[: len(note)] = note
    return torch.from_numpy(tokens_BT).to(device), torch.tensor(lengths, device=device)


def batches(
    lengths: Sequence[int], size: int, shuffle: np.random.Generator | None
) -> list[NDArray[np.int64]]:
    """Indices of batches of at most `size` notes of about the same length, so that little padding is read.

    With a generator the lengths are jittered by a quarter before sorting and the batches come in random order. Sizes
    differ by one at most: a last batch of one note would break batch normalization.
    """
    keys = np.asarray(lengths, dtype=np.float64)
    if shuffle is not None:
        keys = keys * shuffle.uniform(0.75, 1.25, len(keys))
    parts = np.array_split(np.argsort(keys, kind="stable"), -(-len(keys) // size))
    order = np.arange(len(parts)) if shuffle is None else shuffle.permutation(len(parts))
    return [parts[i] for i in order]
