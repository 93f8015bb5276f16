"""What the way of tokens to their experts costs on each link, in bytes: expected for a router, or exact for its routes.

A transport takes rows over one hop or two. On a hop a rank sends one message to each rank that it reaches:

    way                      holds
    dispatch           out   counts, a weight per pair, a mask per row; rows in the wire format
    combine            home  rows in the compute dtype
    gradient of combine  out   rows in the wire format
    gradient of dispatch home  a number per pair; rows in the compute dtype

A pair is (row, expert). `alltoall` sends a row per pair, `rank` one per (token, rank), both straight to the rank of the
expert. `hierarchical` sends one per (token, node) to the rank with the same index in that node, which sends one per
(token, rank) on to the ranks of its node. Experts lie in equal contiguous shares over the ranks, in their order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import comb
from typing import TypeVar

from dstrain.mesh.topology import Link

# Counted, or expected.
Number = TypeVar("Number", int, float)

# Of a message whose length the receiver does not know, in front of it; the parts of a message begin at its multiples.
HEADER_BYTES = 16
COUNTS_BYTES = 8
WEIGHT_BYTES = 4
# Encoded rows are a multiple of this long.
ROW_ALIGNMENT = 8


class Way(Enum):
    """A transfer of an MoE block."""

    DISPATCH = "dispatch"
    COMBINE = "combine"
    COMBINE_GRADIENT = "gradient of combine"
    DISPATCH_GRADIENT = "gradient of dispatch"

    @property
    def is_out(self) -> bool:
        """Towards the experts; the others go home, and so against the direction of `Message`."""
        return self in (Way.DISPATCH, Way.COMBINE_GRADIENT)


@dataclass(frozen=True)
class Rows:
    """Bytes of a row out (`row_bytes` of the wire format) and home (hidden size times the compute dtype's)."""

    out_bytes: int
    home_bytes: int

    @staticmethod
    def of(wire: str, compute_dtype: str, hidden: int) -> "Rows":
        return Rows(row_bytes(wire, hidden), row_bytes(compute_dtype, hidden))


@dataclass(frozen=True)
class Message:
    """From one rank to another on a hop: how much of it is for the `experts` experts behind the target.

    Ranks are numbered within the group. Rows and pairs are expected numbers where they were not counted.
    """

    hop: int
    source: int
    target: int
    rows: float
    pairs: float
    experts: int

    def sender(self, way: Way) -> int:
        return self.source if way.is_out else self.target

    def num_bytes(self, way: Way, rows: Rows) -> float:
        """What travels, header included; nothing does from a rank to itself."""
        if self.source == self.target:
            return 0
        if way is Way.DISPATCH:
            return HEADER_BYTES + first_bytes(self.rows, self.pairs, self.experts, rows.out_bytes)
        if way is Way.COMBINE_GRADIENT:
            return self.rows * rows.out_bytes
        return home_bytes(self.rows, self.pairs if way is Way.DISPATCH_GRADIENT else 0, rows.home_bytes)


def row_bytes(wire: str, hidden: int) -> int:
    """Bytes of a row in a wire format (dispatch/wire.py), a multiple of 8."""
    sizes = {
        "float32": 4 * hidden,
        "bfloat16": 2 * hidden,
        "fp8": hidden + -(-hidden // 128),
        "mxfp8": hidden + -(-hidden // 32),
        "fp4": -(-hidden // 32) * 17,
        "logfmt8": hidden + 4 * -(-hidden // 128),
        "logfmt10": hidden + -(-hidden // 4) + 4 * -(-hidden // 128),
    }
    return -(-sizes[wire] // ROW_ALIGNMENT) * ROW_ALIGNMENT


def mask_bytes(experts: int) -> int:
    """Of the mask of a row for a rank with so many experts."""
    return -(-experts // 8)


def first_bytes(rows: Number, pairs: Number, experts: int, out_bytes: int) -> Number:
    """Of a first message out to a rank with `experts` experts behind it, without header."""
    return _aligned(COUNTS_BYTES + pairs * WEIGHT_BYTES + rows * mask_bytes(experts)) + rows * out_bytes


def home_bytes(rows: Number, pairs: Number, row_bytes: int) -> Number:
    """Of a message home; `pairs` is 0 where no numbers travel."""
    return _aligned(pairs * WEIGHT_BYTES) + rows * row_bytes


def _aligned(num_bytes: Number) -> Number:
    return -(-num_bytes // HEADER_BYTES) * HEADER_BYTES


# -- Exact: from routes -----------------------------------------------------------------------------------------------

# The experts of each token of a rank.
Routes = Sequence[Sequence[int]]


def exact(kind: str, nodes: Sequence[Sequence[int]], num_experts: int, routes: Sequence[Routes]) -> list[Message]:
    """The messages of one block and micro-batch, from the routes of every rank of the group.

    `nodes`: the ranks of each node, 0 to R - 1 in all; for `hierarchical` equally many, in order. Expert e is that at
    place e of the contiguous order.
    """
    ranks = len(routes)
    held = num_experts // ranks
    if kind != "hierarchical":
        return list(_direct(0, range(ranks), range(ranks), routes, held, kind == "alltoall"))
    per_node = held * len(nodes[0])
    messages: list[Message] = []
    for column in zip(*nodes, strict=True):
        messages += _direct(0, column, column, [routes[rank] for rank in column], per_node, False)
    for node in nodes:
        # What a rank passes on are the tokens of all ranks with its index.
        passed = [[token for other in nodes for token in routes[other[index]]] for index in range(len(node))]
        messages += [m for m in _direct(1, node, range(ranks), passed, held, False) if m.target in node]
    return messages


def _direct(
    hop: int, sources: Sequence[int], targets: Sequence[int], routes: Sequence[Routes], experts: int, row_per_pair: bool
) -> Iterator[Message]:
    """From every source to every target; target number p has experts p * experts to (p + 1) * experts."""
    for source, tokens in zip(sources, routes, strict=True):
        rows, pairs = [0] * len(targets), [0] * len(targets)
        for token in tokens:
            places = [expert // experts for expert in token]
            for place in places:
                pairs[place] += 1
            for place in places if row_per_pair else set(places):
                rows[place] += 1
        for place, target in enumerate(targets):
            yield Message(hop, source, target, rows[place], pairs[place], experts)


# -- Expected: from a balanced router ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Router:
    """One that likes all experts equally.

    With groups, a token has experts in all of its groups: they were chosen because they hold the best ones.
    """

    num_experts: int
    experts_per_token: int
    num_groups: int = 1
    groups_per_token: int = 1

    def places(self, places: int) -> float:
        """How many of `places` equal contiguous shares of the experts a token visits on average.

        Without groups P * (1 - C(E - E/P, K) / C(E, K)), which DeepEP sizes its kernels by.
        """
        share, size = self.num_experts // places, self.num_experts // self.num_groups
        groups = [range(first, first + size) for first in range(0, self.num_experts, size)]
        chosen = min(self.groups_per_token, self.experts_per_token)
        every = _choices(self.experts_per_token, chosen, (size,) * self.num_groups)
        visited = 0.0
        for first in range(0, self.num_experts, share):
            elsewhere = [size - len(range(max(first, g.start), min(first + share, g.stop))) for g in groups]
            visited += 1 - _choices(self.experts_per_token, chosen, tuple(sorted(elsewhere))) / every
        return visited


@lru_cache(maxsize=1024)
def _choices(experts: int, chosen: int, group_sizes: Sequence[int]) -> int:
    """Ways to choose a token's experts out of `chosen` groups, of those of these sizes."""
    # ways[c][n]: n experts in c groups, at least one in each.
    ways = [[0] * (experts + 1) for _ in range(chosen + 1)]
    ways[0][0] = 1
    for size in group_sizes:
        for count in reversed(range(chosen)):
            for before in range(experts):
                for more in range(1, experts - before + 1):
                    ways[count + 1][before + more] += ways[count][before] * comb(size, more)
    return ways[chosen][experts]


def expected(kind: str, node_sizes: Sequence[int], router: Router, tokens: int) -> list[Message]:
    """The messages that a rank in the first node sends out for `tokens` tokens if the tokens of all ranks are alike."""
    ranks, own = sum(node_sizes), node_sizes[0]
    held, pairs = router.num_experts // ranks, tokens * router.experts_per_token
    if kind != "hierarchical":
        rows = pairs if kind == "alltoall" else tokens * router.places(ranks)
        return [Message(0, 0, rank, rows / ranks, pairs / ranks, held) for rank in range(ranks)]
    nodes = len(node_sizes)
    share = tokens * router.places(nodes) / nodes, pairs / nodes, held * own
    across = [Message(0, 0, node * own, *share) for node in range(nodes)]
    # The tokens of one rank of every node are passed on.
    passed = nodes * tokens * router.places(ranks) / ranks, nodes * pairs / ranks, held
    return across + [Message(1, 0, rank, *passed) for rank in range(own)]


# -- On the links -----------------------------------------------------------------------------------------------------


def link_bytes(messages: Sequence[Message], node_of_rank: Sequence[int], rows: Rows) -> dict[tuple[Way, Link], float]:
    """What messages put on each kind of link, by way.

    Of `expected`, also what one rank sends in each way: what others send home to it is what it sends home to them.
    """
    totals = {(way, link): 0.0 for way in Way for link in (Link.NODE, Link.NETWORK)}
    for message in messages:
        link = Link.NODE if node_of_rank[message.source] == node_of_rank[message.target] else Link.NETWORK
        for way in Way:
            totals[way, link] += message.num_bytes(way, rows)
    return totals
