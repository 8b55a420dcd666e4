"""DeepSpeed behind a small door: process group, ZeRO-sharded engine, and every tensor of it by name.

DeepSpeed's dict is built here and nowhere else. A model's parameters and optimizer states are read and set whole,
whatever the ZeRO stage and the number of workers, so a checkpoint need not know of either.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from cluster import memory, storage
from cluster.config import Section
from cluster.errors import ConfigError, TrainingError
from pretrain import heads
from pretrain.models import Carry, settle_numbers
from pretrain.models.dropout import Masks
from pretrain.optim import AVERAGE, PARAMETER, Knobs
from pretrain.scoring import Objective
from pretrain.streams import Batch

# DeepSpeed speaks on import and at every build; what a user must know is said by us.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed import utils as fragments  # noqa: E402

# DeepSpeed asks here whether a collective for inference on CPUs can be compiled, and would compile it at every start:
# 36 s, a compiler needed, and a lock that hangs every later start when the build is killed. To find out what else could
# be compiled, which nobody asks, it runs compilers.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}

SEEN_WITHIN_SECONDS = 20.0


class EngineConfig(Section):
    """Section `engine` of a training recipe."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    head: Literal["chunked", "dense", "liger"] = Field("chunked", description="how the softmax's loss is computed")
    accumulation: int = Field(1, ge=1, description="groups that a worker's lanes are cut into, one in memory at a time")
    whole_below: int = Field(100_000, ge=0, description="parameters of fewer elements are not partitioned at ZeRO-3")
    timeout_seconds: int = Field(300, ge=10, description="a collective that takes longer means a lost worker")

    @model_validator(mode="after")
    def _bf16_is_sharded(self) -> EngineConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage 1, 2 or 3, where an fp32 copy of the weights is kept")
        return self


class Workers:
    """Rank, world size and device of this process, from the environment: alone, torchrun and Ray Train alike."""

    def __init__(self, timeout_seconds: int):
        self._owns_group = not dist.is_initialized()  # Ray Train makes it itself
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        node = os.environ.get("CHARTLM_NODE", os.environ.get("GROUP_RANK", "0"))  # from Ray; torchrun's
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        else:
            memory.keep_freed()
        settle_numbers()
        backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=timeout_seconds)
        if self._owns_group and "MASTER_ADDR" not in os.environ:
            if self.world > 1:
                raise ConfigError(
                    "WORLD_SIZE is set but MASTER_ADDR is not; start with torchrun or ./launch.sh pretrain"
                )
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it; RANK would be taken for torchrun's
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
        self.nodes = len(set(self.gather(node)))  # machines

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

    def see(self, url: str) -> None:
        """Raises ConfigError on all workers where one does not see what the first has written."""
        deadline = time.monotonic() + SEEN_WITHIN_SECONDS  # a shared folder may be late
        while not (seen := storage.exists(url)) and time.monotonic() < deadline:
            time.sleep(0.5)
        blind = [rank for rank, sees in enumerate(self.gather(seen)) if not sees]
        if blind:
            raise ConfigError(
                f"{url}: worker {blind[0]} does not see what the first worker wrote there; give a folder that all "
                "machines share, or a URL such as s3://…"
            )

    def close(self) -> None:
        """Leaves the process group that was entered here."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _squares(gradients: list[Tensor]) -> float:
    """The sum of squares, by rows: one sum over millions in single precision would be off by a thousandth."""
    sums = [torch.zeros((), dtype=torch.float64, device=gradients[0].device)] if gradients else []
    for gradient in gradients:
        exact = torch.promote_types(gradient.dtype, torch.float32)
        flat = gradient.detach().flatten()
        edge = len(flat) // 4096 * 4096
        for rows in (flat[:edge].view(-1, 4096), flat[edge:].view(1, -1)):
            sums.append(torch.linalg.vector_norm(rows, dim=1, dtype=exact).double().square().sum())
    return float(torch.stack(sums).sum()) if sums else 0.0


def _meet_muon() -> None:
    """DeepSpeed asks of every optimizer whether it is Muon, and importing that compiles its kernels: all of torch's
    compiler is loaded, two seconds of every start. Nothing here is Muon, so it comes uncompiled.
    """
    import torch._dynamo  # noqa: F401  (or torch would take what follows for a wish that lasts)

    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    del os.environ["TORCHDYNAMO_DISABLE"]
    if before is not None:
        os.environ["TORCHDYNAMO_DISABLE"] = before


class Engine:
    """A model under DeepSpeed: one call trains a step; tensors come out and go in by name."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: EngineConfig,
        workers: Workers,
        lanes: int,
        clip: float,
    ):
        fewest = lanes // workers.world
        if fewest < config.accumulation:
            raise ConfigError(
                f"engine.accumulation={config.accumulation} is more than the {fewest} lanes of a worker; lower it, or "
                "take fewer workers"
            )
        self.lanes = lanes
        self.model = model.to(workers.device)
        self.workers, self.config, self.clip = workers, config, clip
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        _meet_muon()
        self._deepspeed, *_ = deepspeed.initialize(
            model=Objective(self.model, heads.HEADS[config.head]),
            optimizer=make_optimizer(self.model),
            config={
                "train_micro_batch_size_per_gpu": fewest // config.accumulation,  # DeepSpeed only reports it
                "gradient_accumulation_steps": config.accumulation,
                # But for ZeRO-3 `update` looks at the norm and clips: DeepSpeed reads the gradients three times for
                # that, once in double precision, and at ZeRO-0 keeps the norm to itself.
                "gradient_clipping": clip if config.zero_stage == 3 else 0.0,
                "gradient_allreduce_op": "mean" if config.zero_stage == 3 else "sum",
                "steps_per_print": 1 << 30,
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "stage3_param_persistence_threshold": config.whole_below,
                    "compute_grad_norm": config.zero_stage in (0, 3),
                },
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": config.zero_stage == 3},
            },
        )

        if workers.world == 1 and config.zero_stage == 0:
            self._deepspeed.enable_backward_allreduce = False  # it would copy all gradients there and back

    @property
    def vocab_size(self) -> int:
        """How many tokens the model knows."""
        return cast(int, self.model.vocab_size)

    def initial_carry(self, lanes: int) -> Carry:
        """The carry before the first token."""
        return self.model.initial_carry(lanes)  # type: ignore[operator, no-any-return]

    def forward_backward(self, batch: Batch, carry: Carry, masks: Masks, targets: int) -> tuple[Tensor, Carry]:
        """Gradients of one segment of this worker's lanes, as the mean over the `targets` of all workers; returns (sum
        of nll in nats on this worker, carry). Lanes go through in `accumulation` groups, each with its own carry.
        """
        self._deepspeed.train()
        groups, size = self.config.accumulation, len(batch.tokens_BT)
        averaged = self.workers.world if self.config.zero_stage == 3 else 1  # else DeepSpeed sums over the workers
        share = averaged * groups / max(targets, 1)
        batch = batch.to(self.workers.device)
        nlls, carries = [], []
        for group in range(groups):
            rows = slice(group * size // groups, (group + 1) * size // groups)
            part = {name: value[rows] for name, value in carry.items()}
            weight = (rows.stop - rows.start) * averaged * groups / self.lanes
            objective, nll, part = self._deepspeed(
                batch.rows(rows.start, rows.stop), part, masks.rows(rows), share, weight
            )
            self._deepspeed.backward(objective)
            if group < groups - 1:
                self._deepspeed.step()  # counts the group; the optimizer waits for the last
            nlls.append(nll)
            carries.append(part)
        after = {name: torch.cat([part[name] for part in carries]) for name in carry} if groups > 1 else carries[0]
        return torch.stack(nlls).sum(), after

    def score(self, batch: Batch, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
        """(nll of every target in nats, whether it was the most likely token, carry), without dropout. At ZeRO-3 a
        collective.
        """
        self._deepspeed.eval()
        with torch.no_grad():
            return self._deepspeed(batch.to(self.workers.device), carry, None, None)  # type: ignore[no-any-return]

    def update(self, knobs: Knobs) -> tuple[float, bool]:
        """Clips and steps the optimizer. Returns (norm of the gradient before clipping, whether it was applied): a
        gradient that is not finite is thrown away.
        """
        optimizer = self._deepspeed.optimizer
        for group in optimizer.param_groups:
            group["lr"], group["newest"] = knobs.lr * group.get("lr_scale", 1.0), knobs.newest
            if knobs.beta1 is not None and "betas" in group:
                group["betas"] = (knobs.beta1, group["betas"][1])
        if self.config.zero_stage == 3:
            self._deepspeed.step()  # looks at the norm itself, and applies nothing where it is not finite
            norm = self._deepspeed.get_global_grad_norm()
            return (math.inf if norm is None else float(norm)), not optimizer.overflow
        if self._sharded:
            gradients = [part for group in optimizer.averaged_gradients.values() for part in group]
            norm = math.sqrt(*self.workers.total(_squares(gradients)))
        else:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norm = math.sqrt(_squares(gradients))
        if not math.isfinite(norm):
            self.discard()
            return math.inf, False
        excess = max((norm + 1e-6) / self.clip, 1.0)
        if self._sharded:
            optimizer.loss_scale = excess  # DeepSpeed divides by it, once the gradient is fp32
            self._deepspeed.step()
            optimizer.loss_scale = 1.0
        else:
            if excess > 1:
                torch._foreach_mul_(gradients, 1 / excess)
            self._deepspeed.step()
        return norm, True

    def discard(self) -> None:
        """Throws the gradients of `forward_backward` away, as DeepSpeed does with those that overflow."""
        optimizer = self._deepspeed.optimizer
        if self.config.zero_stage == 3:
            optimizer._overflow_clean_up(None)
        elif self._sharded:
            optimizer.zero_grad(set_to_none=True)
            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
        else:
            optimizer.zero_grad(set_to_none=True)
        self._deepspeed.micro_steps += 1  # the last group of lanes is over, else the next counts as one more of it

    def _flat(self) -> list[Tensor]:
        """The tensors that the inner optimizer holds states for: whole parameters, or this worker's flat parts."""
        optimizer = self._deepspeed.optimizer
        if self.config.zero_stage == 3:
            return cast(list[Tensor], optimizer.fp32_partitioned_groups_flat)
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
        """Lets DeepSpeed find each parameter's optimizer states (ZeRO 1 and 2). It does so itself after the step of the
        first parameter group, when the other groups have no states yet, and never again (0.19.8).
        """
        if self.config.zero_stage in (1, 2):
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

    def parts(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(parameter, state, where it starts, flat fp32 tensor) of what this worker holds of every parameter and
        optimizer state. Over all workers each number is there once; nothing is copied or sent.
        """
        states = self.state_names()
        if states:
            self._link_states()
        for index, (name, parameter) in enumerate(self.model.named_parameters()):
            for key in (PARAMETER, *states):
                hold: Tensor
                if not self._sharded:
                    if index % self.workers.world != self.workers.rank:
                        continue  # all hold it, one gives it
                    start, hold = 0, parameter if key == PARAMETER else self._inner().state[parameter][key]
                elif self.config.zero_stage == 3:
                    hold = self._part(parameter, key)
                    start = hold.numel() * self.workers.rank
                    hold = hold[: max(self._shapes[name].numel() - start, 0)]  # the last is padded
                else:
                    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                    if mapping is None:
                        continue  # another's
                    start = mapping.lp_fragment_address.start
                    hold = mapping.get_hp_fragment(None if key == PARAMETER else key)
                if hold.numel():
                    yield name, key, start, hold.detach().flatten()

    def _part(self, parameter: nn.Parameter, key: str) -> Tensor:
        """This worker's part of a parameter or optimizer state at ZeRO-3, a view."""
        part, _ = self._deepspeed.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=None if key == PARAMETER else key
        )
        return cast(Tensor, part)

    def shapes(self) -> dict[str, list[int]]:
        """The shape of every parameter."""
        return {name: list(shape) for name, shape in self._shapes.items()}

    def restore(self, states: list[str], step: int, read: Callable[[str, str], Tensor]) -> None:
        """Sets every parameter and optimizer state from `read(parameter, state)`, both whole."""
        inner = self._inner()
        for flat in self._flat():
            # The inner optimizer makes its states at its first step; here they must exist before it.
            inner.state.pop(flat, None)
            if states:
                inner.state[flat] = {key: torch.zeros_like(flat) for key in states}
                inner.state[flat]["step"] = torch.tensor(float(step), device=flat.device)
        if states:
            self._link_states()
        for name, parameter in self.model.named_parameters():
            for key in (PARAMETER, *states):
                value = read(name, key)
                if value.shape != self._shapes[name]:
                    raise TrainingError(
                        f"{name}/{key} of the checkpoint has shape {tuple(value.shape)}, the model's is "
                        f"{tuple(self._shapes[name])}; the recipe's model is not the one of this run"
                    )
                self._set(parameter, key, value.to(self.workers.device))
        if self.config.zero_stage == 3:
            self._publish()

    def _publish(self) -> None:
        """Hands the fp32 weights of the optimizer on to the copy that the forward reads. A collective."""
        optimizer = self._deepspeed.optimizer
        if self.config.zero_stage == 3:
            optimizer._partition_all_parameters()  # what a forward has gathered would not be gathered again
            for group in range(len(self._flat())):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self._sharded:
            optimizer.update_lp_params()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model computes with the average of its weights, where the optimizer keeps one. A collective."""
        if AVERAGE not in self.state_names():
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for flat in self._flat():
                average = self._inner().state[flat][AVERAGE]
                newest = flat.clone()
                flat.copy_(average)
                average.copy_(newest)
        self._publish()

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.config.zero_stage == 3:
            # safe_set_full_* cannot where the last worker's part is padded (0.19.8).
            part = self._part(parameter, key)
            start = part.numel() * self.workers.rank
            mine = value.flatten()[start : start + part.numel()]
            part.data[: len(mine)].copy_(mine)
        elif key == PARAMETER:
            if self._sharded:
                fragments.safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)  # the copy that the forward reads
        elif self._sharded:
            fragments.safe_set_full_optimizer_state(parameter, value, key)
        else:
            self._inner().state[parameter][key].copy_(value)
