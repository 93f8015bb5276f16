"""ZeRO-1 (arXiv:1910.02054) in plain torch: `engine=torch`.

Parameters are packed into flat buckets, in the order in which the backward pass finishes them. Each bucket belongs to
one group of ranks that hold the same values: the data ranks of a stage for dense parameters, the expert-data ranks for
experts, those of the first and the last stage for an embedding that both use.

    backward   a gradient is added to its bucket in FP32; a bucket that has all gradients of all micro-batches leaves at
               once for the reduce-scatter, beside the rest of the backward passes, one bucket after the other
    reduce     the last buckets arrive; the norm of the whole gradient is one sum over all ranks, since every element is
               owned by exactly one of them
    step       each rank updates its share of every bucket and the shares are gathered again, under the update of the
               next bucket and the start of the next forward pass: a module waits for its own bucket only

Per parameter and step a rank sends 4 bytes of gradient (2 with grad_wire_dtype=bfloat16) and the bytes of the compute
dtype, or one byte of a weight that is gathered in FP8 (fp8.py), times (n - 1) / n where the ranks share a node; over
several nodes as comm/flat.py says.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.comm.collectives import Peers, all_reduce_sum
from dstrain.comm.flat import FlatCollectives
from dstrain.comm.lane import Flight
from dstrain.config.precision import gathers_fp8
from dstrain.config.schema import Config
from dstrain.engine.fp8 import Fp8Gather, stacks_of
from dstrain.engine.optimizer import AdamShard, square_sum
from dstrain.engine.state import FlatShard, Shards
from dstrain.mesh.groups import Groups
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import LogicalParameter, holders, logical_parameters
from dstrain.parallel.precision import modules_in_fp8


@dataclass(frozen=True)
class Slot:
    """A parameter's place in a bucket."""

    logical: LogicalParameter
    start: int

    @property
    def end(self) -> int:
        return self.start + self.logical.parameter.numel()


def share_of(length: int, index: int, size: int) -> slice:
    """The range of a flat tensor that rank `index` of a group of `size` ranks owns: equal ones."""
    return slice(index * length // size, (index + 1) * length // size)


def own_share(length: int, peers: Peers | None) -> slice:
    """This rank's range of a flat tensor that the group divides."""
    return share_of(length, peers.index, peers.size) if peers else slice(0, length)


@dataclass
class Bucket:
    """Parameters that are reduced, updated and gathered together."""

    slots: list[Slot]
    peers: Peers | None
    # Flat parameters in the compute dtype; the parameters are views of it.
    compute: Tensor
    # Flat gradient sum of this rank, FP32.
    grad: Tensor
    adam: AdamShard
    # Parameters of FP8 products that travel in FP8; None: they travel as they are.
    fp8: Fp8Gather | None = None
    # Gradients of this step that are yet to come.
    missing: int = 0
    reducing: Flight | None = None
    gathering: Flight | None = None
    # This rank's share of the reduced gradient, from its arrival to the step: the same range of `grad`, reused.
    grad_share: Tensor | None = None

    @property
    def share(self) -> slice:
        """This rank's range of the flat tensors."""
        return own_share(len(self.compute), self.peers)

    def pieces(self, share_tensor: Tensor) -> Iterator[tuple[str, FlatShard]]:
        """Cuts a tensor laid out like this rank's share into the parts of logical tensors, by parameter name."""
        own = self.share
        for slot in self.slots:
            first, last = max(slot.start, own.start), min(slot.end, own.stop)
            if first < last:
                local = share_tensor[first - own.start : last - own.start]
                x = slot.logical
                yield x.name, FlatShard.of_parts(x.shape, x.offsets, x.part_numel, first - slot.start, local)

    def reduce(self, flat: FlatCollectives, wire: torch.dtype) -> None:
        """Starts the sum over the ranks; `land` waits."""
        if self.peers is not None:
            self.reducing = flat.reduce_scatter(self.grad, self.peers, wire, "grad")

    def land(self) -> None:
        """The share of the reduced gradient is there."""
        if self.reducing is not None:
            self.reducing.wait()
            self.reducing = None
        self.grad_share = self.grad[self.share]

    def refresh(self, flat: FlatCollectives) -> None:
        """Master weights into the compute dtype, then to the other ranks; `ready` waits."""
        if self.fp8 is not None:
            self.gathering = self.fp8.start(flat, self.adam.master, self.compute)
            return
        mine = self.compute[self.share]
        if mine.data_ptr() != self.adam.master.data_ptr():
            mine.copy_(self.adam.master)
        if self.peers is not None:
            self.gathering = flat.all_gather(self.compute, self.peers, "param")

    @property
    def gathered_bytes(self) -> tuple[int, ...]:
        """Of the buffers that `refresh` gathers."""
        return self.fp8.sent_sizes if self.fp8 is not None else (self.compute.nbytes,)

    def ready(self) -> None:
        """The parameters are those of the last update."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None


@torch.no_grad()
def make_bucket(
    logicals: list[LogicalParameter],
    peers: Peers | None,
    compute_dtype: torch.dtype,
    moments_dtype: torch.dtype,
    *,
    in_fp8: bool = False,
) -> Bucket:
    """Moves the parameters into flat storage; `logicals` agree in everything but name and shape."""
    starts, total = [], 0
    for logical in logicals:
        starts.append(total)
        total += logical.parameter.numel()
    ranks = peers.size if peers else 1
    # Shares are whole multiples of 16 elements, so that every view stays aligned for vector loads.
    padded = ceil(total / (16 * ranks)) * 16 * ranks
    device = logicals[0].parameter.device
    wide = torch.zeros(padded, dtype=torch.float32, device=device)
    for logical, start in zip(logicals, starts, strict=True):
        wide[start : start + logical.parameter.numel()] = logical.parameter.detach().flatten()
    compute = wide.to(compute_dtype, copy=in_fp8)
    fp8 = None
    if in_fp8:
        stacks = stacks_of(starts, [x.parameter.shape for x in logicals])
        shares = [share_of(padded, rank, ranks) for rank in range(ranks)]
        fp8 = Fp8Gather(stacks, shares, peers, device)
        if not compute.is_meta:
            fp8.round(wide, compute)
    share = own_share(padded, peers)
    # In FP32 the master weights are this rank's share of the compute parameters themselves, unless these are rounded.
    master = compute[share] if compute_dtype == torch.float32 and fp8 is None else wide[share].clone()
    slots = [Slot(logical, start) for logical, start in zip(logicals, starts, strict=True)]
    for slot in slots:
        slot.logical.parameter.data = compute[slot.start : slot.end].view_as(slot.logical.parameter)
        # A function that adds up in FP32 may hand over its gradient as it is; autograd would round it.
        slot.logical.parameter.grad_dtype = torch.float32
    adam = AdamShard.of(master, moments_dtype, logicals[0].decays)
    return Bucket(slots, peers, compute, torch.zeros_like(wide), adam, fp8)


def _pack(logicals: list[LogicalParameter], limit_elements: int, in_fp8: Set[str]) -> list[list[LogicalParameter]]:
    """What shares a bucket, in the order in which the backward pass completes the buckets; those of `in_fp8` share none
    with others.

    Buckets leave in this order, so one that completes late must not stand before one that completes early. The backward
    pass finishes parameters in about the reverse of their order in the model.
    """
    finished = list(reversed(logicals))
    kinds: dict[tuple[bool, ...], list[LogicalParameter]] = {}
    for x in finished:
        kinds.setdefault((x.is_expert, x.at_both_ends, x.decays, x.keeps_fp32, x.name in in_fp8), []).append(x)
    runs = [run for alike in kinds.values() for run in _runs(alike, limit_elements)]
    position = {logical.name: n for n, logical in enumerate(finished)}
    # What two stages share waits for the slower one, and nothing is to wait behind it.
    return sorted(runs, key=lambda run: (run[0].at_both_ends, position[run[-1].name]))


def _runs(logicals: list[LogicalParameter], limit_elements: int) -> Iterator[list[LogicalParameter]]:
    """Runs of at most `limit_elements` elements, and at least one parameter."""
    run: list[LogicalParameter] = []
    for logical in logicals:
        if run and sum(x.parameter.numel() for x in run) + logical.parameter.numel() > limit_elements:
            yield run
            run = []
        run.append(logical)
    if run:
        yield run


def make_buckets(model: Transformer, config: Config, groups: Groups) -> list[Bucket]:
    """All parameters of the model, in the order in which their buckets leave."""
    buckets, precision = [], config.precision
    moments_dtype = getattr(torch, precision.moments_dtype)
    in_fp8 = _gathered_in_fp8(model, config)
    for run in _pack(logical_parameters(model), config.engine.bucket_mib * 2**20 // 4, in_fp8):
        dtype = torch.float32 if run[0].keeps_fp32 else getattr(torch, precision.compute_dtype)
        peers, in_blocks = holders(run[0], groups), run[0].name in in_fp8
        buckets.append(make_bucket(run, peers, dtype, moments_dtype, in_fp8=in_blocks))
    return buckets


def _gathered_in_fp8(model: Transformer, config: Config) -> set[str]:
    """The names of the parameters that travel in FP8."""
    modules = modules_in_fp8(model, config.precision) if gathers_fp8(config) else {}
    return {f"{name}.{x}" for name, module in modules.items() for x, _ in module.named_parameters(recurse=False)}


def _wait_for(buckets: list[Bucket], module: nn.Module, args: Any) -> None:
    for bucket in buckets:
        bucket.ready()


@dataclass
class ShardedEngine:
    """The `Engine` of engine/contract.py over buckets; see the top of this file."""

    model: Transformer
    config: Config
    groups: Groups
    updates: int = 0
    buckets: list[Bucket] = field(default_factory=list)
    _started: int = 0
    _norm: float | None = None

    def __post_init__(self) -> None:
        self._flat = FlatCollectives(self.groups.trace)
        self.buckets += make_buckets(self.model, self.config, self.groups)
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.logical.parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket, slot))
        self._wait_before_use()

    def _wait_before_use(self) -> None:
        """Every module waits, when it is called, for the gather of its own parameters."""
        bucket_of = {id(s.logical.parameter): bucket for bucket in self.buckets for s in bucket.slots}
        for module in self.model.modules():
            needed = {id(b): b for b in (bucket_of[id(p)] for p in module.parameters(recurse=False))}
            if needed:
                module.register_forward_pre_hook(partial(_wait_for, list(needed.values())))

    @torch.no_grad()
    def _arrived(self, bucket: Bucket, slot: Slot, parameter: Tensor) -> None:
        if parameter.grad is None:
            # Autograd came past; the gradient is computed later (precision/weight_gradients.py).
            return
        bucket.grad[slot.start : slot.end] += parameter.grad.flatten()
        parameter.grad = None
        bucket.missing -= 1
        if bucket.missing == 0:
            self._start_reductions()

    def _start_reductions(self) -> None:
        """Starts complete buckets in their fixed order, which is the same on every rank."""
        while self._started < len(self.buckets) and self.buckets[self._started].missing == 0:
            self.buckets[self._started].reduce(self._flat, getattr(torch, self.config.precision.grad_wire_dtype))
            self._started += 1

    def expect(self, gradients: Mapping[str, int]) -> None:
        for bucket in self.buckets:
            bucket.adam.forget()
            bucket.missing = sum(gradients[slot.logical.name] for slot in bucket.slots)

    @torch.no_grad()
    def reduce(self) -> float:
        if self._started < len(self.buckets):
            late = self.buckets[self._started]
            named = late.slots[0].logical.name
            raise RuntimeError(f"{late.missing} gradients have not come: of {named} or its neighbours in a bucket")
        for bucket in self.buckets:
            bucket.land()
        squares = torch.zeros((), dtype=torch.float64, device=self.groups.place.device)
        for bucket in self.buckets:
            squares += square_sum(bucket.grad[bucket.share])
        self._norm = all_reduce_sum(squares, self.groups.world).sqrt().item()
        return self._norm

    def gradients(self) -> Iterator[tuple[str, FlatShard]]:
        for bucket in self.buckets:
            if bucket.grad_share is None:
                raise RuntimeError("gradients are there between reduce() and step() only")
            yield from bucket.pieces(bucket.grad_share)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if self._norm is None:
            raise RuntimeError("step() without reduce()")
        clip = self.config.optim.clip_norm
        # What the next forward pass needs first is gathered first.
        for bucket in reversed(self.buckets):
            if bucket.grad_share is None:
                raise RuntimeError("step() without reduce()")
            if clip and self._norm > clip:
                bucket.grad_share.mul_(clip / self._norm)
            bucket.adam.update(bucket.grad_share, lr, self.updates, self.config.optim)
            bucket.refresh(self._flat)
            bucket.grad_share = None
            bucket.grad.zero_()
        self.updates, self._started, self._norm = self.updates + 1, 0, None

    def settle(self) -> None:
        """Waits for every gather: before parameters are read other than through the model's forward pass."""
        for bucket in self.buckets:
            bucket.ready()

    def state(self) -> Shards:
        # A gather that ended later would write the old weights over loaded ones.
        self.settle()
        shards: Shards = {}
        for bucket in self.buckets:
            for kind, tensor in bucket.adam.tensors().items():
                shards.update({f"{kind}/{name}": shard for name, shard in bucket.pieces(tensor)})
        return shards

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        self.updates = step
        for bucket in self.buckets:
            bucket.adam.take_back()
            bucket.refresh(self._flat)
        self.settle()
