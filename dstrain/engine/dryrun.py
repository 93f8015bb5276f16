"""One rank of a layout without its memory and without the others: what it holds, what it computes, what it sends.

The rank is built by the code that trains, on torch's meta device, where tensors have shapes and no values, with its
real process groups in a world that needs no other process. One micro-batch goes forward and backward through each of
its stages, phase by phase, under the runtime of every training run (schedule/run.py). Taken as given is only what other
ranks would send: equally many rows for every expert, and what comes from the next stages in the shape of our own.

What is sent in a step is what the micro-batch sends, times those of the step, and the buckets of the engine.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor

from dstrain.comm.flat import sent_bytes as shared_bytes
from dstrain.comm.trace import STAGES, Transfer
from dstrain.config.schema import Config
from dstrain.dispatch.balanced import BalancedDispatcher, sent_bytes
from dstrain.dispatch.choose import Task, choose, kept_tile
from dstrain.engine.loop import StartWalk
from dstrain.engine.recipe import full_batch
from dstrain.engine.sharding import Bucket, make_buckets
from dstrain.mesh.groups import Groups, Place, connect, disconnect, mesh_of
from dstrain.mesh.topology import Link
from dstrain.model.layer import End, Walk, walk_whole
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import build_model, logical_parameters
from dstrain.precision.flops import FlopCounter
from dstrain.schedule.action import Pass
from dstrain.schedule.choose import Orders, Program
from dstrain.schedule.run import DIRECTIONS, run_stages
from dstrain.schedule.table import actions, peak_in_flight

META = torch.device("meta")
# "dispatch", "combine", "pipe", "grad" or "param", and "node" or "network" -> bytes that the rank sends.
Sent = Counter[tuple[str, str]]


@dataclass(frozen=True)
class StageRun:
    """A micro-batch through one stage of the rank."""

    number: int
    layers: range
    # What else is here: embedding, head, mtp.
    others: tuple[str, ...]
    # None where the model begins or ends.
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    # Operations of matrix products; what is recomputed is part of the input gradients.
    forward_flops: int
    input_flops: int
    weight_flops: int
    sent: Sent
    # How many of a step pass here.
    micro_batches: int


@dataclass(frozen=True)
class RankRun:
    """A rank in a step. An embedding that two of its stages use counts once."""

    rank: int
    pp: int
    stages: tuple[StageRun, ...]
    dense_parameters: int
    expert_parameters: int
    # Weights in the compute dtype and FP32 gradients, both whole.
    parameter_bytes: int
    gradient_bytes: int
    # This rank's share of master weights and moments.
    optimizer_bytes: int
    # The most passes of a micro-batch through a stage that have begun and not ended.
    peak_live: int
    sent: Sent
    # Why this transport, and which table.
    dispatch: str
    schedule: str
    # Elements of every tensor of which the rank holds a part, all experts included.
    tensors: dict[str, int] = field(repr=False)


def micro_batches(config: Config) -> int:
    """Of a rank in a step with the full batch; `config` has a number as mesh.dp."""
    return full_batch(config.train) // (mesh_of(config).data * config.train.micro_batch)


def run_rank(config: Config, pp: int) -> RankRun:
    """The rank with data index 0 of a pp index; `config` has passed its checks and has a number as mesh.dp.

    Raises IllegalTable if its order of work breaks a rule, RuntimeError if a parameter gets no gradient or a stage has
    an output that the next one can't take.
    """
    mesh = mesh_of(config)
    place = Place(mesh.rank(pp, 0, 0), mesh.world, META)
    groups = connect(mesh, place, ranks_per_node=config.hardware.devices_per_node)
    try:
        return _run(config, groups)
    finally:
        disconnect()


def _run(config: Config, groups: Groups) -> RankRun:
    choice = choose(config, groups)
    sends = sent_bytes(choice.kind, Task.of(config, groups, choice.wire))
    held = groups.mesh.local_experts(config.model.num_experts, groups.coordinate.ep)
    dispatcher = BalancedDispatcher(len(held), sends, groups.trace, kept_tile(config, choice.wire))
    model = build_model(config, groups, dispatcher)
    buckets = make_buckets(model, config, groups)
    # As in training: where nothing travels, a stage is one stretch.
    blocks = model.blocks if groups.ep else (0,) * len(model.blocks)
    orders = Orders(config, groups, blocks)
    program = orders.program(micro_batches(config))
    stages = tuple(_pass(config, groups, model, blocks, Counter(stage for stage, _ in program.courses)))
    logicals = logical_parameters(model)
    return RankRun(
        rank=groups.place.rank,
        pp=groups.coordinate.pp,
        stages=stages,
        dense_parameters=sum(x.parameter.numel() for x in logicals if not x.is_expert),
        expert_parameters=sum(x.parameter.numel() for x in logicals if x.is_expert),
        parameter_bytes=sum(bucket.compute.nbytes for bucket in buckets),
        gradient_bytes=sum(bucket.grad.nbytes for bucket in buckets),
        optimizer_bytes=sum(map(_optimizer_bytes, buckets)),
        peak_live=peak_in_flight(program.table),
        sent=_of_stages(stages) + _of_pipe(config, groups, program) + _of_buckets(config, buckets),
        dispatch=choice.reason,
        schedule=orders.reason,
        tensors={x.name: prod(x.shape) for x in logicals},
    )


# -- a micro-batch ----------------------------------------------------------------------------------------------------


class _Edges:
    """The `Edges` of a rank without neighbours: what they send is like what it sends."""

    def __init__(self, like: Tensor, num_stages: int):
        self.like, self.num_edges = like, num_stages - 1
        self.shapes: dict[tuple[Pass, int], tuple[int, ...]] = {}

    def send(self, work: Pass, edge: int, micro_batch: int, x: Tensor) -> None:
        if (x.shape, x.dtype) != (self.like.shape, self.like.dtype):
            took = f"{list(self.like.shape)} in {self.like.dtype}"
            raise RuntimeError(f"edge {edge} was given {list(x.shape)} in {x.dtype}, and its other end takes {took}")
        self.shapes[work, edge] = tuple(x.shape)

    def take(self, work: Pass, edge: int, micro_batch: int) -> Tensor | None:
        return torch.empty_like(self.like) if 0 <= edge < self.num_edges else None


def _pass(
    config: Config, groups: Groups, model: Transformer, blocks: Sequence[int], courses: Mapping[int, int]
) -> Iterator[StageRun]:
    """A micro-batch through each of the rank's stages; `courses`: how many of a step take each."""
    edges, trace = _Edges(_between_stages(config), len(blocks)), groups.trace
    counter = FlopCounter(lambda: (trace.label.stage or 0, trace.label.direction))
    table = [action for stage in model.own for action in actions(blocks[stage], 0, stage)]
    with counter:
        run_stages(table, dict(_starts(config, model, blocks)), blocks, edges, trace)
    for logical in logical_parameters(model):
        if logical.parameter.grad is None:
            raise RuntimeError(f"{logical.name} is held and gets no gradient")
    transfers = trace.take().transfers
    for stage in model.own:
        forward, backward, weight = (counter.flops[stage, DIRECTIONS[work]] for work in Pass)
        yield StageRun(
            number=stage,
            layers=model.stages[stage].layers,
            others=_others(model, stage),
            input_shape=edges.shapes.get((Pass.BACKWARD, stage - 1)),
            output_shape=edges.shapes.get((Pass.FORWARD, stage)),
            forward_flops=forward,
            input_flops=backward,
            weight_flops=weight,
            sent=_of_transfers(transfer for transfer in transfers if (transfer.label.stage or 0) == stage),
            micro_batches=courses[stage],
        )


def _between_stages(config: Config) -> Tensor:
    shape = (config.train.micro_batch, config.train.seq_len, config.model.hidden_size)
    return torch.empty(shape, dtype=getattr(torch, config.precision.compute_dtype), device=META)


def _starts(config: Config, model: Transformer, blocks: Sequence[int]) -> Iterator[tuple[tuple[int, int], StartWalk]]:
    """By course, as a training step has them (engine/loop.py)."""
    train = config.train
    shape = (train.micro_batch, train.seq_len + 1 + config.model.mtp.depth)
    tokens_BS = torch.empty(shape, dtype=torch.int64, device=META)

    def start(stage: int, x_BTD: Tensor | None) -> Walk[None]:
        walk = model.walk_stage(stage, tokens_BS, x_BTD, full_batch(train))
        end = (yield from walk) if blocks[stage] else walk_whole(walk)
        return End(end.roots, None, end.output)

    yield from (((stage, 0), partial(start, stage)) for stage in model.own)


def _others(model: Transformer, stage: int) -> tuple[str, ...]:
    held = model.stages[stage]
    found = ("embedding",) if held.is_first else ()
    return (*found, "head", *(("mtp",) if model.config.mtp.depth else ())) if held.is_last else found


# -- bytes ------------------------------------------------------------------------------------------------------------


def _optimizer_bytes(bucket: Bucket) -> int:
    adam = bucket.adam
    # Under FP32 the master weights are a part of the compute parameters, unless these are rounded.
    master_bytes = 0 if bucket.compute.dtype is torch.float32 and bucket.fp8 is None else adam.master.nbytes
    return master_bytes + adam.exp_avg.nbytes + adam.exp_avg_sq.nbytes


def _of_transfers(transfers: Iterable[Transfer]) -> Sent:
    sent: Sent = Counter()
    for transfer in transfers:
        for link, num_bytes in transfer.sent_bytes.items():
            sent[transfer.kind, link.value] += num_bytes
    return sent


def _of_stages(stages: Iterable[StageRun]) -> Sent:
    sent: Sent = Counter()
    for stage in stages:
        sent.update({place: num_bytes * stage.micro_batches for place, num_bytes in stage.sent.items()})
    return sent


def _of_pipe(config: Config, groups: Groups, program: Program) -> Sent:
    """Outputs and their gradients, to the stages on other ranks."""
    sent: Sent = Counter()
    here = groups.coordinate
    for target in program.traffic.targets.values() if program.traffic else ():
        link = groups.topology.link(groups.place.rank, groups.mesh.rank(target, here.dp, here.ep))
        if link is not Link.SELF:
            sent[STAGES, link.value] += _between_stages(config).nbytes
    return sent


def _of_buckets(config: Config, buckets: Sequence[Bucket]) -> Sent:
    """Sums of gradients, and gathering the new parameters."""
    sent: Sent = Counter()
    wire = getattr(torch, config.precision.grad_wire_dtype)
    for bucket in buckets:
        if bucket.peers is not None:
            gathered = (("param", num_bytes) for num_bytes in bucket.gathered_bytes)
            for kind, num_bytes in (("grad", bucket.grad.numel() * wire.itemsize), *gathered):
                for link, part in shared_bytes(bucket.peers, num_bytes).items():
                    sent[kind, link.value] += part
    return sent
