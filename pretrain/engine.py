"""DeepSpeed behind a small door: process group, ZeRO-sharded engine, and every tensor of it by name.

DeepSpeed's dict is built here and nowhere else. A model's parameters and optimizer states are read and set whole,
whatever the ZeRO stage and the number of workers, so a checkpoint need not know of either.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from cluster.config import Section
from cluster.errors import ConfigError
from pretrain.models.awd_lstm import Carry
from pretrain.models.dropout import Masks
from pretrain.streams import IGNORED, Batch

# DeepSpeed speaks on import and at every build; what a user must know is said by us.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed import utils as fragments  # noqa: E402

# On CPU, DeepSpeed would compile this op (used for inference only) at every start: 36 s, a compiler needed, and a
# lock that hangs every later start when the build is killed.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

PARAMETER = "parameter"  # the name of a parameter's own value beside its optimizer states


class EngineConfig(Section):
    """Section `engine` of a training recipe."""

    zero_stage: Literal[0, 1, 2] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    timeout_seconds: int = Field(300, ge=10, description="a collective that takes longer means a lost worker")

    @model_validator(mode="after")
    def _bf16_is_sharded(self) -> EngineConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage 1 or 2, where an fp32 copy of the weights is kept")
        return self


class Workers:
    """Rank, world size and device of this process, from the environment: alone, torchrun and Ray Train alike."""

    def __init__(self, timeout_seconds: int):
        self._owns_group = not dist.is_initialized()  # Ray Train makes it itself
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=timeout_seconds)
        if self._owns_group and "MASTER_ADDR" not in os.environ:
            if self.world > 1:
                raise ConfigError(
                    "WORLD_SIZE is set but MASTER_ADDR is not; start with torchrun or ./launch.sh pretrain"
                )
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it; RANK would be taken for torchrun's
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def agree(self, value: Any) -> Any:
        """The first worker's `value`, on every worker."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every worker's `value`, in order of rank."""
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, value)
        return boxes

    def total(self, *values: Tensor | float) -> list[float]:
        """Sums over all workers, in double precision."""
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        dist.all_reduce(sums)
        return cast(list[float], sums.tolist())

    def close(self) -> None:
        """Leaves the process group that was entered here."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


class Objective(nn.Module):
    """What DeepSpeed differentiates: next-token cross-entropy plus the model's own penalty."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, carry: Carry, masks: Masks | None, share: float) -> tuple[Tensor, Tensor, Carry]:
        """(objective, sum of negative log-likelihoods in nats, carry). `share` turns this worker's sum into its part of
        the mean over all workers' targets, given that DeepSpeed averages gradients over workers.
        """
        hidden, carry = self.model(batch.tokens_BT, carry, masks)
        logits_BTV = self.model.logits(hidden.output_BTE)  # type: ignore[operator]
        nll = functional.cross_entropy(
            logits_BTV.float().flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        penalty = self.model.penalty(hidden)  # type: ignore[operator]
        return nll * share + penalty, nll.detach(), carry


class Engine:
    """A model under DeepSpeed: one call trains a step; tensors come out and go in by name."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: EngineConfig,
        workers: Workers,
        lanes_per_worker: int,
        clip: float,
    ):
        self.model = model.to(workers.device)
        self.workers, self.config = workers, config
        self._deepspeed, *_ = deepspeed.initialize(
            model=Objective(self.model),
            optimizer=make_optimizer(self.model),
            config={
                "train_micro_batch_size_per_gpu": lanes_per_worker,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": clip,
                "steps_per_print": 1 << 30,
                "zero_optimization": {"stage": config.zero_stage},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": config.precision == "bf16"},
            },
        )

    def forward_backward(self, batch: Batch, carry: Carry, masks: Masks, share: float) -> tuple[Tensor, Carry]:
        """Gradients of one segment; returns (sum of nll in nats on this worker, carry)."""
        self._deepspeed.train()
        device = self.workers.device
        batch = Batch(batch.tokens_BT.to(device), batch.targets_BT.to(device))
        objective, nll, carry = self._deepspeed(batch, carry, masks, share)
        self._deepspeed.backward(objective)
        return nll, carry

    def update(self, lr: float) -> float | None:
        """Clips, steps the optimizer at learning rate `lr`; returns the norm of the gradient before clipping, where
        DeepSpeed knows it (not at ZeRO-0).
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        norm = self._deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _flat(self) -> list[Tensor]:
        """The tensors that the inner optimizer holds states for: whole parameters, or this worker's flat parts."""
        optimizer = self._deepspeed.optimizer
        if self._sharded:
            return cast(list[Tensor], optimizer.single_partition_of_fp32_groups)
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def _inner(self) -> torch.optim.Optimizer:
        optimizer = self._deepspeed.optimizer
        return cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))

    @property
    def _sharded(self) -> bool:
        return self.config.zero_stage > 0

    def _link_states(self) -> None:
        """Lets DeepSpeed find each parameter's optimizer states. It does so itself after the step of the first
        parameter group, when the other groups have no states yet, and never again (0.19.8).
        """
        self._deepspeed.optimizer._hp_optimizer_states_linked = False
        self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def state_names(self) -> list[str]:
        """Optimizer states that are tensors of a parameter's shape (`exp_avg`, …); empty before the first step."""
        flat = self._flat()[0]
        state = self._inner().state.get(flat, {})
        return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape)

    def optimizer_step(self) -> int:
        """How many updates the optimizer has made (Adam's bias correction depends on it)."""
        return int(self._inner().state.get(self._flat()[0], {}).get("step", 0))

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter, state, whole tensor in fp32 on CPU) of every parameter and optimizer state, in one order on every
        worker. A collective: every worker must go through all of it.
        """
        states = self.state_names()
        if states and self._sharded:
            self._link_states()
        for name, parameter in self.model.named_parameters():
            if not self._sharded:
                yield name, PARAMETER, parameter.detach().cpu()
            else:
                yield name, PARAMETER, fragments.safe_get_full_fp32_param(parameter).detach().cpu()
            for key in states:
                if not self._sharded:
                    yield name, key, self._inner().state[parameter][key].detach().cpu()
                else:
                    yield name, key, fragments.safe_get_full_optimizer_state(parameter, key).detach().cpu()

    def restore(self, states: list[str], step: int, read: Callable[[str, str], Tensor]) -> None:
        """Sets every parameter and optimizer state from `read(parameter, state)`, as `tensors` gave them."""
        inner = self._inner()
        for flat in self._flat() if states else []:
            # The inner optimizer makes its states at its first step; here they must exist before it.
            inner.state[flat] = {key: torch.zeros_like(flat) for key in states}
            inner.state[flat]["step"] = torch.tensor(float(step), device=flat.device)
        if states and self._sharded:
            self._link_states()
        for name, parameter in self.model.named_parameters():
            value = read(name, PARAMETER).to(self.workers.device)
            if self._sharded:
                fragments.safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)  # the copy that the forward reads
            for key in states:
                value = read(name, key).to(self.workers.device)
                if self._sharded:
                    fragments.safe_set_full_optimizer_state(parameter, value, key)
                else:
                    inner.state[parameter][key].copy_(value)
