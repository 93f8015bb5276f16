"""The memory of a job, by pipeline rank: of its data ranks the one that needs most.

    allocated   weights, gradients, optimiser, activations, logits, buffers, workspace: what torch calls the peak of
                allocated memory
    reserved    with what its allocator can't use between them: the peak of reserved memory
    total       with what lies outside of it: the context of the device, and buffers of NCCL

The peak of a rank is the worst moment of its pipeline's table (in_flight.py): what all micro-batches keep then, with
what the backward pass that begins needs beside.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from operator import mul

from dstrain.config.hardware import HardwareConfig
from dstrain.plan.activations import DSTRAIN, TORCHTITAN, Activations, Library
from dstrain.plan.in_flight import Moment, Peaks, alone, peaks
from dstrain.plan.job import Job
from dstrain.plan.network import router_key, visited
from dstrain.plan.stages import Shape, Stages, shapes_of, weights_of
from dstrain.plan.state import State
from dstrain.plan.traffic import row_bytes
from dstrain.schedule.pipeline import Layout
from dstrain.schedule.pipelines.choose import layout

GIB = 2**30
MIB = 2**20
# Of each library of products and each stream that uses it (cuBLAS on Hopper; Transformer Engine takes the same).
WORKSPACE_MIB = 32
# Streams of grouped products, each with its own.
GROUPED_STREAMS = 4
# Of a CUDA context with its kernels, and of NCCL for a group of ranks: assumed.
CONTEXT_GIB = 0.5
GROUP_GIB = 0.25
# Of DeepEP at 7168 channels in BF16 (its Config's size hints): inside a node, up to 8 and from 16 nodes on, and over
# the network for each node.
DEEPEP_HIDDEN = 7168
DEEPEP_NODE_MIB, DEEPEP_NODES_MIB, DEEPEP_MANY_NODES_MIB, DEEPEP_NETWORK_MIB = 384, 432, 840, 48
# Gradients on their way: this many buckets (engine.bucket_mib), in FP32.
BUCKETS, BUCKET_MIB = 2, 32


@dataclass(frozen=True)
class RankMemory:
    """Of a pipeline rank at its peak."""

    rank: int
    # With FP8 copies of those that multiply in FP8.
    weights_gib: float
    gradients_gib: float
    # Master weights and moments.
    optimizer_gib: float
    # What micro-batches keep, and what the backward pass that runs needs beside.
    activations_gib: float
    working_gib: float
    logits_gib: float
    # Tokens, outputs of stages, gradients and weights on their way.
    buffers_gib: float
    # Of libraries.
    workspace_gib: float
    # Reserved and not used.
    fragmentation_gib: float
    # Outside of torch's allocator.
    context_gib: float

    @property
    def parts_gib(self) -> dict[str, float]:
        """By name; they add up to the total."""
        return {field.name.removesuffix("_gib"): getattr(self, field.name) for field in fields(self)[1:]}

    @property
    def allocated_gib(self) -> float:
        """What torch.cuda.max_memory_allocated says."""
        return self.reserved_gib - self.fragmentation_gib

    @property
    def reserved_gib(self) -> float:
        """What torch.cuda.max_memory_reserved says."""
        return self.total_gib - self.context_gib

    @property
    def total_gib(self) -> float:
        """What the device has to have."""
        return sum(self.parts_gib.values())


def rank_memory(
    job: Job,
    hardware: HardwareConfig,
    library: Library = DSTRAIN,
    *,
    shapes: Sequence[Shape] | None = None,
    exact: bool = False,
) -> tuple[RankMemory, ...]:
    """By pipeline rank. `shapes`: what the stages hold, planned for the machine where the job doesn't say it; `exact`
    walks all micro-batches of the step, which find the same peaks in more time."""
    return _Memory(job, hardware, library, shapes).ranks(exact)


class _Memory:
    def __init__(self, job: Job, hardware: HardwareConfig, library: Library, shapes: Sequence[Shape] | None):
        self.job, self.hardware, self.library, self.model = job, hardware, library, job.model
        # Without multiprocessors it is a CPU.
        self.is_gpu = hardware.multiprocessors > 0
        self.shapes = shapes if shapes is not None else _shapes(job, hardware)
        self.layout = _layout(job.pipeline, job.pp, job.chunks)
        self.kept = Activations(job, library, composed=not self.is_gpu)
        # Weights, gradients, optimiser, buffers and workspace of a rank by what it holds.
        self.fixed: dict[tuple[Shape, ...], tuple[float, float, float, float, float]] = {}
        self.state = State(job, library, self.layout.copies, is_gpu=self.is_gpu)

    def ranks(self, exact: bool) -> tuple[RankMemory, ...]:
        job, held = self.job, self.layout.held
        if job.pp > 1:
            found: Peaks = peaks(job.pipeline, job.pp, job.chunks, job.micro_batches, job.overlap, exact=exact)
        else:
            found = alone(max(1, min(job.in_flight, job.micro_batches)))
        return tuple(self._rank(n, own, moments) for n, (own, moments) in enumerate(zip(held, found, strict=True)))

    def _rank(self, rank: int, own: Sequence[int], moments: Sequence[Moment]) -> RankMemory:
        shapes = tuple(self.shapes[n] for n in own)
        stages = [self.by_shape[shape] for shape in shapes]
        activations, working, logits = _most(moments, stages)
        if shapes not in self.fixed:
            ends = any(shape.is_first or shape.is_last for shape in shapes)
            buffers = self.buffers + (self.table_gathers if ends else 0.0)
            self.fixed[shapes] = *self.state.sizes(shapes), buffers, self.workspace + self._placeholders(shapes)
        weights, gradients, optimizer, buffers, workspace = self.fixed[shapes]
        allocated = weights + gradients + optimizer + activations + working + logits + buffers + workspace
        holes = self.kept.holes if any(shape.is_last for shape in shapes) else 0.0
        return RankMemory(
            rank=rank,
            weights_gib=weights / GIB,
            gradients_gib=gradients / GIB,
            optimizer_gib=optimizer / GIB,
            activations_gib=activations / GIB,
            working_gib=working / GIB,
            logits_gib=logits / GIB,
            buffers_gib=buffers / GIB,
            workspace_gib=workspace / GIB,
            fragmentation_gib=(holes + allocated * self.library.fragmentation) / GIB if self.is_gpu else 0.0,
            context_gib=self._context_gib,
        )

    # -- activations --------------------------------------------------------------------------------------------------

    @cached_property
    def by_shape(self) -> dict[Shape, "StageKept"]:
        return {shape: self._stage(shape) for shape in set(self.shapes)}

    def _stage(self, shape: Shape) -> "StageKept":
        kept, moe = self.kept, self.state.moe_layers(shape)
        # MTP modules of a dense model have dense layers.
        dense = shape.dense + shape.mtp * (not self.model.experts)
        layers = dense * kept.dense.live + moe * kept.moe.live
        head = shape.is_last * kept.head.live + shape.mtp * kept.mtp
        heads = shape.is_last + shape.mtp
        logits = heads * kept.logits
        pending = dense * kept.dense.pending + moe * kept.moe.pending + heads * kept.head.pending
        # The backward pass begins at the end, with everything there; what it has passed is gone.
        working = [kept.moe.working if moe else kept.dense.working]
        working += [kept.dense.working - moe * kept.moe.live] if dense and moe else []
        working = [need - head - logits for need in working]
        working += [kept.head.working] if heads else []
        working += [kept.embedding.working - layers - head - logits] if shape.is_first else []
        outputs = kept.stream * kept.value if self.library.keeps_outputs and not shape.is_last else 0.0
        return StageKept(layers + head + outputs, logits, pending, max(0.0, *working))

    # -- buffers and libraries ----------------------------------------------------------------------------------------

    @cached_property
    def buffers(self) -> float:
        job, kept = self.job, self.kept
        receives = self.library.receives_ahead
        if self.library.keeps_outputs:
            receives += job.micro_batches * job.num_stages // job.pp
        found = receives * kept.stream * kept.value if job.pp > 1 else 0.0
        if job.ep > 1 and self.model.experts:
            found += self._exchanged
        if job.zero == 3:
            found += self._gathers(self._largest_layer)
        elif self.library is TORCHTITAN:
            # Gradients of two layers, copied to where they are summed.
            found += 2 * self._largest_layer * job.grad_wire_bytes
        elif self.library.packs and job.dp * job.cp > 1:
            found += BUCKETS * BUCKET_MIB * MIB
        return found

    @property
    def _exchanged(self) -> float:
        """Of tokens on their way, packed, at both ends; of two micro-batches at once where they overlap."""
        job, model = self.job, self.model
        if job.dispatcher == "deepep":
            return _deepep_mib(job.ep, self.hardware.devices_per_node) * model.hidden / DEEPEP_HIDDEN * MIB
        if not self.library.packs or job.dispatcher == "local":
            return 0.0
        rows = model.experts_per_token
        visits = rows if job.dispatcher == "alltoall" else visited(router_key(model), job.ep)
        each = max(row_bytes(job.wire, model.hidden), model.hidden * self.kept.value)
        return 2 * self.kept.spread * visits * job.skew * each * (2 if job.overlap else 1)

    @property
    def _largest_layer(self) -> float:
        model, job = self.model, self.job
        is_moe = model.experts > 0
        experts = model.experts * model.expert_weights / (job.ep * job.etp) if is_moe else 0.0
        return weights_of(model, is_moe=is_moe) / job.tp + experts

    def _gathers(self, weights: float) -> float:
        """Of sharded weights: those of two layers, and the gradients of one, as they are made and as they travel."""
        job = self.job
        return weights * (2 * job.gather_bytes + self.kept.value + job.grad_wire_bytes)

    @property
    def table_gathers(self) -> float:
        """The same of the head, while it is used."""
        if self.job.zero != 3:
            return 0.0
        extra = self.model.embedding_weights / self.job.tp - self._largest_layer
        return max(0.0, extra) * (self.job.gather_bytes + self.kept.value + self.job.grad_wire_bytes)

    @property
    def workspace(self) -> float:
        if not self.is_gpu:
            return 0.0
        streams = 1 + self.library.placeholders + (GROUPED_STREAMS if self.model.experts else 0)
        return streams * WORKSPACE_MIB * MIB

    def _placeholders(self, shapes: Sequence[Shape]) -> float:
        """An empty gradient of each shape of weights."""
        if not self.library.placeholders:
            return 0.0
        model, job = self.model, self.job
        found: set[tuple[float, float]] = {(out / job.tp, wide) for out, wide in model.attention_matrices}
        up = 2 if model.gated else 1
        widths = [model.ffn / job.tp] if any(shape.dense for shape in shapes) else []
        if any(map(self.state.moe_layers, shapes)):
            widths += [model.shared_ffn / job.tp, model.expert_ffn / job.etp]
        for width in widths:
            found |= {(up * width, model.hidden), (model.hidden, width)}
        if any(shape.is_last for shape in shapes):
            found.add((model.vocab / job.tp, model.hidden))
        return sum(out * wide for out, wide in found) * self.kept.value

    @property
    def _context_gib(self) -> float:
        if not self.is_gpu:
            return 0.0
        job = self.job
        groups = sum(size > 1 for size in (job.tp, job.cp, job.pp, job.ep, job.dp, job.expert_dp))
        return CONTEXT_GIB + groups * GROUP_GIB


@dataclass(frozen=True)
class StageKept:
    """Bytes of a micro-batch on a stage."""

    live: float
    logits: float
    pending: float
    working: float


def _most(moments: Sequence[Moment], stages: Sequence[StageKept]) -> tuple[float, float, float]:
    """Bytes of activations, working memory and logits at the worst moment."""
    live, pending = [stage.live + stage.logits for stage in stages], [stage.pending for stage in stages]
    working = [stage.working for stage in stages]

    def needs(moment: Moment) -> float:
        beside = 0.0 if moment.working is None else working[moment.working]
        return sum(map(mul, moment.live, live)) + sum(map(mul, moment.pending, pending)) + beside

    worst = moments[0] if len(moments) == 1 else max(moments, key=needs)
    logits = sum(map(mul, worst.live, (stage.logits for stage in stages)))
    beside = 0.0 if worst.working is None else working[worst.working]
    return needs(worst) - logits - beside, beside, logits


@lru_cache(maxsize=512)
def _layout(name: str, ranks: int, chunks: int) -> Layout:
    return layout(name, ranks, chunks) if ranks > 1 else Layout(((0,),))


def _shapes(job: Job, hardware: HardwareConfig) -> tuple[Shape, ...]:
    """Only a split that the job leaves open asks how fast the machine is."""
    if job.split or job.num_stages == 1:
        return shapes_of(job, job.split or (job.model.layers,))
    return Stages(job, hardware).shapes


def _deepep_mib(ranks: int, per_node: int) -> float:
    nodes = -(-ranks // per_node)
    if nodes == 1:
        return DEEPEP_NODE_MIB
    inside = DEEPEP_NODES_MIB if nodes <= 8 else DEEPEP_MANY_NODES_MIB
    return inside + DEEPEP_NETWORK_MIB * nodes
