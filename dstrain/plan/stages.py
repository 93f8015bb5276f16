"""Layers put together to the stages of a pipeline, by the phases of a schedule table, and what a step ends with.

`step_times` is what both forms of a prediction start from: step.py sums it up, simulation.py plays the table with it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from heapq import heapify, heapreplace
from itertools import accumulate, pairwise

from dstrain.config.hardware import HardwareConfig
from dstrain.config.machine import check_predictable
from dstrain.plan.architecture import Architecture
from dstrain.plan.job import Job
from dstrain.plan.layer import Kernels, Kinds, LayerWork, Work, added
from dstrain.plan.network import Group, Network
from dstrain.plan.times import Reduction, StepTimes
from dstrain.schedule.action import Pass, Phase
from dstrain.schedule.pipelines.choose import layout
from dstrain.schedule.simulate import Costs

# Kinds of kernels that a name of `Job.recompute` runs again.
AGAIN = {
    "norm": ("norm",),
    "mla_up": ("mla up", "rope"),
    "core": ("attention",),
    "swiglu": ("activation",),
}
# Multiprocessors that kernels of transfers hold: DeepEP's in DeepSeek-V3's training (arXiv:2412.19437, section 3.2.2).
TRANSFER_PROCESSORS = 20


@dataclass(frozen=True)
class Shape:
    """What a stage holds."""

    dense: int
    moe: int
    is_first: bool
    is_last: bool
    # MTP modules, each of which also uses the head.
    mtp: int = 0


# Milliseconds forward, for input gradients, for weight gradients.
Passes = tuple[float, float, float]


def summed(passes: Iterable[Passes]) -> Passes:
    forward, into, weight = map(sum, zip(*passes, strict=True))
    return forward, into, weight


@dataclass(frozen=True)
class Layer:
    """A layer as phases, what the backward pass repeats and what waiting for the host adds included."""

    attend: Passes
    shared: Passes
    experts: Passes
    # Transfers of tokens, out and home.
    out_ms: float
    home_ms: float
    # Everything of a micro-batch, by kind.
    kinds: Kinds

    @property
    def passes(self) -> Passes:
        return summed((self.attend, self.shared, self.experts))


class Layers:
    """What the layers of a job take on a machine, and what is before and behind them."""

    def __init__(self, job: Job, hardware: HardwareConfig):
        self.job, self.hardware, self.model = job, hardware, job.model
        self.kernels, self.network = Kernels(job, hardware), Network(hardware)

    @cached_property
    def dense(self) -> Layer:
        return self._layer(self.kernels.dense_layer, weights_of(self.model, is_moe=False) / self.job.tp)

    @cached_property
    def moe(self) -> Layer:
        experts = self.model.experts * self.model.expert_weights / (self.job.ep * self.job.etp)
        return self._layer(self.kernels.moe_layer, weights_of(self.model, is_moe=True) / self.job.tp + experts)

    def _layer(self, work: LayerWork, weights: float) -> Layer:
        parts = [self._repeated(part) for part in (work.attend, work.shared, work.experts)]
        kinds = added(*(passes for part in parts for passes in part.passes))
        phases = [part.seconds for part in parts]
        forward, into, weight = summed(phases)
        launch = self.hardware.host_us * 1e-6
        launched, awaited = [count * launch for count in work.launches], work.awaited * launch
        if self.job.cuda_graph:
            # Kernels that the host makes for each expert can't be part of a graph.
            awaited *= self.job.launch_per_expert
            launched = [awaited, awaited]
        # A CPU launches and computes by turns.
        beside = (forward, into + weight) if self.hardware.multiprocessors else (0.0, 0.0)
        # Its cores also carry what travels, whatever runs beside.
        share, sent = self.hardware.transfer_host_share, work.exchanges
        carried = share * (sent.out_s + sent.home_s)
        waits = carried + max(awaited, launched[0] - beside[0]), carried + max(0.0, launched[1] - beside[1])
        gathers = self._gathers(weights, forward, into + weight)
        held = self._held_up(work, weights, forward + into + weight)
        ahead = (held + (waits[0] + gathers[0]) / forward) * 1e3
        back = (held + (waits[1] + gathers[1]) / (into + weight)) * 1e3
        kinds["shared with transfers"] += (held - 1) * (forward + into + weight)
        kinds["host"] += sum(waits)
        kinds["sharded weights"] += sum(gathers)
        attend, shared, experts = ((f * ahead, i * back, w * back) for f, i, w in phases)
        out_ms, home_ms = ((1 - share) * seconds * 1e3 for seconds in (sent.out_s, sent.home_s))
        return Layer(attend, shared, experts, out_ms, home_ms, _in_ms(kinds))

    def _held_up(self, work: LayerWork, weights: float, compute_s: float) -> float:
        """How much longer compute takes because kernels of transfers that run beside it hold multiprocessors."""
        if not self.hardware.multiprocessors:
            return 1.0
        beside_s = 2 * (work.exchanges.out_s + work.exchanges.home_s) if self.job.overlap else 0.0
        if self.job.zero == 3:
            num_bytes = weights * (2 * self.job.gather_bytes + self.job.grad_wire_bytes)
            beside_s += self.network.collective_s(num_bytes, _data_group(self.job, self.hardware))
        return 1 + TRANSFER_PROCESSORS / self.hardware.multiprocessors * min(1.0, beside_s / compute_s)

    def _gathers(self, weights: float, forward_s: float, backward_s: float) -> tuple[float, float]:
        """Of sharded weights, what gathering them, and summing their gradients, takes beyond the compute it runs
        under."""
        if self.job.zero < 3:
            return 0.0, 0.0
        group = _data_group(self.job, self.hardware)
        gather_s = self.network.collective_s(weights * self.job.gather_bytes, group)
        reduce_s = self.network.collective_s(weights * self.job.grad_wire_bytes, group)
        return max(0.0, gather_s - forward_s), max(0.0, gather_s + reduce_s - backward_s)

    def _repeated(self, work: Work) -> Work:
        """With what the backward pass computes again."""
        names, forward = self.job.recompute, work.forward
        if not names:
            return work
        if self.job.repeats_core and "mla_up" in names:
            names |= {"core"}
        again = {kind: forward[kind] for name in names for kind in AGAIN.get(name, ()) if kind in forward}
        is_attention = "attention" in forward
        whole = {"layer", "attend"} if is_attention else {"layer", "moe"}
        if "permute" in forward:
            whole.add("experts")
        if names & whole:
            again = dict(forward)
        elif "sac" in names:
            again = {kind: seconds * SAC.get(kind, 1.0) for kind, seconds in forward.items()}
        return replace(work, input=added(work.input, again))

    @cached_property
    def embedding(self) -> Passes:
        return _ms(self.kernels.embedding.seconds)

    @cached_property
    def head(self) -> Passes:
        return _ms(self.kernels.head.seconds)

    @cached_property
    def mtp(self) -> Passes:
        """Of a module what is no layer."""
        return _ms(self.kernels.mtp.seconds)


@lru_cache(maxsize=4096)
def _layers(job: Job, hardware: HardwareConfig) -> Layers:
    return Layers(job, hardware)


def _alike(job: Job) -> Job:
    """One job for all that differ in their pipeline alone, which layers know nothing of: a search asks for thousands.
    Sharded weights are gathered by all devices of a stage."""
    if job.zero == 3:
        return job
    gpus = job.tp * job.cp * job.ep * job.etp
    sequences = gpus // (job.tp * job.cp) * job.micro_batch * min(job.micro_batches, 2)
    return replace(job, gpus=gpus, sequences=sequences, pp=1, pipeline="1f1b", chunks=1, split=())


class Stages:
    """The stages of a job on a machine. Raises ConfigError for a machine that does not say what the job depends on."""

    def __init__(self, job: Job, hardware: HardwareConfig):
        check_predictable(hardware, job.gpus)
        self.job, self.hardware, self.model = job, hardware, job.model
        self.layers, self.network = _layers(_alike(job), hardware), Network(hardware)
        # Whether tokens travel: otherwise a stage is one stretch.
        self.spreads = job.ep > 1 and job.dispatcher != "local" and job.model.moe_layers > 0

    def ends(self, shape: Shape) -> tuple[Passes, Passes]:
        """What a stage has before its first and behind its last layer, MTP layers without."""
        none = (0.0, 0.0, 0.0)
        behind = summed([none] + [self.layers.head] * shape.is_last + [self.layers.mtp] * shape.mtp)
        return self.layers.embedding if shape.is_first else none, behind

    def passes(self, shape: Shape) -> Passes:
        """All compute of a stage."""
        layers = [self.layers.dense.passes] * shape.dense if shape.dense else []
        count = shape.moe + shape.mtp
        layers += [self.layers.moe.passes] * count if count else []
        return summed([*layers, *self.ends(shape)])

    def costs(self, shape: Shape) -> Costs:
        """By phase: dense layers come before those with experts."""
        before, behind = self.ends(shape)
        if not self.spreads:
            return Costs(dict(self._by_pass(Phase.ATTEND, 0, self.passes(shape))), {})
        blocks, moe = shape.moe + shape.mtp, self.layers.moe
        stretches = [moe.attend] * blocks + [behind]
        dense = [self.layers.dense.passes] * shape.dense if shape.dense else []
        stretches[0] = summed([stretches[0], before, *dense])
        compute_ms: dict[tuple[Pass, Phase, int], float] = {}
        for n, each in enumerate(stretches):
            compute_ms |= dict(self._by_pass(Phase.ATTEND, n, each))
        transfer_ms = {}
        for n in range(blocks):
            compute_ms |= dict(self._by_pass(Phase.SHARED, n, moe.shared))
            compute_ms |= dict(self._by_pass(Phase.EXPERTS, n, moe.experts))
            transfer_ms[Pass.FORWARD, "dispatch", n] = transfer_ms[Pass.BACKWARD, "combine", n] = moe.out_ms
            transfer_ms[Pass.FORWARD, "combine", n] = transfer_ms[Pass.BACKWARD, "dispatch", n] = moe.home_ms
        return Costs(compute_ms, transfer_ms)

    def _by_pass(self, phase: Phase, block: int, passes: Passes) -> Iterator[tuple[tuple[Pass, Phase, int], float]]:
        forward, into, weight = passes
        if not self.job.splits_weights:
            into, weight = into + weight, 0.0
        return (((work, phase, block), ms) for work, ms in zip(Pass, (forward, into, weight), strict=True))

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of every stage, in the order of the model."""
        return shapes_of(self.job, self.job.split or self._planned())

    def _planned(self) -> list[int]:
        """Layers of each stage, so that none takes much longer than the others: embedding and head count as the layers
        that they take as long as."""
        stages = self.job.num_stages
        one = sum((self.layers.moe if self.model.moe_layers else self.layers.dense).passes)
        extra = [0.0] * stages
        extra[0] += sum(self.layers.embedding) / one
        extra[-1] += sum(self.layers.head) / one
        extra[_mtp_stage(self.job, stages)] += self.model.mtp * (sum(self.layers.mtp) + one) / one
        # Every stage gets one before any gets two, unless a stage may do without.
        waiting = [(each if self.job.free_split else -1.0, -n) for n, each in enumerate(extra)]
        heapify(waiting)
        sizes = [0] * stages
        for _ in range(self.model.layers):
            # The later of two equal ones: the first stages keep activations longest.
            shortest = -waiting[0][1]
            sizes[shortest] += 1
            heapreplace(waiting, (sizes[shortest] + extra[shortest], -shortest))
        return sizes

    # -- the end of a step --------------------------------------------------------------------------------------------

    def held(self, shape: Shape) -> tuple[float, float]:
        """Parameters of a stage on a rank: experts, and everything else."""
        model, job = self.model, self.job
        moe = shape.moe + shape.mtp
        experts = moe * model.experts * model.expert_weights / (job.ep * job.etp)
        dense = shape.dense * weights_of(model, is_moe=False) + moe * weights_of(model, is_moe=True)
        tables = (shape.is_first + (shape.is_last and not (model.tied and shape.is_first))) * model.embedding_weights
        return experts, (dense + tables + shape.mtp * 2 * model.hidden**2) / job.tp

    def reduction(self, shapes: Iterable[Shape], copies: int) -> Reduction:
        """Of a rank that holds these stages, each of which `copies` ranks of its pipeline hold."""
        job, held = self.job, [self.held(shape) for shape in shapes]
        experts, others = sum(e for e, _ in held), sum(o for _, o in held)
        groups = (
            (experts, _expert_group(job, self.hardware), job.expert_dp),
            (others, _data_group(job, self.hardware), job.dp * job.cp),
        )
        reduce_s, gather_s, update_s = 0.0, 0.0, self.hardware.step_us * 1e-6
        for parameters, group, ranks in groups:
            if not parameters:
                continue
            owned = parameters / (ranks * copies if job.zero else 1)
            each = 2 * job.master_bytes + 4 * job.moment_bytes + job.update_bytes
            update_s += owned * each / self.layers.kernels.device.memory_speed
            if job.zero < 3:
                reduce_s += self.network.collective_s(parameters * job.grad_wire_bytes, group) * (1 if job.zero else 2)
                gather_s += self.network.collective_s(parameters * job.gather_bytes, group) * (1 if job.zero else 0)
        return Reduction(reduce_s * 1e3, gather_s * 1e3, update_s * 1e3)

    @cached_property
    def shares_links(self) -> bool:
        """Whether tokens take the links that gradients and weights take: inside nodes, or between them."""
        job, per_node = self.job, self.hardware.devices_per_node
        groups = _data_group(job, self.hardware), _expert_group(job, self.hardware)
        tokens_cross = Group.of(job.ep, job.etp, per_node).nodes > 1
        return self.spreads and tokens_cross == any(group.nodes > 1 for group in groups)

    def carried_ms(self, shape: Shape) -> float:
        """Of a micro-batch on a stage in one direction: how long its tokens keep from those links what else would
        take them."""
        moe = self.layers.moe if self.shares_links and shape.moe + shape.mtp else None
        return (shape.moe + shape.mtp) * (moe.out_ms + moe.home_ms) if moe else 0.0

    @cached_property
    def send_ms(self) -> float:
        """Between stages; the neighbours of a rank are on another node unless all of the job is on one."""
        job = self.job
        if job.pp == 1:
            return 0.0
        num_bytes = self.layers.kernels.spread_tokens * self.model.hidden * (4 if job.products == "float32" else 2)
        stride = job.gpus // job.pp
        return self.network.send_s(num_bytes, stride >= self.hardware.devices_per_node) * 1e3


def shapes_of(job: Job, sizes: Sequence[int]) -> tuple[Shape, ...]:
    """Of stages with so many layers each, whatever machine they are on."""
    cuts, last, dense = [0, *accumulate(sizes)], len(sizes) - 1, job.model.dense_layers
    mtp = _mtp_stage(job, len(sizes))
    return tuple(
        Shape(
            max(0, min(stop, dense) - start),
            stop - max(start, min(stop, dense)),
            n == 0,
            n == last,
            job.model.mtp if n == mtp else 0,
        )
        for n, (start, stop) in enumerate(pairwise(cuts))
    )


def _mtp_stage(job: Job, stages: int) -> int:
    """dstrain has MTP modules with the head; others give them a stage of their own where there are many."""
    return stages - 2 if job.free_split and stages > 2 else stages - 1


def step_times(job: Job, hardware: HardwareConfig) -> StepTimes:
    """What the stages of a job take, and what its steps end with. Raises ConfigError as `Stages` does."""
    stages = Stages(job, hardware)
    by_shape = {shape: stages.costs(shape) for shape in set(stages.shapes)}
    placed = layout(job.pipeline, job.pp, job.chunks) if job.pp > 1 else None
    held = placed.held if placed else ((0,),)
    ranks = [stages.reduction([stages.shapes[n] for n in own], placed.copies if placed else 1) for own in held]
    exposed_ms = stages.send_ms if job.blocking_sends else 0.0
    costs = tuple(by_shape[shape] for shape in stages.shapes)
    return StepTimes(costs, stages.send_ms, exposed_ms, tuple(ranks), stages.shares_links)


def _data_group(job: Job, hardware: HardwareConfig) -> Group:
    return Group.of(job.dp * job.cp, job.tp, hardware.devices_per_node)


def _expert_group(job: Job, hardware: HardwareConfig) -> Group:
    """Ranks that hold the same experts."""
    return Group.of(job.expert_dp, job.ep * job.etp, hardware.devices_per_node)


def weights_of(model: Architecture, *, is_moe: bool) -> int:
    """Of a layer, without routed experts."""
    rest = model.moe_dense_weights if is_moe else model.ffn_weights(model.ffn)
    return model.attention_weights + model.norm_weights + rest


def _ms(seconds: Passes) -> Passes:
    forward, into, weight = seconds
    return forward * 1e3, into * 1e3, weight * 1e3


def _in_ms(kinds: Kinds) -> Kinds:
    return added({kind: seconds * 1e3 for kind, seconds in kinds.items() if seconds})


# Share of a kind that torchtitan's selective recomputation repeats: every other product is kept, and attention.
SAC = {"gemm": 0.5, "mla up": 0.5, "grouped gemm": 0.5, "attention": 0.0}
