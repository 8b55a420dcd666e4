"""Language models that learn what sections look like from passages under headings (ULMFiT: Howard & Ruder 2018).

passage ─► the models, both ways ─► mean and maximum of their states ─► 256 units ─► a softmax over sections
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.config import fingerprint
from downstream.classifier import Encoder
from downstream.concepts.learning import Learning, OnTop, Passed, TuneConfig, batches, noisy
from downstream.metrics import Floats
from pretrain.run import Trained

LONGEST = 128  # tokens of a passage that are read: its beginning says what it is
LANES = 16  # passages a step

Passages = Sequence[tuple[str, str]]  # text, section


class TunedPassages(OnTop):
    """Models that learned from passages."""

    PREFIX = "passages"

    @property
    def names(self) -> tuple[str, ...]:
        """The sections."""
        return tuple(self.classes["section"])

    @classmethod
    def fit(
        cls, models: Sequence[Trained], others: Passages, own: Passages, config: TuneConfig, passed: Passed
    ) -> TunedPassages:
        """Learned in one pass over the passages of other notes, and then in as many as `config` says over one's own;
        the same passages in the same order give the same. `passed` is called after each pass.
        """
        names = sorted({section for _, section in (*others, *own)})
        learning = Learning(models, 2, [len(names)], fingerprint([*others, *own]), config)
        for passages, epochs in ((others, 1), (own, config.epochs)):
            if not passages:
                continue
            texts = [text for text, _ in passages]
            tokens = [_tokens(trained, texts) for trained in models]
            truth_N = torch.tensor([names.index(section) for _, section in passages])
            lengths_N = torch.tensor([len(one) for one in tokens[0]])
            step = learning.steps(epochs * -(-len(passages) // LANES))
            for _ in range(epochs):
                for rows in batches(lengths_N, LANES, learning.draws):
                    given = [([noisy(of[row], learning.draws) for row in rows],) for of in tokens]
                    learning.add_gradients(_pooled, given, partial(_loss, truth_N[rows].to(learning.device)))
                    step()
                passed()
        return cls(learning.learned(), learning.head, {"section": names})

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Floats:
        """Log-probabilities [N, sections]."""
        models = self.states.models
        tokens = [_tokens(trained, texts) for trained in models]
        logs_NK = np.zeros((len(texts), len(self.names)))
        by_length = sorted(range(len(texts)), key=lambda row: len(tokens[0][row]))
        for first in range(0, len(texts), LANES):
            rows = by_length[first : first + LANES]
            pooled = [
                _pooled(trained.model, [of[row] for row in rows])  # type: ignore[arg-type]
                for trained, of in zip(models, tokens, strict=True)
            ]
            (logits_NK,) = self.head(torch.cat(pooled, 1), lambda x: x)
            logs_NK[rows] = logits_NK.log_softmax(1).double().cpu().numpy()
        return logs_NK


def _tokens(trained: Trained, texts: Sequence[str]) -> list[Tensor]:
    """The beginning of each as the model reads it; of an empty one the token 0."""
    found = [ids[:LONGEST] for ids in trained.tokenizer.encode([trained.clean_text(text) for text in texts])]
    turned = [ids[::-1] if trained.backward else ids for ids in found]
    return [torch.from_numpy(ids.astype(np.int64)) if len(ids) else torch.zeros(1, dtype=torch.long) for ids in turned]


def _loss(truth_B: Tensor, said: list[Tensor]) -> Tensor:
    return functional.cross_entropy(said[0], truth_B)


def _pooled(encoder: Encoder, tokens: list[Tensor]) -> Tensor:
    """[N, 2E]: mean and maximum of the states of each."""
    tokens_BT = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    device = next(encoder.parameters()).device  # type: ignore[attr-defined]
    lengths_B1 = torch.tensor([[len(one)] for one in tokens], device=device)
    hidden, _ = encoder(tokens_BT.to(device), encoder.initial_carry(len(tokens)), None)
    live_BT1 = (torch.arange(tokens_BT.shape[1], device=device) < lengths_B1)[..., None]  # the rest is padding
    raw_BTE = hidden.raw_BTE
    mean_BE = (raw_BTE * live_BT1).sum(1) / lengths_B1
    return torch.cat([mean_BE, raw_BTE.masked_fill(~live_BT1, -torch.inf).amax(1)], 1)
