"""Nodes as numbers: who shares one, and which groups are grids."""

import pytest

from dstrain.mesh.topology import Link, Topology


def test_nodes_are_numbered_in_the_order_of_their_first_rank():
    assert Topology.of_names(["b", "a", "b", "c"]).node_of_rank == (0, 1, 0, 2)


def test_links():
    topology = Topology((0, 0, 1))
    links = [[topology.link(a, b) for b in range(3)] for a in range(3)]
    self, node, network = Link.SELF, Link.NODE, Link.NETWORK
    assert links == [[self, node, network], [node, self, network], [network, network, self]]


@pytest.mark.parametrize(
    ("nodes", "ranks", "grid"),
    [
        ((0, 0, 1, 1), [0, 1, 2, 3], [[0, 1], [2, 3]]),
        ((0, 0, 1, 1), [0, 2], [[0], [2]]),
        ((0, 0, 1, 1), [2, 3], [[2, 3]]),
        # Nodes of different sizes.
        ((0, 0, 0, 1), [0, 1, 2, 3], None),
        # Neighbours that sit on different nodes.
        ((0, 1, 0, 1), [0, 1, 2, 3], None),
    ],
)
def test_grid(nodes: tuple[int, ...], ranks: list[int], grid: list[list[int]] | None):
    assert Topology(nodes).grid(ranks) == grid


@pytest.mark.parametrize(
    ("nodes", "groups", "number"),
    [
        ((0, 0, 1, 1), [[0, 1, 2, 3]], 2),
        ((0, 0, 1, 1), [[0, 1], [2, 3]], 1),
        # One group sits on a node, the other one on two.
        ((0, 0, 0, 1), [[0, 1], [2, 3]], 1),
        ((0, 0, 0, 1), [[0, 1, 2, 3]], 1),
        ((0, 0, 1, 1, 2, 2, 3, 3), [[0, 1, 2, 3], [4, 5, 6, 7]], 2),
    ],
)
def test_nodes_of_groups_that_are_alike(nodes: tuple[int, ...], groups: list[list[int]], number: int):
    assert Topology(nodes).nodes_of_each(groups) == number
