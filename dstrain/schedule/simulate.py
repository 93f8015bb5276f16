"""What a table costs: the same order of actions that a rank runs, played with given times. No torch.

The machine is one compute stream and one link. Actions run in the order of the table; an action begins when the one
before it has ended and its transfer has arrived. A transfer sets out when the action that starts it has ended and the
transfer before it has arrived (first in, first out). All ranks are alike.

Of a pipeline, every rank has its table. Ranks of one node may share a link, which takes the transfers of all of them in
the order in which they want to set out. What passes from stage to stage has ways of its own, with a latency and room
for everything, as in figures.py. The ranks of an expert-parallel group are alike, so one of them stands for all.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.table import IllegalTable, Table, Transfer, sender, starts


@dataclass(frozen=True)
class Costs:
    """Milliseconds of every action and transfer of a micro-batch."""

    compute_ms: Mapping[tuple[Pass, Phase, int], float]
    # By (pass, "dispatch" | "combine", block).
    transfer_ms: Mapping[tuple[Pass, str, int], float]
    # From the end of a transfer on the link to the moment its rows can be used (unpacking, for example): it delays who
    # waits, but not the next transfer.
    latency_ms: float = 0.0

    @property
    def blocks(self) -> int:
        return max(block for _, _, block in self.compute_ms)

    def of(self, work: Action | Transfer) -> float:
        if isinstance(work, Action):
            return self.compute_ms[work.work, work.phase, work.block]
        return self.transfer_ms[work.work, work.name, work.block]


def even_costs(blocks: int, wire: float = 1.0, fp8: bool = False, last: float = 0.0) -> Costs:
    """A block's forward pass takes 1 ms: attend 0.45, experts 0.45, shared 0.1; its input gradients and its weight
    gradients as long each. `wire`: transfers over compute; with fp8, what travels to the experts is half as long as
    what returns. `last`: forward time of the last stretch (head and loss)."""
    share = {Phase.ATTEND: 0.45, Phase.SHARED: 0.1, Phase.EXPERTS: 0.45}
    compute_ms = {(work, phase, n): share[phase] for n in range(blocks) for phase in Phase for work in Pass}
    compute_ms |= {(work, Phase.ATTEND, blocks): last for work in Pass}
    total_ms = wire * (3 + 3 * last / max(1, blocks))
    there_ms, back_ms = (total_ms / 6, total_ms / 3) if fp8 else (total_ms / 4, total_ms / 4)
    transfer_ms = {}
    for n in range(blocks):
        transfer_ms[Pass.FORWARD, "dispatch", n] = transfer_ms[Pass.BACKWARD, "combine", n] = there_ms
        transfer_ms[Pass.FORWARD, "combine", n] = transfer_ms[Pass.BACKWARD, "dispatch", n] = back_ms
    return Costs(compute_ms, transfer_ms)


@dataclass(frozen=True)
class Interval:
    work: Action | Transfer
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class Timeline:
    computes: list[Interval]
    transfers: list[Interval]

    @property
    def makespan_ms(self) -> float:
        return max((interval.end_ms for interval in self.computes), default=0.0)

    @property
    def compute_ms(self) -> float:
        return sum(interval.end_ms - interval.start_ms for interval in self.computes)

    @property
    def wire_ms(self) -> float:
        return sum(interval.end_ms - interval.start_ms for interval in self.transfers)

    @property
    def bound_ms(self) -> float:
        """No order is faster than its compute alone, or than its transfers alone."""
        return max(self.compute_ms, self.wire_ms)

    @property
    def exposed_ms(self) -> float:
        """Time in which compute stands still."""
        return self.makespan_ms - self.compute_ms

    @property
    def peak_pending_weights(self) -> int:
        """The most WEIGHT actions at once whose BACKWARD has run: what they keep in memory grows with it."""
        pending = peak = 0
        for interval in self.computes:
            pending += {Pass.BACKWARD: 1, Pass.WEIGHT: -1}.get(interval.work.work, 0)
            peak = max(peak, pending)
        return peak


def simulate(table: Table, costs: Costs) -> Timeline:
    """A rank without a pipeline."""
    return simulate_ranks([table], [costs], [0])[0]


def simulate_slot(actions: Table, stages: Sequence[Costs]) -> Timeline:
    """A part of a rank's table at whose beginning all is there that comes from other stages."""
    return _Play([actions], stages, [0], 0.0, has_inputs=True).run()[0]


def simulate_ranks(
    tables: Sequence[Table], stages: Sequence[Costs], links: Sequence[int], pipe_ms: float = 0.0
) -> list[Timeline]:
    """Every rank of a pipeline; `stages`: costs by stage, `links[rank]`: the number of the link that a rank sends over,
    `pipe_ms`: from the end of a stage until its neighbour on another rank can begin.

    Raises IllegalTable if the ranks wait for each other.
    """
    return _Play(tables, stages, links, pipe_ms).run()


@dataclass
class _Play:
    """Actions are taken in the order of their ends, so that a link sees its transfers in the order of their starts."""

    tables: Sequence[Table]
    stages: Sequence[Costs]
    links: Sequence[int]
    pipe_ms: float
    # What passes from stage to stage is there from the start.
    has_inputs: bool = False
    # By an action: when what it sends is there, and the rank that has sent it.
    sent: dict[Action, tuple[float, int]] = field(default_factory=dict)
    # End and rank of every rank's next action, if it has what it needs; ranks by what they lack.
    next_ends: list[tuple[float, int]] = field(default_factory=list)
    lacking: defaultdict[Action, list[int]] = field(default_factory=lambda: defaultdict(list))

    def run(self) -> list[Timeline]:
        self.blocks = [costs.blocks for costs in self.stages]
        self.timelines = [Timeline([], []) for _ in self.tables]
        self.now_ms = [0.0] * len(self.tables)
        self.link_ms = dict.fromkeys(self.links, 0.0)
        for rank in range(len(self.tables)):
            self.look_ahead(rank)
        while self.next_ends:
            self.compute(*heappop(self.next_ends))
        if self.lacking:
            reasons = [
                f"rank {rank} waits in {self.next(rank)} for {need}"
                for need, ranks in self.lacking.items()
                for rank in ranks
            ]
            raise IllegalTable("deadlock", "; ".join(sorted(reasons)))
        return self.timelines

    def next(self, rank: int) -> Action | None:
        done, table = len(self.timelines[rank].computes), self.tables[rank]
        return table[done] if done < len(table) else None

    def look_ahead(self, rank: int) -> None:
        """When a rank's next action will end, or what it lacks."""
        action = self.next(rank)
        if action is None:
            return
        need = self.source(action)
        if need is not None and need not in self.sent:
            self.lacking[need].append(rank)
            return
        if need is not None:
            there_ms, source = self.sent[need]
            self.now_ms[rank] = max(self.now_ms[rank], there_ms + (self.pipe_ms if source != rank else 0.0))
        heappush(self.next_ends, (self.now_ms[rank] + self.stages[action.stage].of(action), rank))

    def compute(self, end_ms: float, rank: int) -> None:
        """The next action of a rank, which ends then, and the transfer that it starts."""
        action = self.tables[rank][len(self.timelines[rank].computes)]
        self.timelines[rank].computes.append(Interval(action, self.now_ms[rank], end_ms))
        self.now_ms[rank] = there_ms = end_ms
        costs, transfer = self.stages[action.stage], starts(action, self.blocks[action.stage])
        if transfer is not None:
            departure_ms = max(self.link_ms[self.links[rank]], end_ms)
            arrival_ms = self.link_ms[self.links[rank]] = departure_ms + costs.of(transfer)
            self.timelines[rank].transfers.append(Interval(transfer, departure_ms, arrival_ms))
            there_ms = arrival_ms + costs.latency_ms
        self.sent[action] = there_ms, rank
        for waiting in (rank, *self.lacking.pop(action, ())):
            self.look_ahead(waiting)

    def source(self, action: Action) -> Action | None:
        """The action that sends what this one waits for: tokens on this rank's link, or what passes between stages."""
        work, stage, blocks = action.work, action.stage, self.blocks[action.stage]
        if action.phase is Phase.ATTEND and not self.has_inputs:
            if work is Pass.FORWARD and action.block == 0 and stage > 0:
                return Action(work, Phase.ATTEND, self.blocks[stage - 1], action.micro_batch, stage - 1)
            if work is Pass.BACKWARD and action.block == blocks and stage < len(self.blocks) - 1:
                return Action(work, Phase.ATTEND, 0, action.micro_batch, stage + 1)
        return sender(action, blocks)
