"""Several models of one vocabulary as one: the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.errors import ConfigError
from pretrain.models import Carry
from pretrain.models.output import logits
from pretrain.run import Trained
from pretrain.streams import IGNORED, Batch

CHUNK_ELEMENTS = 1 << 22  # logits of one model in memory at once


class Ensemble:
    """A Scorer that mixes models in probability space: p(token) is the mean of theirs."""

    def __init__(self, models: Sequence[nn.Module]):
        self.models = [model.eval() for model in models]

    def initial_carry(self, lanes: int) -> Carry:
        """The carries of all models, named by number."""
        return {
            f"{number}/{name}": value
            for number, model in enumerate(self.models)
            for name, value in model.initial_carry(lanes).items()  # type: ignore[operator]
        }

    @torch.no_grad()
    def score(self, batch: Batch, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
        """(nll of every target in nats [N], 0 where it is IGNORED; whether it was the most likely token [N]; carry)."""
        after: Carry = {}
        outputs = []
        for number, model in enumerate(self.models):
            mine = {name.partition("/")[2]: value for name, value in carry.items() if name.startswith(f"{number}/")}
            hidden, left = model(batch.tokens_BT, mine, None, batch.starts_BT)
            after |= {f"{number}/{name}": value for name, value in left.items()}
            outputs.append((hidden.output_BTE.flatten(0, 1), model.softmax()))  # type: ignore[operator]
        targets_N = batch.targets_BT.flatten()
        rows = max(CHUNK_ELEMENTS // cast(int, self.models[0].vocab_size), 1)
        nlls, hits = [], []
        for start in range(0, len(targets_N), rows):
            part = slice(start, start + rows)
            log_probs = [logits(output_NE[part], levels).log_softmax(1) for output_NE, levels in outputs]
            mixed_CV = torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))
            nlls.append(functional.nll_loss(mixed_CV, targets_N[part], ignore_index=IGNORED, reduction="none"))
            hits.append(mixed_CV.argmax(1) == targets_N[part])
        return torch.cat(nlls), torch.cat(hits), after


def of_one_kind(runs: Sequence[Trained]) -> None:
    """Raises ConfigError unless the models can be mixed token by token: one vocabulary, one direction."""
    first = runs[0]
    for run in runs[1:]:
        if run.tokenizer.sha256 != first.tokenizer.sha256:
            what = "another vocabulary"
        elif run.backward != first.backward:
            what = "another direction"
        else:
            continue
        raise ConfigError(
            f"{run.run}: reads in {what} than {first.run}; such models are combined by their predictions, after "
            "./launch.sh finetune of each, and compared by ./launch.sh compare"
        )
