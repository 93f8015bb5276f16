"""What a table costs: the same order of actions that a rank runs, played with given times. No torch.

The machine is one compute stream and one link. Actions run in the order of the table; an action begins when the one
before it has ended and its transfer has arrived. A transfer sets out when the action that starts it has ended and the
transfer before it has arrived (first in, first out). All ranks are alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.table import Table, Transfer, sender, starts


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
    blocks = costs.blocks
    computes, transfers = [], []
    arrival_ms: dict[Action, float] = {}
    now_ms = link_ms = 0.0
    for action in table:
        source = sender(action, blocks)
        start_ms = now_ms if source is None else max(now_ms, arrival_ms[source])
        now_ms = start_ms + costs.of(action)
        computes.append(Interval(action, start_ms, now_ms))
        transfer = starts(action, blocks)
        if transfer is not None:
            departure_ms = max(link_ms, now_ms)
            link_ms = departure_ms + costs.of(transfer)
            arrival_ms[action] = link_ms + costs.latency_ms
            transfers.append(Interval(transfer, departure_ms, link_ms))
    return Timeline(computes, transfers)
