"""What a model makes of a batch: its loss in training, and the likelihood of every token in evaluation."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pretrain import heads
from pretrain.models import Carry
from pretrain.models.dropout import Masks
from pretrain.streams import Batch


class Scorer(Protocol):
    """What evaluation needs of a model: an Engine, or a `Plain` module."""

    def initial_carry(self, lanes: int) -> Carry:
        """The carry before the first token."""

    def score(self, batch: Batch, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
        """(nll of every target in nats, whether it was the most likely token, carry), without dropout."""


class Objective(nn.Module):
    """What DeepSpeed differentiates: next-token cross-entropy plus the model's own penalty."""

    def __init__(self, model: nn.Module, head: heads.Head):
        super().__init__()
        self.model = model
        self.head = head

    def forward(
        self, batch: Batch, carry: Carry, masks: Masks | None, share: float | None, weight: float = 1.0
    ) -> tuple[Tensor, Tensor, Carry]:
        """(objective, sum of negative log-likelihoods in nats, carry). `share` turns this worker's sum into its part of
        the mean over all workers' targets, given how DeepSpeed brings gradients of workers together; `weight` does so
        for the model's penalty, a mean over these lanes.

        Without a share, scores: (nll of every target in nats, whether it was the most likely token, carry), both
        [lanes·T] and 0 where a target is IGNORED. They go through here because only within the forward of what
        DeepSpeed wraps are the parameters whole at ZeRO-3.
        """
        hidden, carry = self.model(batch.tokens_BT, carry, masks, batch.starts_BT)
        output_NE, targets_N = hidden.output_BTE.flatten(0, 1), batch.targets_BT.flatten()
        levels = self.model.softmax()  # type: ignore[operator]
        if share is None:
            return *heads.score(output_NE, levels, targets_N), carry
        nll = heads.nll(self.head, output_NE, levels, targets_N)
        penalty = self.model.penalty(hidden)  # type: ignore[operator]
        return nll * share + penalty * weight, nll.detach(), carry


class Plain:
    """A model without DeepSpeed, as a Scorer."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._objective = Objective(model, heads.dense)

    def initial_carry(self, lanes: int) -> Carry:
        """The carry before the first token."""
        return self.model.initial_carry(lanes)  # type: ignore[operator, no-any-return]

    def score(self, batch: Batch, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
        """(nll of every target in nats, whether it was the most likely token, carry), without dropout."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            scores = self._objective(batch.to(next(self.model.parameters()).device), carry, None, None)
        self.model.train(was_training)
        return scores  # type: ignore[no-any-return]
