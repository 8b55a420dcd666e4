"""Language models that learn with layers on top, from annotated spans (tuned.py) and from passages (passages.py).

tokens ─► the models, both ways, at a time ─► numbers of what is asked ─► 256 units ─► a softmax a question
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cluster import memory
from cluster.config import Section
from downstream.concepts.states import States
from pretrain.run import Trained

TAUGHT = 256  # units
DROP, NOISE = 0.5, 0.1  # of what the head sees; tokens that stand in another's place
WARMUP, CLIP = 0.1, 1.0  # of the steps; norm of gradients

Passed = Callable[[], None]


class TuneConfig(Section):
    """`[tune]`: the language models learn from the annotated notes."""

    epochs: int = Field(0, ge=0, description="passes over the annotated notes; 0: the models stay as they are")
    lr: float = Field(3e-4, gt=0, description="highest learning rate of the models")
    lr_head: float = Field(1e-3, gt=0, description="that of the layers on top")


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


class Head(nn.Module):
    """From the states beside mentions to scores of the values of each attribute."""

    def __init__(self, width: int, sizes: Sequence[int]):
        super().__init__()
        self.norm, self.taught = nn.LayerNorm(width), nn.Linear(width, TAUGHT)
        self.values = nn.ModuleList(nn.Linear(TAUGHT, size) for size in sizes)

    def forward(self, states_NP: Tensor, drop: Callable[[Tensor], Tensor]) -> list[Tensor]:
        taught_ND = drop(functional.relu(self.taught(drop(self.norm(states_NP)))))
        return [one(taught_ND) for one in self.values]


def noisy(tokens_T: Tensor, draws: torch.Generator) -> Tensor:
    """Some of the tokens stand in another's place."""
    others_T = tokens_T[torch.randperm(len(tokens_T), generator=draws)]
    return torch.where(torch.rand(len(tokens_T), generator=draws) < NOISE, others_T, tokens_T)


def batches(lengths_N: Tensor, count: int, draws: torch.Generator) -> list[list[int]]:
    """So many of about one length each, in an order that is drawn."""
    about_N = lengths_N.log() + 0.5 * torch.rand(len(lengths_N), generator=draws)
    found = about_N.argsort().split(count)
    return [found[place].tolist() for place in torch.randperm(len(found), generator=draws).tolist()]
