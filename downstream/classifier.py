"""A note classifier: a pretrained language model that reads the whole note, detectors, pooling, one layer.

B notes, T positions, S positions of a segment, E width of the language model, D detectors, K classes.

    tokens_BT ─ segments of S with the carry ─► states_BSE ─► detectors_BSD ─ pooling over T ─► logits_BK

Where a task asks about something ("zoster"), the note is pooled near its mentions only, and one pool is an attention
that the question steers: `α = softmax(q·k_t/√A + b·[t is of a mention])`, q from the model's own reading of the
question. What α says is what `./launch.sh explain` draws.

From ULMFiT (Howard & Ruder 2018, arXiv:1801.06146): pooling [last, max, mean] over all real positions (§3.3,
concat pooling), and gradients through the last segments of a long note while the pooling sees all of it
(BPT3C, §3.3). Unlike there, the hidden layer stands before the pooling: a detector looks for a thing at every
position and the maximum says whether it was found (Kim 2014, arXiv:1408.5882). On 430 long notes of a
synthetic hospital that was worth 0.1 AUROC (0.78 for 0.62, the latter untuned, two folds): the mean state of 900
tokens is a blur, and a hidden layer on 384 such numbers learns the training notes by heart.

Notes are padded on the right: the models are causal, so padding comes after everything that counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from cluster.config import Section
from downstream.reading import Note
from pretrain.models.dropout import Masks

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
    pooling: tuple[Literal["last", "max", "mean", "attention"], ...] = Field(("last", "max", "mean"), min_length=1)
    dropout: float = Field(0.5, ge=0, lt=1, description="on the pooled detectors")
    keys: int = Field(32, ge=1, description="A, width of the attention")
    look: float = Field(0.1, ge=0, description="how strongly attention is drawn to the mentions while it learns")
    segment_tokens: int = Field(128, ge=1, description="positions read at a time")
    bptt_segments: int = Field(4, ge=1, description="segments at a note's end that gradients flow through")


class Batch(NamedTuple):
    """Notes padded on the right with token 0."""

    tokens_BT: Tensor
    lengths_B: Tensor
    pooled_BT: Tensor  # bool: real positions; where a note has mentions, those near them
    mention_BT: Tensor  # bool
    query_BQ: Tensor | None  # the question as tokens, padded; None where nothing is asked
    query_lengths_B: Tensor | None


class Scored(NamedTuple):
    """Logits [B, K]; the attention's share on the mentions [B], 1 where there are none."""

    logits_BK: Tensor
    on_mentions_B: Tensor


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
        if "attention" in config.pooling:
            self.key = nn.Linear(self.width, config.keys)
            self.question = nn.Sequential(
                nn.Linear(self.width, config.keys), nn.Tanh(), nn.Linear(config.keys, config.keys)
            )
            self.unasked = nn.Parameter(torch.zeros(config.keys))  # the question of a task that asks about nothing
            self.at_mention = nn.Parameter(torch.tensor(4.0))  # b: it begins by looking there, and may unlearn it

    @property
    def _encoder(self) -> Encoder:
        """The language model, typed as what is used of it."""
        return cast(Encoder, self.encoder)

    def states(self, batch: Batch, masks: Masks | None) -> Iterator[Tensor]:
        """States [B, S, E] of one segment after the other.

        Gradients flow through the last `bptt_segments` of the shortest note and through all that follows.
        """
        tokens_BT, segment = batch.tokens_BT, self.config.segment_tokens
        graded_from = segment * max(0, -(-int(batch.lengths_B.min()) // segment) - self.config.bptt_segments)
        carry = self._encoder.initial_carry(len(tokens_BT))
        for start in range(0, tokens_BT.shape[1], segment):
            with torch.set_grad_enabled(torch.is_grad_enabled() and start >= graded_from):
                hidden, carry = self._encoder(tokens_BT[:, start : start + segment], carry, masks)
            yield hidden.raw_BTE

    def score(self, segments: Iterable[Tensor], batch: Batch, masks: Masks | None) -> Scored:
        """Logits [B, K] from the states of consecutive segments; only positions of `pooled_BT` count."""
        start = 0
        last_BD = peak_BD = total_BD = torch.zeros((), device=batch.lengths_B.device)
        place_T = torch.arange(batch.tokens_BT.shape[1], device=batch.lengths_B.device)
        last_B1 = torch.where(batch.pooled_BT, place_T, -1).amax(1, keepdim=True)
        attends = "attention" in self.config.pooling
        kept: list[Tensor] = []
        scores: list[Tensor] = []
        for states_BSE in segments:
            normed_BSE = self.norm(states_BSE)
            found_BSD = torch.tanh(self.detectors(normed_BSE))
            here = slice(start, start + states_BSE.shape[1])
            out_BS1 = ~batch.pooled_BT[:, here].unsqueeze(2)
            # tanh is above -1: where a whole segment does not count its maximum changes nothing.
            here_BD = found_BSD.masked_fill(out_BS1, -1).amax(1)
            peak_BD = here_BD if start == 0 else torch.maximum(peak_BD, here_BD)
            total_BD = total_BD + found_BSD.masked_fill(out_BS1, 0).sum(1)
            last_BD = last_BD + (found_BSD * (place_T[here] == last_B1).unsqueeze(2)).sum(1)
            if attends:
                kept.append(found_BSD)
                scores.append(self.key(normed_BSE))
            start += states_BSE.shape[1]
        pools = {"last": last_BD, "max": peak_BD, "mean": total_BD / batch.pooled_BT.sum(1, keepdim=True)}
        on_mentions_B = last_BD.new_ones(len(batch.lengths_B))
        if attends:
            weight_BT = self._attention(torch.cat(scores, 1), batch)
            pools["attention"] = torch.einsum("bt,btd->bd", weight_BT, torch.cat(kept, 1))
            on_B = (weight_BT * batch.mention_BT).sum(1)
            on_mentions_B = torch.where(batch.mention_BT.any(1), on_B, on_mentions_B)
        pooled_BP = torch.cat([pools[name] for name in self.config.pooling], 1)
        if masks is not None:
            # Of its own strength: `masks.scale` is meant for the dropouts of the language model.
            head = Masks(masks.seed, masks.step, masks.lanes, masks.device)
            mask_B1P = head.per_lane("pooled", self.config.dropout, pooled_BP.shape[1])
            pooled_BP = pooled_BP if mask_B1P is None else pooled_BP * mask_B1P.squeeze(1)
        return Scored(self.output(pooled_BP), on_mentions_B)

    def _attention(self, keys_BTA: Tensor, batch: Batch) -> Tensor:
        """Weights [B, T] that sum to 1 over the positions of `pooled_BT`."""
        asked_BA = self.unasked.expand(len(keys_BTA), -1)
        if batch.query_BQ is not None:
            assert batch.query_lengths_B is not None
            with torch.no_grad():  # the question is read by the model as it stands
                hidden, _ = self._encoder(batch.query_BQ, self._encoder.initial_carry(len(keys_BTA)), None)
            last_B11 = (batch.query_lengths_B - 1).view(-1, 1, 1).expand(-1, 1, self.width)
            asked_BA = asked_BA + self.question(self.norm(hidden.raw_BTE.gather(1, last_B11).squeeze(1)))
        score_BT = torch.einsum("ba,bta->bt", asked_BA, keys_BTA) / math.sqrt(self.config.keys)
        score_BT = score_BT + self.at_mention * batch.mention_BT
        return torch.softmax(score_BT.masked_fill(~batch.pooled_BT, -torch.inf), 1)

    @torch.no_grad()
    def attention(self, batch: Batch) -> Tensor:
        """The attention's weights [B, T], as `score` uses them. It needs head.pooling with "attention"."""
        keys = [self.key(self.norm(states_BSE)) for states_BSE in self.states(batch, None)]
        return self._attention(torch.cat(keys, 1), batch)

    def forward(self, batch: Batch, masks: Masks | None) -> Tensor:
        """Logits [B, K]."""
        return self.score(self.states(batch, masks), batch, masks).logits_BK

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """From the embedding to the top layer of the language model, then the head."""
        head = [parameter for name, parameter in self.named_parameters() if not name.startswith("encoder.")]
        return [*self._encoder.layer_groups(), head]


def padded(notes: Sequence[Note], device: torch.device) -> Batch:
    """Notes side by side."""
    lengths = [len(note.tokens) for note in notes]
    tokens_BT = np.zeros((len(notes), max(lengths)), dtype=np.int64)
    pooled_BT = np.zeros(tokens_BT.shape, dtype=bool)
    mention_BT = np.zeros(tokens_BT.shape, dtype=bool)
    for row, note in enumerate(notes):
        tokens_BT[row, : lengths[row]] = note.tokens
        for start, end in note.near or [(0, lengths[row])]:
            pooled_BT[row, start:end] = True
        for start, end in note.mentions:
            mention_BT[row, start:end] = True
    query_BQ = query_lengths_B = None
    if all(len(note.query) for note in notes):
        query = [torch.from_numpy(note.query.astype(np.int64)) for note in notes]
        query_BQ = nn.utils.rnn.pad_sequence(query, batch_first=True).to(device)
        query_lengths_B = torch.tensor([len(one) for one in query], device=device)
    at = [torch.from_numpy(array).to(device) for array in (tokens_BT, pooled_BT, mention_BT)]
    return Batch(at[0], torch.tensor(lengths, device=device), at[1], at[2], query_BQ, query_lengths_B)


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
