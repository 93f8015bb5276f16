"""The only file that knows DeepSpeed: its ZeRO optimizer with our process groups, our AdamW and our account of traffic.

DeepSpeed's own engine is left out: it would need its layer classes in the model, environment variables, a JSON config
and global process groups, and what it adds to the optimizer takes a few lines in engine/deepspeed.py. Private parts are
used, hence the one version that pyproject.toml names; tests/engine/test_deepspeed.py says which.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed.ops

# Seconds of imports that DeepSpeed would make in the middle of its first reduction.
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from deepspeed.runtime.zero.stage_1_and_2 import OPTIMIZER_ALLGATHER_TIMER, DeepSpeedZeroOptimizer
from deepspeed.utils.timer import NoopTimer
from torch import Tensor
from torch.distributed import HashStore

from dstrain.comm.collectives import Peers, ring_link
from dstrain.config.schema import Config, OptimConfig
from dstrain.engine.optimizer import AdamShard
from dstrain.mesh.groups import Groups
from dstrain.parallel.apply import LogicalParameter

# What DeepSpeed calls experts: parameters with a group of ranks of their own.
EXPERTS, EMBEDDING = "experts", "embedding"


class PartitionAdamW(torch.optim.Optimizer):
    """AdamW of engine/optimizer.py in the shape that DeepSpeed steps: each parameter group holds one flat partition."""

    def __init__(self, param_groups: list[dict[str, Any]], optim: OptimConfig):
        super().__init__(param_groups, defaults={})
        self.optim = optim
        self.lr, self.updates = 0.0, 0

    def create_state(self, moments_dtype: torch.dtype) -> None:
        """At once instead of at the first step, so that a checkpoint can be loaded into it."""
        for group in self.param_groups:
            for master in group["params"]:
                moments = (torch.zeros_like(master, dtype=moments_dtype, requires_grad=False) for _ in range(2))
                self.state[master] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for master in group["params"]:
                shard = AdamShard(master.detach(), **self.state[master], decays=group["decays"])
                shard.update(master.grad, self.lr, self.updates, self.optim)


class GatherTimer(NoopTimer):
    """Of the timers that DeepSpeed asks for, the one around the gather: it blocks, so its time is exposed."""

    def __init__(self, zero: "TracedZero"):
        super().__init__()
        self.zero = zero
        self._gather = ExitStack()

    def __call__(self, name: str) -> Any:
        return self if name == OPTIMIZER_ALLGATHER_TIMER else self.timer

    def start(self) -> None:
        self._gather.enter_context(self.zero.blocking("param", self.zero.gather_bytes()))

    def stop(self) -> None:
        self._gather.close()


class TracedZero(DeepSpeedZeroOptimizer):
    """Reports its reductions, reduces from FP32 buckets in stage 2 as it does in stage 1, and counts gradients: a
    backward pass may be a part of a micro-batch, so its end says nothing."""

    def __init__(self, *args: Any, groups: Groups, **kwargs: Any):
        self.groups = groups
        super().__init__(*args, timers=GatherTimer(self), **kwargs)
        # Gradients of this step that are yet to come.
        self._missing = 0

    @property
    def _parameters(self) -> int:
        return sum(len(group) for group in self.bit16_groups)

    def expect(self, gradients: Mapping[str, int]) -> None:
        """In stage 2 micro-batches come one after the other, and each is reduced when it is complete."""
        self._missing = sum(gradients.values())
        self.set_gradient_accumulation_boundary(not self.partition_gradients or self._missing == self._parameters)

    def process_gradients(self, param: Tensor, i: int) -> None:
        if param.grad is None:
            # Autograd came past; the gradient is computed later (precision/weight_gradients.py).
            return
        super().process_gradients(param, i)
        self._missing -= 1
        if self.partition_gradients and self._missing % self._parameters == 0:
            self.overlapping_partition_gradients_reduce_epilogue()
            self.set_gradient_accumulation_boundary(self._missing == self._parameters)

    def _gradient_reduction_buffer_dtype(self) -> torch.dtype:
        return torch.float32

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        sent: Counter[int] = Counter()
        for group, param, _ in self.ipg_buckets[communication_data_type].params:
            ranks = self.partition_count[group]
            num_bytes = self.bit16_groups[group][param].numel() * communication_data_type.itemsize
            # An all-reduce, whatever `reduce_scatter` says.
            sent[group] += 2 * num_bytes * (ranks - 1) // ranks
        with self.blocking("grad", sent):
            super().average_tensor(tensor, communication_data_type)

    def gather_bytes(self) -> dict[int, int]:
        """What this rank sends when parameters are gathered, by parameter group."""
        shares = zip(self.bit16_groups_flat, self.partition_size, self.partition_count, strict=True)
        return {group: share * flat.element_size() * (ranks - 1) for group, (flat, share, ranks) in enumerate(shares)}

    @contextmanager
    def blocking(self, kind: str, sent_bytes: Mapping[int, int]) -> Iterator[None]:
        """Around a transfer that compute waits for, in which each parameter group sends so many bytes."""
        trace = self.groups.trace
        transfer = trace.begin(kind, "data")
        for group, num_bytes in sent_bytes.items():
            peers = _peers(self.groups, self.optimizer.param_groups[group]["name"])
            if peers is not None:
                trace.sent(transfer, ring_link(peers), num_bytes)
        with trace.waiting(transfer):
            yield
        trace.end(transfer)


def make_zero(logicals: list[LogicalParameter], config: Config, groups: Groups) -> TracedZero:
    """Moves the parameters, which already have their compute dtype, into DeepSpeed's flat storage.

    Gradients become sums over ranks, since `gradient_average` is off; norm and clipping are the caller's.
    """
    _connect(groups)
    adam = PartitionAdamW(list(_param_groups(logicals, groups)), config.optim)
    marked = {group["name"] for group in adam.param_groups if group["moe"]}
    offload = config.engine.offload_optimizer
    on_gpu = groups.place.device.type == "cuda"
    zero = TracedZero(
        adam,
        {x.parameter: x.name for x in logicals},
        groups=groups,
        optimizer_params={},
        partition_grads=config.engine.zero_stage == 2,
        # Without it, expert gradients of stage 1 are wrong.
        contiguous_gradients=True,
        reduce_bucket_size=config.engine.bucket_mib * 2**20 // 4,
        dp_process_group=_group(groups, ""),
        # Unused, but it must be there.
        expert_parallel_group={EXPERTS: groups.ep.group} if groups.ep else {},
        expert_data_parallel_group={name: _group(groups, name) for name in sorted(marked)} or None,
        has_moe_layers=bool(marked),
        offload_optimizer_config=(
            DeepSpeedZeroOffloadOptimizerConfig(device="cpu", pin_memory=on_gpu) if offload else None
        ),
        clip_grad=0.0,
        # It insists on a norm of its own when it offloads.
        compute_grad_norm=offload,
        check_grad_overflow=False,
        gradient_average=False,
        gradient_accumulation_dtype=torch.float32,
        communication_data_type=torch.float32,
    )
    adam.create_state(getattr(torch, config.precision.moments_dtype))
    zero._lazy_init_hp_params_optimizer_state()
    return zero


def _param_groups(logicals: list[LogicalParameter], groups: Groups) -> list[dict[str, Any]]:
    """Parameters that share a process group, a dtype and their weight decay; those whose group is not that of the dense
    parameters are marked as DeepSpeed marks experts."""
    kinds: dict[tuple[str, bool, bool], list[LogicalParameter]] = {}
    # The parameters of the compute dtype come first: DeepSpeed takes the first dtype for that of the model.
    for x in sorted(logicals, key=lambda x: x.keeps_fp32):
        name = EXPERTS if x.is_expert and groups.ep else EMBEDDING if x.at_both_ends and groups.embedding else ""
        kinds.setdefault((name, x.decays, x.keeps_fp32), []).append(x)
    for (name, _, _), members in kinds.items():
        for x in members:
            vars(x.parameter).update(allreduce=not name, group_name=name)
    return [
        {"params": [x.parameter for x in members], "decays": decays, "moe": bool(name), "name": name}
        for (name, decays, _), members in kinds.items()
    ]


def _connect(groups: Groups) -> None:
    """Lets DeepSpeed use the process group that exists; it knows no run without one."""
    # An empty table of compiled operators: otherwise the first group on a CPU starts a C++ build of over a minute.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    if not dist.is_initialized():
        backend = "nccl" if groups.place.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    deepspeed_comm.init_distributed(verbose=False)


def _peers(groups: Groups, name: str) -> Peers | None:
    """The ranks that hold the parameters of a group of `_param_groups`."""
    return {EXPERTS: groups.expert_data, EMBEDDING: groups.embedding}.get(name, groups.data)


def _group(groups: Groups, name: str) -> dist.ProcessGroup:
    peers = _peers(groups, name)
    if peers is not None:
        return peers.group
    alone = dist.group.WORLD
    if groups.place.world > 1:
        alone = dist.new_group([groups.place.rank], use_local_synchronization=True)
    if alone is None:
        raise RuntimeError("there is no process group")
    return alone
