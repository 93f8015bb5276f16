"""Which table a step runs: what the config asks for, planned once for each number of micro-batches, equal on all ranks.

With order=measured the first step warms up and the second one is timed, both in the sequential order, where each
transfer has the link to itself. A phase costs its mean over ranks and micro-batches; a transfer what it costs the rank
that came to it last, since all others also waited for that one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch.distributed as dist

from dstrain.comm.trace import CommTotals, Label, Span
from dstrain.config.schema import Config
from dstrain.mesh.groups import Groups
from dstrain.schedule.order import fixed, planned
from dstrain.schedule.overlap import expand
from dstrain.schedule.pipe import Traffic
from dstrain.schedule.pipeline import Pipeline
from dstrain.schedule.pipeline import check as check_pipeline
from dstrain.schedule.pipelines.choose import make
from dstrain.schedule.run import DIRECTIONS
from dstrain.schedule.simulate import Costs, simulate
from dstrain.schedule.table import Table, check, check_courses, from_text, sequential, starts, to_text

# Schedules with neither pairs nor weight gradients apart, unless they are asked for.
PLAIN = ("1f1b", "interleaved")
# Counted from the start of the process.
TIMED_STEP = 2


def in_flight(config: Config, groups: Groups, micro_batches: int) -> int:
    """Micro-batches in flight where a rank has `micro_batches` in a step."""
    asked = config.schedule.in_flight
    if asked is None:
        # Where nothing travels there is nothing to hide, and stage 2 takes one micro-batch after the other.
        asked = 1 if groups.ep is None or config.engine.zero_stage == 2 else 2
    return min(asked, micro_batches)


def overlaps(config: Config) -> bool:
    """Whether the two passes of a pair interleave, and weight gradients fill transfers."""
    asked = config.schedule.overlap
    return config.mesh.ep > 1 and config.schedule.pipeline not in PLAIN if asked is None else asked


@dataclass(frozen=True)
class Program:
    """What a rank does in a step."""

    table: Table
    # Its part in every micro-batch: (stage, micro-batch).
    courses: Sequence[tuple[int, int]]
    # What passes from stage to stage; None without a pipeline.
    traffic: Traffic | None = None

    @staticmethod
    def of(pipeline: Pipeline, rank: int, stages: Sequence[int], *, overlap: bool) -> "Program":
        """That of a pp index; `stages`: MoE blocks of every stage, whose tokens travel. Raises IllegalTable."""
        courses = [course for course, where in pipeline.rank_of.items() if where == rank]
        table = expand(pipeline.ranks[rank], stages, overlap=overlap)
        check_courses(table, {course: stages[course[0]] for course in courses})
        return Program(table, courses, Traffic.of(pipeline, rank))


@dataclass
class Orders:
    """The tables of a run. Every rank calls the same methods in the same order."""

    config: Config
    groups: Groups
    # MoE blocks of every stage of the model, 0 where their tokens don't travel.
    stages: Sequence[int]
    # How the newest table came about.
    reason: str = ""
    _tables: dict[int, Table] = field(default_factory=dict)
    # The newest, with its number of micro-batches: a ramp never goes back to an earlier one.
    _newest: tuple[int, Program] | None = None
    _costs: Costs | None = None
    _steps: int = 0
    _kept_spans: bool = False

    @property
    def blocks(self) -> int:
        """MoE blocks of the whole model whose tokens travel."""
        return sum(self.stages)

    def program(self, micro_batches: int) -> Program:
        """For the step that begins now."""
        if self.groups.mesh.pp == 1:
            return Program(self.table(micro_batches), [(0, number) for number in range(micro_batches)])
        if self._newest is None or self._newest[0] != micro_batches:
            self._newest = micro_batches, self._pipelined(micro_batches)
        return self._newest[1]

    def _pipelined(self, micro_batches: int) -> Program:
        schedule, hides = self.config.schedule, overlaps(self.config)
        made = make(schedule.pipeline, self.groups.mesh.pp, micro_batches, schedule.chunks, schedule.overlap is True)
        check_pipeline(made)
        self.reason = f"{schedule.pipeline}, {micro_batches} micro-batches over {made.layout.num_stages} stages"
        self.reason += ", transfers under other compute" if hides and self.blocks else ""
        return Program.of(made, self.groups.coordinate.pp, self.stages, overlap=hides)

    def table(self, micro_batches: int) -> Table:
        """The order of a step without a pipeline."""
        self._steps += 1
        if self._measures and self._steps <= TIMED_STEP:
            self._kept_spans = self.groups.trace.keeps_spans
            self.groups.trace.keeps_spans |= self._steps == TIMED_STEP
            return sequential(self.blocks, micro_batches)
        if micro_batches not in self._tables:
            self._tables[micro_batches] = table = self._new(micro_batches)
            check(table, self.blocks, micro_batches)
        return self._tables[micro_batches]

    def after_step(self, comm: CommTotals) -> None:
        """`comm` is the account of the step that has just ended."""
        if self._measures and self._steps == TIMED_STEP:
            self.groups.trace.keeps_spans = self._kept_spans
            self._costs = self._agreed(timed(comm, self.blocks))

    @property
    def _measures(self) -> bool:
        schedule = self.config.schedule
        return schedule.order == "measured" and schedule.in_flight != 1 and self.blocks > 0

    def _new(self, micro_batches: int) -> Table:
        count = in_flight(self.config, self.groups, micro_batches)
        start = f"{count} of {micro_batches} micro-batches in flight"
        if count == 1 or not self.blocks:
            self.reason = start
            return sequential(self.blocks, micro_batches)
        # By the first rank alone: it takes seconds of compute, which the ranks of a machine would take from each other.
        text = [to_text(self._planned(micro_batches, count)) if self.groups.place.rank == 0 else ""]
        with self.groups.trace.waiting():
            dist.broadcast_object_list(text, src=0, group=self._everyone)
        table = from_text(text[0])
        self.reason = f"{start}, planned for transfers as long as the compute"
        if self._costs is not None:
            played = simulate(table, self._costs)
            expected = f"{played.makespan_ms:,.0f} ms of which compute waits {played.exposed_ms:,.0f}"
            self.reason = f"{start}, planned from the times of step {TIMED_STEP}: {expected}"
        return table

    @property
    def _everyone(self) -> dist.ProcessGroup | None:
        """Whose collectives a rank that stalls ends after mesh.timeout_s, unlike those in the background."""
        return self.groups.world.group if self.groups.world else None

    def _planned(self, micro_batches: int, count: int) -> Table:
        if self._costs is None:
            return fixed(self.blocks, micro_batches, count)
        return planned(self.blocks, micro_batches, count, self._costs)

    def _agreed(self, own: Costs) -> Costs:
        """The same costs on all ranks."""
        by_rank = [own] * self.groups.place.world
        with self.groups.trace.waiting():
            dist.all_gather_object(by_rank, own, group=self._everyone)
        return typical(by_rank)


def typical(by_rank: Sequence[Costs]) -> Costs:
    """Of all ranks: compute as on average; a transfer as for the rank that came to it last."""
    first = by_rank[0]
    return Costs(
        {action: fmean(costs.compute_ms[action] for costs in by_rank) for action in first.compute_ms},
        {way: min(costs.transfer_ms[way] for costs in by_rank) for way in first.transfer_ms},
    )


def timed(comm: CommTotals, blocks: int) -> Costs:
    """What the phases and transfers of a step took this rank, mean over its micro-batches.

    The step has run the sequential order, with spans kept and weight gradients apart.
    """
    times_ms: defaultdict[tuple[str, str | None, int | None], list[float]] = defaultdict(list)
    waits: defaultdict[Label, list[Span]] = defaultdict(list)
    for span in comm.spans:
        if span.name.startswith("wait "):
            waits[span.label].append(span)
    for span in comm.spans:
        # In the backward pass compute waits inside its span.
        inside = [w for w in waits[span.label] if span.start_s <= w.start_s and w.end_s <= span.end_s]
        waited_s = sum(wait.end_s - wait.start_s for wait in inside)
        place = (span.name, span.label.direction, span.label.block)
        times_ms[place].append((span.end_s - span.start_s - waited_s) * 1e3)
    for transfer in comm.transfers:
        if transfer.end_s is not None:
            place = (transfer.kind, transfer.label.direction, transfer.label.block)
            times_ms[place].append((transfer.end_s - transfer.start_s) * 1e3)
    actions = sequential(blocks, 1)
    ways = [way for action in actions if (way := starts(action, blocks)) is not None]
    return Costs(
        {(a.work, a.phase, a.block): fmean(times_ms[a.phase.value, DIRECTIONS[a.work], a.block]) for a in actions},
        {(w.work, w.name, w.block): fmean(times_ms[w.name, DIRECTIONS[w.work], w.block]) for w in ways},
    )
