"""A step played: every rank of the pipeline runs the slots of the table that the trainer runs, with given times.

    slot       its actions on two lanes, compute and one link (schedule/simulate.py); no transfer of tokens is under way
               when a slot begins or ends, so each kind of slot is played once and stands for all of its kind
    pipeline   a slot begins when the one before it has ended and its inputs are there: an output leaves with the last
               phase of a forward pass, a gradient with the last input gradient. A pair begins with its backward pass
               and needs the input of its forward pass only a phase later
    gradients  the buckets of a stage leave, one after the other, while its last weight gradients are computed; the
               update waits for all ranks, and weights are gathered under the next forward pass, which waits for them

Beside schedule.simulate.simulate_ranks, which plays every single action, one thing is simpler: where an input comes
late, the whole slot is shifted and not only what is behind the wait (where links are slower than compute and stages
uneven, up to a percent too long). A framework that doesn't put weight gradients off
is described by costs that have them in BACKWARD, and 0 in WEIGHT.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle, islice, pairwise

from dstrain.config.hardware import HardwareConfig
from dstrain.errors import ConfigError
from dstrain.plan.job import Job
from dstrain.plan.stages import step_times
from dstrain.plan.step import Prediction, predict, prediction
from dstrain.plan.times import StepTimes
from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.figures import Span, peak_live, peak_pending
from dstrain.schedule.order import fixed
from dstrain.schedule.overlap import WORKS, merged, phases
from dstrain.schedule.pipeline import Kind, Layout, Op, Pipeline, Products, Slot, walk
from dstrain.schedule.pipelines.choose import make, rule_broken
from dstrain.schedule.simulate import Costs, Interval, Timeline, simulate_slot
from dstrain.schedule.simulate import simulate as play_table
from dstrain.schedule.table import peak_in_flight

# The table of a step without a pipeline is played for so many times the micro-batches in flight; the middle stands for
# the rest.
PLAYED = 4


@dataclass(frozen=True)
class Inside:
    """What happens in a slot of one kind, from its own beginning."""

    # In numbers of its own: `Run.course` says which stage and micro-batch is meant.
    timeline: Timeline
    # By op: when it needs what comes from other ranks, and when it has made what they wait for.
    needs_ms: tuple[float, ...]
    made_ms: tuple[float, ...]
    compute_ms: float
    # With transfers that compute waits for.
    length_ms: float

    @property
    def exposed_ms(self) -> float:
        return self.length_ms - self.compute_ms


@dataclass(frozen=True)
class Run(Span):
    """A slot in time. A weight gradient that fills the transfers of an op is in one slot with it."""

    inside: Inside

    def course(self, number: int) -> tuple[int, int]:
        """(stage, micro-batch) of what has this micro-batch in the timeline: the slot's first and second course, or
        counted from its only one."""
        courses = list(_courses(self.slot))
        if len(courses) > 1:
            return courses[number]
        (stage, micro_batch) = courses[0]
        return stage, micro_batch + number


@dataclass(frozen=True)
class RankPlay:
    """One pipeline rank. Times from the beginning of the step."""

    runs: tuple[Run, ...]
    compute_ms: float
    # Transfers that compute waits for.
    exposed_ms: float
    # Gradients on their way to the ranks that own them; equal where there are none.
    reduce_start_ms: float
    reduce_end_ms: float
    # In stages times micro-batches.
    peak_live: int
    peak_pending: int

    @property
    def end_ms(self) -> float:
        """Of its last slot."""
        return self.runs[-1].end_ms


@dataclass(frozen=True)
class Played:
    """A step of every pipeline rank, and what it ends with."""

    layout: Layout
    ranks: tuple[RankPlay, ...]
    # Until the last rank has computed everything.
    makespan_ms: float
    # Gradients that arrive after that; weights that the next forward pass waits for.
    reduce_ms: float
    gather_ms: float
    update_ms: float

    @property
    def step_ms(self) -> float:
        return self.makespan_ms + self.reduce_ms + self.update_ms + self.gather_ms

    @property
    def slowest(self) -> RankPlay:
        """The rank that waits least for others."""
        return max(self.ranks, key=lambda rank: rank.compute_ms + rank.exposed_ms)

    def bubble_ms(self, rank: RankPlay) -> float:
        """Time in which a rank waits for others."""
        return self.makespan_ms - rank.compute_ms - rank.exposed_ms


@dataclass(frozen=True)
class Simulation:
    """A step played, and its figures."""

    played: Played
    prediction: Prediction


def simulate(job: Job, hardware: HardwareConfig) -> Simulation:
    """Raises ConfigError if the pipeline does not take the number of ranks or micro-batches."""
    played = play_step(job, step_times(job, hardware))
    rank, ends_ms = played.slowest, (played.reduce_ms + played.gather_ms, played.update_ms)
    parts_ms = rank.compute_ms, played.bubble_ms(rank), rank.exposed_ms
    kinds_ms = predict(job, hardware).kinds_ms
    return Simulation(played, prediction(job, hardware, played.step_ms, *parts_ms, ends_ms, kinds_ms))


def play_step(job: Job, times: StepTimes) -> Played:
    """Raises ConfigError if the pipeline does not take the number of ranks or micro-batches."""
    blocks = [costs.blocks for costs in times.stages]
    if job.pp == 1 and job.in_flight > 1 and blocks[0]:
        flow, live = _without_pipeline(times.stages[0], job.micro_batches, job.in_flight)
        return _ended(job, times, Layout(((0,),)), [flow], [live], [0])
    travels = tuple(count > 0 for count in blocks)
    program = _program(job.pipeline, job.pp, job.micro_batches, job.chunks, job.overlap, travels)
    runs = _played(program, times, overlap=job.overlap)
    made = program.pipeline
    return _ended(job, times, made.layout, runs, list(map(peak_live, made.ranks)), list(map(peak_pending, made.ranks)))


# -- The pipeline -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """A slot of a rank, with what it waits for and what it makes, as numbers (`Products`)."""

    rank: int
    slot: Slot
    kind: int
    # (product, op of the slot, whether another rank makes it)
    needs: tuple[tuple[int, int, bool], ...]
    # By op.
    makes: tuple[int, ...]


@dataclass(frozen=True)
class _Program:
    """The slots of all ranks in an order in which they can be played."""

    pipeline: Pipeline
    pieces: tuple[_Piece, ...]
    # A slot of each kind: those that run the same passes on the same stages.
    kinds: tuple[Slot, ...]


@lru_cache(maxsize=4)
def _program(
    name: str, ranks: int, micro_batches: int, chunks: int, overlap: bool, travels: tuple[bool, ...]
) -> _Program:
    """`travels`: by stage, whether tokens of it travel to experts."""
    broken = rule_broken(name, ranks, micro_batches, chunks)
    if broken is not None:
        value = {"ranks": ranks, "micro_batches": micro_batches, "chunks": chunks}.get(broken.argument, name)
        raise ConfigError(f"job.{broken.argument}", value, broken.rule, broken.cure)
    pipeline = make(name, ranks, micro_batches, chunks, overlap)
    products = Products(pipeline.layout.num_stages, micro_batches)
    left = [list(merged(slots, travels, overlap=overlap))[::-1] for slots in pipeline.ranks]
    makers: dict[int, int] = {}
    kinds: dict[tuple[object, ...], int] = {}
    examples: list[Slot] = []
    pieces = []
    for rank, begins in walk(pipeline):
        for op in begins:
            makers[products.of(op)] = rank
        if not left[rank] or left[rank][-1][0] is not begins[0]:
            # It has been played with the slot before it.
            continue
        slot = left[rank].pop()
        key = (len(_courses(slot)), *((op.kind, op.stage) for op in slot))
        if key not in kinds:
            kinds[key] = len(examples)
            examples.append(slot)
        needs = tuple(
            (need, place, makers[need] != rank)
            for place, op in enumerate(slot)
            if op.kind is not Kind.WEIGHT
            for need in products.needs(op)
        )
        pieces.append(_Piece(rank, slot, kinds[key], needs, tuple(map(products.of, slot))))
    return _Program(pipeline, tuple(pieces), tuple(examples))


def _played(program: _Program, times: StepTimes, *, overlap: bool) -> list[list[Run]]:
    insides = _insides(program, times, overlap=overlap)
    pipeline = program.pipeline
    made_ms = [0.0] * Products(pipeline.layout.num_stages, pipeline.micro_batches).count
    free_ms = [0.0] * len(pipeline.ranks)
    runs: list[list[Run]] = [[] for _ in free_ms]
    for piece in program.pieces:
        inside, start_ms = insides[piece.kind], free_ms[piece.rank]
        for need, place, travels in piece.needs:
            there_ms = made_ms[need] + (times.send_ms if travels else 0.0)
            start_ms = max(start_ms, there_ms - inside.needs_ms[place])
        for product, after_ms in zip(piece.makes, inside.made_ms, strict=True):
            made_ms[product] = start_ms + after_ms
        free_ms[piece.rank] = end_ms = start_ms + inside.length_ms
        runs[piece.rank].append(Run(piece.slot, start_ms, end_ms, inside))
    return runs


def _insides(program: _Program, times: StepTimes, *, overlap: bool) -> list[Inside]:
    """By kind of slot; stages that cost the same are played once."""
    alike = [times.stages.index(costs) for costs in times.stages]
    known: dict[tuple[object, ...], Inside] = {}
    found = []
    for slot in program.kinds:
        key = (len(_courses(slot)), *((op.kind, alike[op.stage]) for op in slot))
        if key not in known:
            known[key] = _inside(slot, [times.stages[op.stage] for op in slot], overlap, times.send_exposed_ms)
        found.append(known[key])
    return found


def _inside(slot: Slot, costs: Sequence[Costs], overlap: bool, sending_ms: float) -> Inside:
    """A slot alone; `costs`: of the stage of each op; `sending_ms`: what sending its results adds to an op."""
    courses = list(_courses(slot))
    numbers = [courses.index((op.stage, op.micro_batch)) for op in slot]
    ops = [Op(op.kind, n, n) for op, n in zip(slot, numbers, strict=True)]
    timeline = simulate_slot(list(phases(tuple(ops), [cost.blocks for cost in costs], overlap)), costs)
    spans = [_span(timeline, op) for op in ops]
    return Inside(
        timeline,
        needs_ms=tuple(first for first, _ in spans),
        made_ms=tuple(last for _, last in spans),
        compute_ms=timeline.compute_ms,
        length_ms=timeline.makespan_ms + sending_ms * sum(op.kind is not Kind.WEIGHT for op in slot),
    )


def _courses(slot: Slot) -> dict[tuple[int, int], None]:
    """(stage, micro-batch) of its ops, in their order."""
    return dict.fromkeys((op.stage, op.micro_batch) for op in slot)


def _span(timeline: Timeline, op: Op) -> tuple[float, float]:
    """From the first to the last action of an op, the weight gradients of a whole backward pass left out."""
    work = WORKS[op.kind][0] if op.kind in WORKS else Pass.FORWARD
    # In a slot, each course has a number of its own.
    own = [x for x in timeline.computes if x.work.work is work and x.work.micro_batch == op.micro_batch]
    return own[0].start_ms, own[-1].end_ms


# -- Several micro-batches in flight, without a pipeline --------------------------------------------------------------


def _without_pipeline(costs: Costs, micro_batches: int, in_flight: int) -> tuple[list[Run], int]:
    """A run for each time that as many have ended as are in flight, named by the first of them; and how many are live
    at once."""
    in_flight = min(in_flight, micro_batches)
    rounds, rest = divmod(micro_batches, in_flight)
    shown = min(rounds, PLAYED)
    table = fixed(costs.blocks, shown * in_flight + rest, in_flight)
    timeline = play_table(table, costs)
    ends_ms = {x.work: x.end_ms for x in timeline.computes}
    cuts_ms = [ends_ms[Action(Pass.BACKWARD, Phase.ATTEND, 0, n * in_flight - 1)] for n in range(1, shown)]
    spans_ms = pairwise([0.0, *cuts_ms, timeline.makespan_ms])
    insides = [_between(timeline, *span_ms, number * in_flight) for number, span_ms in enumerate(spans_ms)]
    # The first and the last round as they are, those between in turn.
    order = insides if rounds == shown else [insides[0], *islice(cycle(insides[1:-1]), rounds - 2), insides[-1]]
    runs: list[Run] = []
    now_ms = 0.0
    for number, inside in enumerate(order):
        slot = (Op(Kind.FORWARD, 0, number * in_flight), Op(Kind.BACKWARD, 0, number * in_flight))
        runs.append(Run(slot, now_ms, now_ms + inside.length_ms, inside))
        now_ms = runs[-1].end_ms
    return runs, peak_in_flight(table)


def _between(timeline: Timeline, start_ms: float, end_ms: float, first: int) -> Inside:
    """What of a timeline ends between two times; micro-batches are counted from `first`."""

    def cut(intervals: Sequence[Interval]) -> list[Interval]:
        inside = [x for x in intervals if start_ms < x.end_ms <= end_ms]
        works = [replace(x.work, micro_batch=x.work.micro_batch - first) for x in inside]
        return [Interval(w, x.start_ms - start_ms, x.end_ms - start_ms) for w, x in zip(works, inside, strict=True)]

    part = Timeline(cut(timeline.computes), cut(timeline.transfers))
    return Inside(part, (), (), part.compute_ms, end_ms - start_ms)


# -- What a step ends with --------------------------------------------------------------------------------------------


def _ended(
    job: Job,
    times: StepTimes,
    layout: Layout,
    runs: Sequence[Sequence[Run]],
    live: Sequence[int],
    pending: Sequence[int],
) -> Played:
    """`live`, `pending`: by rank, as in schedule.figures."""
    # A bucket is about a layer.
    buckets = max(1, job.model.layers // len(times.stages))
    carried = _carried if times.shares_links else _nothing
    ranks = []
    for own, reduction, *peaks in zip(runs, times.ranks, live, pending, strict=True):
        compute_ms = sum(run.inside.compute_ms for run in own)
        exposed_ms = sum(run.inside.exposed_ms for run in own)
        reduced_ms = _reduced(own, reduction.reduce_ms, buckets, carried, under_compute=job.overlap_dp)
        ranks.append(RankPlay(tuple(own), compute_ms, exposed_ms, *reduced_ms, *peaks))
    makespan_ms = max(rank.end_ms for rank in ranks)
    each = zip(runs, times.ranks, strict=True)
    return Played(
        layout,
        tuple(ranks),
        makespan_ms,
        reduce_ms=max(makespan_ms, *(rank.reduce_end_ms for rank in ranks)) - makespan_ms,
        gather_ms=max(
            _awaited(own, rank.gather_ms, buckets, carried, under_compute=job.overlap_dp) for own, rank in each
        ),
        update_ms=max(rank.update_ms for rank in times.ranks),
    )


def _carried(run: Run) -> float:
    """How long the link of a rank is busy with tokens during a slot, in ms."""
    return run.inside.timeline.wire_ms


def _nothing(run: Run) -> float:
    """The same where gradients have links of their own."""
    return 0.0


def _reduced(
    runs: Sequence[Run], reduce_ms: float, buckets: int, carried: Callable[[Run], float], *, under_compute: bool
) -> tuple[float, float]:
    """When the gradients of a rank begin to leave, and when all have arrived; `buckets`: of each of its stages."""
    end_ms = runs[-1].end_ms
    if not under_compute or not reduce_ms:
        return end_ms, end_ms + reduce_ms
    last: dict[int, Run] = {}
    for run in runs:
        last.update({op.stage: run for op in run.slot if op.kind in (Kind.BACKWARD, Kind.WEIGHT)})
    share_ms = reduce_ms / len(last)
    starts_ms, free_ms = [], 0.0
    for run in sorted(last.values(), key=lambda run: run.end_ms):
        # They are complete one after the other, in equal times.
        starts_ms.append(max(free_ms, run.start_ms + (run.end_ms - run.start_ms) / buckets))
        free_ms = max(starts_ms[-1] + share_ms + carried(run), run.end_ms + share_ms / buckets)
    return starts_ms[0], free_ms


def _awaited(
    runs: Sequence[Run], gather_ms: float, buckets: int, carried: Callable[[Run], float], *, under_compute: bool
) -> float:
    """How long the first forward pass of a rank waits for weights, which come in the order of their use."""
    if not under_compute:
        return gather_ms
    first: dict[int, Run] = {}
    for run in runs:
        for op in run.slot:
            first.setdefault(op.stage, run)
    share_ms = gather_ms / len(first)
    waits_ms = []
    for number, run in enumerate(first.values()):
        before_ms, length_ms = number * share_ms - run.start_ms, run.end_ms - run.start_ms - carried(run)
        waits_ms += [before_ms + share_ms / buckets, before_ms + share_ms - length_ms * (buckets - 1) / buckets]
    return max(0.0, *waits_ms)
