"""`dstrain bench fabric`: cases in turn on one network, the same model and routes for all.

For each point a testbed and one launch of ranks; in every round every case runs a step that warms up and some that are
measured, so that what changes on the machine meanwhile meets all alike. Compute alone is a case, too: where it takes
longer than it should, the machine was too busy or the step too small for it, and the figures are void.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from dstrain.bench import theory
from dstrain.bench.case import Case
from dstrain.bench.launch import Launch
from dstrain.bench.messages import Prepare, Record, Run, StepFigures, Timing
from dstrain.bench.played import Played, played
from dstrain.bench.testbed import Counters, Fabric, Testbed
from dstrain.bench.workload import PASSES, Workload
from dstrain.config.bench import FabricRoot
from dstrain.mesh.axes import Mesh
from dstrain.plan.traffic import Way
from dstrain.schedule.choose import typical
from dstrain.schedule.order import fixed, planned
from dstrain.schedule.table import Table, sequential

# What a card counts over what it carries: acknowledgements, and the headers of large packets. With a smaller bucket the
# kernel cuts large packets first, and all their headers count.
DEVICE_SHARE = 1.0023
COUNTING_BURST_BYTES = 80 << 10
# How far compute alone may be above its nominal time.
MOST_SLOWDOWN = 0.03
FLAT = Case("alltoall")

Say = Callable[[str], None]


@dataclass(frozen=True)
class CaseFigures:
    """Medians over steps; times of the slowest rank unless said otherwise. Bytes are those of a step."""

    name: str
    step_ms: float
    fastest_ms: float
    slowest_ms: float
    # By the limiter of the busiest card, headers included, over its rate.
    wire_ms: float
    # No order is faster than its compute (emulated: as it should be; real: alone), or than its bytes on the line.
    bound_ms: float
    # What the step takes longer than compute alone.
    exposed_ms: float
    # Means over ranks: waiting for the network, and what else the main thread did besides compute (None for peers,
    # whose waiting can't be told from work); processor time of the main thread and of all.
    waited_ms: float | None
    host_ms: float | None
    main_cpu_ms: float
    cpu_ms: float
    # Of the busiest card with all headers; what it sent without them, None where its bucket is too small to count that;
    # and what the routes demand, None for peers.
    line_bytes: float
    sent_bytes: float | None
    theory_bytes: int | None
    # Where there is a pipeline.
    played: Played | None = None

    @property
    def over_bound(self) -> float:
        return self.step_ms / self.bound_ms

    @property
    def exposed_share(self) -> float:
        return self.exposed_ms / self.step_ms

    @property
    def over_theory(self) -> float | None:
        """Bytes sent over bytes demanded."""
        return None if self.sent_bytes is None or not self.theory_bytes else self.sent_bytes / self.theory_bytes

    @property
    def over_simulated(self) -> float | None:
        """Step over the makespan of its own table, played with measured times."""
        return self.step_ms / self.played.simulated_ms if self.played and self.played.simulated_ms else None


@dataclass(frozen=True)
class PointFigures:
    """One point with all its cases."""

    config: FabricRoot
    nominal_compute_ms: float
    # A step with compute alone: all of it, and what it slept.
    compute_ms: float
    slept_ms: float
    flat_wire_ms: float
    cases: list[CaseFigures]
    # Name and reason.
    left_out: dict[str, str]

    @property
    def is_void(self) -> bool:
        slowest_ms = self.nominal_compute_ms * (1 + MOST_SLOWDOWN)
        return self.config.compute == "emulated" and self.compute_ms > slowest_ms


@dataclass
class _Samples:
    """Of one case, over all rounds."""

    steps: list[list[StepFigures]] = field(default_factory=list)
    line_bytes: list[float] = field(default_factory=list)
    device_bytes: list[float] = field(default_factory=list)


def measure(config: FabricRoot, cases: Sequence[Case], left_out: dict[str, str], say: Say) -> PointFigures:
    """One point: `config` has none itself."""
    work = workload(config)
    fabric = Fabric(config.nodes, config.rate_mbit, config.burst_kib << 10, config.loopback_mbit, config.mtu)
    flat_ms = theory.line_ms(theory.traffic(work, FLAT).busiest(*Way), config.rate_mbit, config.mtu)
    nominal_ms = flat_ms / config.flat_ratio if config.compute == "emulated" else 0.0
    samples: dict[Case | None, _Samples] = {case: _Samples() for case in [None, *cases]}
    accounts: dict[Case, Played] = {}
    with Testbed(fabric) as testbed, Launch(testbed, config.ranks_per_node, config.timeout_s, config.pp) as launch:
        say("building")
        forward_ms = _prepare(launch, config, work, nominal_ms)
        tables = {case: tuple(_table(case, config, work, forward_ms, launch)) for case in samples}
        for number in range(config.rounds):
            for case, kept in samples.items():
                say(f"round {number + 1} of {config.rounds}: {case.name if case else 'compute alone'}")
                _sample(testbed, launch, Run(case, tables[case], config.steps), kept)
        for case in (case for case in cases if case.pipeline):
            say(f"times of phases: {case.name}")
            accounts[case] = _played(case, config, work, launch)
    compute_ms = median(_slowest(samples[None].steps))
    slept_ms = median(rank.compute_ms for step in samples[None].steps for rank in step)
    least_ms = nominal_ms or compute_ms
    figures = [
        replace(_figures(case, samples[case], config, least_ms, compute_ms, work), played=accounts.get(case))
        for case in cases
    ]
    return PointFigures(config, nominal_ms, compute_ms, slept_ms, flat_ms, figures, left_out)


def _prepare(launch: Launch, config: FabricRoot, work: Workload, nominal_ms: float) -> float:
    """The forward pass of a block and micro-batch, as orders are planned for it: real compute is measured first."""
    each = PASSES * work.blocks // config.pp * work.micro_batches
    if config.compute != "real":
        launch.request(Prepare(work, nominal_ms / each))
        return nominal_ms / each
    launch.request(Prepare(work, None))
    by_rank = launch.request(Run(None, tuple(sequential(work.blocks, work.micro_batches)), 2))
    return min(_slowest(list(zip(*by_rank, strict=True)))) / each


def workload(config: FabricRoot) -> Workload:
    """Of an expert-parallel group; those of a pipeline's other ranks are like it."""
    return Workload(
        config.nodes,
        config.ranks_per_node // config.pp,
        config.hidden_size,
        config.num_experts,
        config.experts_per_token,
        config.tokens,
        config.num_blocks,
        config.micro_batches,
        config.route_nodes,
        config.route_skew,
        config.seed,
    )


def _table(case: Case | None, config: FabricRoot, work: Workload, forward_ms: float, launch: Launch) -> Table:
    if case is None:
        return sequential(work.blocks // config.pp, work.micro_batches)
    plain = sequential(work.blocks, work.micro_batches)
    if case.in_flight is None or case.pipeline:
        # Its ranks make their own.
        return ()
    if case.in_flight == 0:
        return plain
    if config.order == "fixed":
        return fixed(work.blocks, work.micro_batches, case.in_flight)
    if config.order == "measured":
        costs = typical(launch.request(Timing(case, tuple(plain))))
    else:
        costs = theory.costs(work, case, forward_ms, launch.testbed.fabric)
    return planned(work.blocks, work.micro_batches, case.in_flight, costs)


def _played(case: Case, config: FabricRoot, work: Workload, launch: Launch) -> Played:
    mesh = Mesh(pp=config.pp, ep=work.ranks)
    line = theory.costs(work, case, 0.0, launch.testbed.fabric)
    alone, usual = (launch.request(Record(case, alone)) for alone in (True, False))
    return played(case, mesh, work, line, alone, usual)


def _sample(testbed: Testbed, launch: Launch, request: Run, kept: _Samples) -> None:
    launch.request(Run(request.case, request.table, 1))
    nodes = range(testbed.fabric.nodes)
    before = [testbed.counters(node) for node in nodes]
    by_rank: list[list[StepFigures]] = launch.request(request)
    sent: list[Counters] = [testbed.counters(node) - before[node] for node in nodes]
    kept.steps += [list(step) for step in zip(*by_rank, strict=True)]
    kept.line_bytes.append(max(max(node.line_out, node.line_in) for node in sent) / request.steps)
    kept.device_bytes.append(max(node.device for node in sent) / request.steps)


def _slowest(steps: Sequence[Sequence[StepFigures]]) -> list[float]:
    """By step, the time of the slowest rank."""
    return [max(rank.step_ms for rank in step) for step in steps]


def _figures(
    case: Case, samples: _Samples, config: FabricRoot, least_ms: float, compute_ms: float, work: Workload
) -> CaseFigures:
    """`least_ms` bounds the compute of a step, `compute_ms` is what it takes alone."""
    steps_ms = _slowest(samples.steps)
    line_bytes = median(samples.line_bytes)
    wire_ms = line_bytes * 8 / config.rate_mbit / 1e3
    counts = config.burst_kib << 10 >= COUNTING_BURST_BYTES

    def typical(name: str) -> float:
        return median(sum(getattr(rank, name) for rank in step) / len(step) for step in samples.steps)

    return CaseFigures(
        name=case.name,
        step_ms=(step_ms := median(steps_ms)),
        fastest_ms=min(steps_ms),
        slowest_ms=max(steps_ms),
        wire_ms=wire_ms,
        bound_ms=max(least_ms, wire_ms),
        exposed_ms=step_ms - compute_ms,
        waited_ms=None if case.is_peer else typical("waited_ms"),
        host_ms=None if case.is_peer or config.compute == "real" else typical("host_ms"),
        main_cpu_ms=typical("main_cpu_ms"),
        cpu_ms=typical("cpu_ms"),
        line_bytes=line_bytes,
        sent_bytes=median(samples.device_bytes) / DEVICE_SHARE if counts else None,
        theory_bytes=None if case.is_peer else theory.traffic(work, case).most_sent(),
    )
