"""A pipeline's case against its own table: what it ran, and what the table takes when it is played with measured times.

Times are those of a step with one micro-batch under way at a time, so that no transfer meets another (pipeline.py):

    phase      its span without what it waited for, mean over micro-batches and over the ranks that hold the stage
    transfer   the line is taken for its bytes in full frames, as the routes demand; what the transfer took longer, mean
               over those of a stage (packing, unpacking, latency), delays its reader alone
    message    between stages on two ranks, inside a node: from its start to its arrival, median

All ranks of a node send over one line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from dstrain.bench.case import Case
from dstrain.bench.pipeline import cut, pipeline
from dstrain.bench.workload import Workload
from dstrain.comm.trace import STAGES, CommTotals, Label
from dstrain.mesh.axes import Mesh
from dstrain.schedule.action import Action, Phase
from dstrain.schedule.choose import timed, typical
from dstrain.schedule.figures import peak_live
from dstrain.schedule.overlap import expand
from dstrain.schedule.run import DIRECTIONS
from dstrain.schedule.simulate import Costs, simulate_ranks
from dstrain.schedule.table import Table, peak_in_flight

WORKS = {direction: work for work, direction in DIRECTIONS.items()}


@dataclass(frozen=True)
class Played:
    """Lists have an entry for each pp index."""

    # Makespan of the played table; None where compute blocks, which tables don't say.
    simulated_ms: float | None
    # Means of what was measured for it: all phases of a step, beyond the line for a transfer; and for a message.
    phases_ms: float
    latency_ms: float
    message_ms: float
    # Every rank's actions in the order in which they were run are those of its table.
    as_table: bool
    # Stages times micro-batches between start of forward and end of backward at once: as run, and of the table.
    peak_live: list[int]
    table_peak_live: list[int]


def played(
    case: Case, mesh: Mesh, work: Workload, line: Costs, alone: Sequence[CommTotals], usual: Sequence[CommTotals]
) -> Played:
    """`line`: times of transfers on the line; `alone`, `usual`: every rank's account of a step in either order."""
    made = pipeline(case, mesh.pp, work.micro_batches)
    stages = cut(work.blocks, made.layout.num_stages)
    tables = [expand(slots, [len(stage) for stage in stages], overlap=case.overlap) for slots in made.ranks]
    costs = [_costs(alone, number, stage, line) for number, stage in enumerate(stages)]
    message_ms = median(_messages_ms(alone, mesh))
    run = [executed(account, stages) for account in usual]
    found = [[run[mesh.rank(p, 0, e)] for e in range(mesh.ep)] for p in range(mesh.pp)]
    timelines = simulate_ranks(tables, costs, [0] * mesh.pp, message_ms)
    return Played(
        None if case.in_flight == 0 else max(timeline.makespan_ms for timeline in timelines),
        fmean(timeline.compute_ms for timeline in timelines),
        fmean(each.latency_ms for each in costs),
        message_ms,
        all(own == table for table, ranks in zip(tables, found, strict=True) for own in ranks),
        [max(map(peak_in_flight, ranks)) for ranks in found],
        [peak_live(slots) for slots in made.ranks],
    )


def executed(account: CommTotals, stages: Sequence[range]) -> Table:
    """A rank's actions in the order in which they began."""
    spans = sorted((span for span in account.spans if span.label.direction), key=lambda span: span.start_s)
    return [
        Action(
            WORKS[label.direction or ""],
            Phase(span.name),
            (label.block or 0) - stages[label.stage or 0].start,
            label.micro_batch or 0,
            label.stage or 0,
        )
        for span in spans
        if not span.name.startswith("wait ") and (label := span.label)
    ]


def _costs(accounts: Sequence[CommTotals], number: int, stage: range, line: Costs) -> Costs:
    """Of a stage, from the accounts of the ranks that hold it."""
    own = [_of_stage(account, number, stage) for account in accounts]
    costs = typical([timed(account, len(stage)) for account in own if account.spans])
    line_ms = {
        (work, name, block): min(took_ms, line.transfer_ms[work, name, stage[block]])
        for (work, name, block), took_ms in costs.transfer_ms.items()
    }
    return Costs(costs.compute_ms, line_ms, fmean(costs.transfer_ms[way] - line_ms[way] for way in line_ms))


def _of_stage(account: CommTotals, number: int, stage: range) -> CommTotals:
    """What belongs to a stage, its blocks numbered from 0."""

    def inside(label: Label) -> Label:
        return replace(label, block=(label.block or 0) - stage.start)

    spans = [replace(span, label=inside(span.label)) for span in account.spans if span.label.stage == number]
    there = [transfer for transfer in account.transfers if transfer.label.stage == number and transfer.kind != STAGES]
    return replace(account, spans=spans, transfers=[replace(each, label=inside(each.label)) for each in there])


def _messages_ms(accounts: Sequence[CommTotals], mesh: Mesh) -> Iterator[float]:
    """From start to arrival; the clock is one, as all nodes are on one machine."""
    sent_s: dict[tuple[object, ...], float] = {}
    there_s: dict[tuple[object, ...], float] = {}
    for rank, account in enumerate(accounts):
        for transfer in account.transfers:
            if transfer.kind == STAGES and transfer.end_s is not None:
                label, leaves = transfer.label, bool(transfer.sent_bytes)
                # The stage before the edge: forward that of the sender, backward that of the receiver.
                edge = (label.stage or 0) - (leaves != (label.direction == "forward"))
                key = (label.direction, edge, label.micro_batch, mesh.coordinate(rank).ep)
                if leaves:
                    sent_s[key] = transfer.start_s
                else:
                    there_s[key] = transfer.end_s
    return ((there_s[key] - start_s) * 1e3 for key, start_s in sent_s.items())
