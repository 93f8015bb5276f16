"""Which ranks share a node, as pure integers; what a byte crosses on its way from one rank to another."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Link(Enum):
    """The class of a link between two ranks."""

    SELF = "self"
    NODE = "node"
    NETWORK = "network"


@dataclass(frozen=True)
class Topology:
    """`node_of_rank[r]` numbers the node of global rank r; nodes are numbered in the order of their first rank."""

    node_of_rank: tuple[int, ...]

    @staticmethod
    def of_names(names: Sequence[object]) -> "Topology":
        """From whatever identifies each rank's node (equal on the same node)."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return Topology(tuple(numbers[name] for name in names))

    def link(self, a: int, b: int) -> Link:
        if a == b:
            return Link.SELF
        return Link.NODE if self.node_of_rank[a] == self.node_of_rank[b] else Link.NETWORK

    def nodes(self, ranks: Sequence[int]) -> list[list[int]]:
        """The ranks of a group, by node, in the order of the group."""
        by_node: dict[int, list[int]] = {}
        for rank in ranks:
            by_node.setdefault(self.node_of_rank[rank], []).append(rank)
        return list(by_node.values())

    def grid(self, ranks: Sequence[int]) -> list[list[int]] | None:
        """Nodes x ranks of a node, if the group is a run of equally large nodes; otherwise None.

        Row-major, the grid is the group itself: what a hierarchical transport needs to name a peer by (node, index).
        """
        grid = self.nodes(ranks)
        even = len({len(node) for node in grid}) == 1 and [rank for node in grid for rank in node] == list(ranks)
        return grid if even else None

    def nodes_of_each(self, groups: Sequence[Sequence[int]]) -> int:
        """Equally large nodes that every one of the groups spans; 1 where they are not alike.

        The same on all ranks, whichever group they are in.
        """
        grids = [self.grid(ranks) for ranks in groups]
        numbers = {1 if grid is None else len(grid) for grid in grids}
        return numbers.pop() if len(numbers) == 1 else 1
