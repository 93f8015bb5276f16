"""What a case must send and how long that takes: counted from the routes, not by the code that sends."""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from dstrain.bench.case import Case
from dstrain.bench.testbed import Fabric
from dstrain.bench.workload import SHARES, Workload, all_routes
from dstrain.mesh.topology import Link
from dstrain.plan.traffic import Message, Rows, Way, exact
from dstrain.schedule.action import Pass, Phase
from dstrain.schedule.simulate import Costs

# Of a frame: Ethernet's header, and what IP and TCP (with time stamps) take of the MTU.
FRAME_BYTES, HEADER_BYTES = 14, 52
# Packing and unpacking, as a share of a block's forward pass (schedule/order.py assumes the same).
LATENCY = 0.05
COMPUTE_DTYPE = "bfloat16"
# A way as the planner names it.
PLANNED = {
    Way.DISPATCH: (Pass.FORWARD, "dispatch"),
    Way.COMBINE: (Pass.FORWARD, "combine"),
    Way.COMBINE_GRADIENT: (Pass.BACKWARD, "combine"),
    Way.DISPATCH_GRADIENT: (Pass.BACKWARD, "dispatch"),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step by (way, node)."""

    sent: Counter[tuple[Way, int]] = field(default_factory=Counter)
    received: Counter[tuple[Way, int]] = field(default_factory=Counter)
    # Between the ranks of a node.
    inside: Counter[tuple[Way, int]] = field(default_factory=Counter)

    def busiest(self, *ways: Way) -> int:
        """What the busiest card sends or receives."""
        return max(max(_by_node(counter, ways), default=0) for counter in (self.sent, self.received))

    def busiest_inside(self, *ways: Way) -> int:
        return max(_by_node(self.inside, ways), default=0)

    def most_sent(self) -> int:
        """By the card that sends most."""
        return max(_by_node(self.sent, tuple(Way)), default=0)


@lru_cache
def traffic(work: Workload, case: Case) -> Traffic:
    """Of a whole step."""
    rows, total, topology = Rows.of(case.wire, COMPUTE_DTYPE, work.hidden_size), Traffic(), work.topology
    for message in _messages(work, case.kind):
        source, target = topology.node_of_rank[message.source], topology.node_of_rank[message.target]
        for way in Way:
            num_bytes = int(message.num_bytes(way, rows))
            start, end = (source, target) if way.is_out else (target, source)
            if topology.link(message.source, message.target) is Link.NETWORK:
                total.sent[way, start] += num_bytes
                total.received[way, end] += num_bytes
            else:
                total.inside[way, start] += num_bytes
    return total


def costs(work: Workload, case: Case, forward_ms: float, fabric: Fabric) -> Costs:
    """Nominal times of a block's work and of a micro-batch's transfers, for the planner."""
    blocks, bytes_ = range(work.blocks), traffic(work, case)
    compute_ms = {
        (work_, phase, block): SHARES[phase] * forward_ms for work_ in Pass for phase in Phase for block in blocks
    }
    compute_ms |= {(work_, Phase.ATTEND, work.blocks): 0.0 for work_ in Pass}
    transfer_ms: dict[tuple[Pass, str, int], float] = {}
    for way, (work_, name) in PLANNED.items():
        across_ms = line_ms(bytes_.busiest(way), fabric.rate_mbit, fabric.mtu)
        # The loopback's packets are so large that their headers don't count.
        inside_ms = bytes_.busiest_inside(way) * 8e-3 / fabric.loopback_mbit if fabric.loopback_mbit else 0.0
        each_ms = max(across_ms, inside_ms) / (work.blocks * work.micro_batches)
        transfer_ms |= {(work_, name, block): each_ms for block in blocks}
    return Costs(compute_ms, transfer_ms, LATENCY * forward_ms)


def line_ms(payload_bytes: float, rate_mbit: float | None, mtu: int) -> float:
    """Time of a payload in full frames on a line of that rate; 0 without a limit."""
    frames = (mtu + FRAME_BYTES) / (mtu - HEADER_BYTES)
    return payload_bytes * frames * 8e-3 / rate_mbit if rate_mbit else 0.0


def _messages(work: Workload, kind: str) -> list[Message]:
    nodes = work.topology.nodes(range(work.ranks))
    return [
        message
        for block in range(work.blocks)
        for number in range(work.micro_batches)
        for message in exact(
            kind, nodes, work.num_experts, [by_rank[block][number].experts_TK.tolist() for by_rank in all_routes(work)]
        )
    ]


def _by_node(counter: Counter[tuple[Way, int]], ways: tuple[Way, ...]) -> list[int]:
    nodes: Counter[int] = Counter()
    for (way, node), num_bytes in counter.items():
        if way in ways:
            nodes[node] += num_bytes
    return list(nodes.values())
