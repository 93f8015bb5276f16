"""ZeRO-1 and ZeRO-2 of DeepSpeed: `engine=deepspeed`.

    backward   gradients are added up in FP32; stage 2 reduces each micro-batch and keeps this rank's partition only
    reduce     stage 1 reduces here, once; the norm is taken over all partitions
    step       AdamW on this rank's partition of the master weights (on the CPU if offloaded), then the gather

DeepSpeed all-reduces FP32 gradients where `engine=torch` sends each rank its share only, so it puts twice the bytes on
the wire, and it overlaps nothing with the passes. Sums, norm, clipping and AdamW are those of `engine=torch`, and so
are the router weights in FP32: only the order of additions differs.

In several settings DeepSpeed is wrong without a word. None of them can be reached: contiguous gradients, marks and
groups of experts, dtypes and the norm are set by us (engine/zero.py), and `check_deepspeed` refuses the rest.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from dstrain.comm.collectives import all_reduce_sum
from dstrain.config.schema import Config
from dstrain.engine.optimizer import square_sum
from dstrain.engine.state import FlatShard, Shards
from dstrain.errors import ConfigError
from dstrain.mesh.groups import Groups
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import LogicalParameter, logical_parameters

if TYPE_CHECKING:
    from dstrain.engine.zero import TracedZero

VERSION = "0.19.8"

# What DeepSpeed attaches to a parameter: where its part lies in the partition, and its position among the parts.
RECORD = "_hp_mapping"
POSITION = "_index_in_param_group"


def check_deepspeed(config: Config) -> None:
    """Refuses what DeepSpeed cannot do, or does wrong. Raises ConfigError."""
    engine, precision = config.engine, config.precision
    _check_installed()
    if engine.zero_stage not in (1, 2):
        rule = "stage 0 clips expert gradients wrongly and stage 3 corrupts experts"
        raise ConfigError("engine.zero_stage", engine.zero_stage, rule, "Set it to 1 or 2.")
    if precision.grad_wire_dtype != "float32":
        rule = "DeepSpeed would also add up in this dtype"
        cure = "Set precision.grad_wire_dtype=float32, or engine=torch."
        raise ConfigError("precision.grad_wire_dtype", precision.grad_wire_dtype, rule, cure)


def _check_installed() -> None:
    cure = f"Run `pip install 'dstrain[deepspeed]'` (deepspeed=={VERSION}), or set engine=torch."
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        raise ConfigError("engine.name", "deepspeed", "DeepSpeed is not installed", cure) from None
    if installed != VERSION:
        rule = f"DeepSpeed {installed} is installed, and private parts of {VERSION} are used"
        raise ConfigError("engine.name", "deepspeed", rule, cure)


@dataclass
class DeepSpeedEngine:
    """The `Engine` of engine/contract.py over DeepSpeed's ZeRO optimizer; see the top of this file."""

    model: Transformer
    config: Config
    groups: Groups
    updates: int = 0
    _logicals: list[LogicalParameter] = field(init=False)
    _zero: "TracedZero" = field(init=False)
    _norm: float | None = None

    @torch.no_grad()
    def __post_init__(self) -> None:
        check_deepspeed(self.config)
        # Otherwise it looks for one, aloud.
        os.environ.setdefault("DS_ACCELERATOR", self.groups.place.device.type)
        from dstrain.engine.zero import make_zero

        self._logicals = logical_parameters(self.model)
        initial = {x.name: x.parameter.data for x in self._logicals}
        for x in self._logicals:
            if not x.keeps_fp32:
                x.parameter.data = x.parameter.data.to(getattr(torch, self.config.precision.compute_dtype))
            # As in engine/sharding.py.
            x.parameter.grad_dtype = torch.float32
        self._zero = make_zero(self._logicals, self.config, self.groups)
        # DeepSpeed takes its master weights from the parameters, which have just been rounded.
        for x, shard, fragment in self._fragments():
            begin = fragment.lp_fragment_address.start
            shard.local.copy_(initial[x.name].view(-1)[begin : begin + shard.local.numel()])

    def _fragments(self) -> Iterator[tuple[LogicalParameter, FlatShard, Any]]:
        """For every parameter that this rank's partition holds a part of: that part's master weights, its record."""
        for x in self._logicals:
            fragment = getattr(x.parameter, RECORD)
            if fragment is not None:
                begin, local = fragment.lp_fragment_address.start, fragment.hp_fragment.detach()
                yield x, FlatShard.of_parts(x.shape, x.offsets, x.part_numel, begin, local), fragment

    def expect(self, gradients: Mapping[str, int]) -> None:
        self._zero.expect(gradients)

    @torch.no_grad()
    def reduce(self) -> float:
        if self.config.engine.zero_stage == 1:
            self._need_gradients()
            self._zero.reduce_gradients()
        self._zero._wait_for_offload_copies()
        squares = torch.zeros((), dtype=torch.float64, device=self.groups.place.device)
        for _, shard in self.gradients():
            squares += square_sum(shard.local).to(squares.device)
        self._norm = all_reduce_sum(squares, self.groups.world).sqrt().item()
        return self._norm

    def _need_gradients(self) -> None:
        """DeepSpeed skips a parameter without gradient, and the ranks that have one would wait for ever."""
        missing = [x.name for x in self._logicals if self._zero.get_gradient_for_reduction(x.parameter) is None]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing)}")

    def gradients(self) -> Iterator[tuple[str, FlatShard]]:
        for x, shard, fragment in self._fragments():
            piece = fragment.get_lp_grad_fragment(getattr(x.parameter, POSITION))
            yield x.name, replace(shard, local=piece.view(-1))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if self._norm is None:
            raise RuntimeError("step() without reduce()")
        clip, adam = self.config.optim.clip_norm, self._zero.optimizer
        if clip and self._norm > clip:
            for _, shard in self.gradients():
                shard.local.mul_(clip / self._norm)
        adam.lr, adam.updates = lr, self.updates
        self._zero.step()
        self._zero.zero_grad()
        self.updates, self._norm = self.updates + 1, None

    def settle(self) -> None:
        """Nothing to wait for: the step has gathered everything."""

    def state(self) -> Shards:
        shards: Shards = {}
        for x, shard, fragment in self._fragments():
            shards[f"master/{x.name}"] = shard
            for kind in ("exp_avg", "exp_avg_sq"):
                moment = fragment.get_optim_state_fragment(kind)
                shards[f"{kind}/{x.name}"] = replace(shard, local=moment)
        return shards

    def loaded(self, step: int) -> None:
        self.updates = step
        self._zero.update_lp_params()
