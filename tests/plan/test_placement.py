"""`rebalance` against EPLB (eplb.py, which is held against its published example); invariants for every load."""

import random
from collections import Counter

import pytest

from dstrain.plan.placement import Placement, contiguous, pack, rank_loads, rebalance, slots
from tests.plan.eplb import place, replicate

# Loads and placement of the example in the README of github.com/deepseek-ai/EPLB: two layers of 12 experts in 4 groups,
# 16 replicas on 8 GPUs of 2 nodes.
EXAMPLE = [
    (
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    ),
    (
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ),
]


@pytest.mark.parametrize(("loads", "expected"), EXAMPLE)
def test_the_published_example(loads: list[int], expected: list[int]):
    placement = place(loads, 16, 8, groups=4, nodes=2)
    assert [expert for rank in placement for expert in rank] == expected


def loads_of(seed: int, experts: int) -> list[float]:
    """Skewed like a router early in training: a few experts take most tokens, some take none."""
    rng = random.Random(seed)
    return [float(int(rng.paretovariate(1.0) * 100) if rng.random() > 0.1 else 0) for _ in range(experts)]


def busiest(loads: list[float], placement: Placement) -> float:
    return max(rank_loads(loads, placement))


def moves(before: Placement, after: Placement) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(
    ("experts", "replicas", "ranks", "groups", "nodes"),
    [(12, 16, 8, 4, 2), (16, 16, 4, 1, 1), (8, 16, 4, 2, 2), (12, 24, 12, 3, 2), (8, 32, 4, 1, 1)],
)
def test_replicas(seed: int, experts: int, replicas: int, ranks: int, groups: int, nodes: int):
    loads = loads_of(seed, experts)
    placement = place(loads, replicas, ranks, groups=groups, nodes=nodes)
    held = Counter(expert for rank in placement for expert in rank)
    assert held.keys() == set(range(experts))
    assert held.total() == replicas
    assert {len(rank) for rank in placement} == {replicas // ranks}
    assert all(len(set(rank)) == len(rank) for rank in placement), "two replicas of one expert on one rank"
    assert sum(rank_loads(loads, placement)) == pytest.approx(sum(loads))
    if groups % nodes == 0:
        share = ranks // nodes
        of_node = [{e for rank in placement[n * share : (n + 1) * share] for e in rank} for n in range(nodes)]
        size = experts // groups
        assert all({e // size for e in a}.isdisjoint(e // size for e in b) for a in of_node for b in of_node if a != b)


def test_a_rank_that_would_get_a_second_replica_makes_room():
    # Greedy alone fills the others first and leaves the last rank with the last replica of an expert that it has.
    loads = [9.0, 5.0, 5.0, 5.0]
    placement = place(loads, 6, 3)
    assert all(len(set(rank)) == 2 for rank in placement)


def test_further_replicas_go_where_the_load_per_replica_is_highest():
    assert replicate([10, 4, 3], 6, most=3) == [3, 2, 1]
    assert replicate([10, 4, 3], 6, most=2) == [2, 2, 2]


def test_packs_are_filled_equally():
    assert pack(range(6), [6, 5, 4, 3, 2, 1], 3) == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(("replicas", "ranks"), [(13, 4), (8, 4), (64, 4)])
def test_counts_must_divide(replicas: int, ranks: int):
    with pytest.raises(ValueError, match="experts"):
        place([1.0] * 12, replicas, ranks)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("experts", "ranks", "groups", "nodes"), [(16, 4, 1, 1), (32, 8, 4, 2), (8, 8, 1, 1)])
def test_rebalancing(seed: int, experts: int, ranks: int, groups: int, nodes: int):
    loads, now = loads_of(seed, experts), contiguous(experts, ranks)
    after = rebalance(loads, now, groups=groups, nodes=nodes)
    assert sorted(expert for rank in after for expert in rank) == list(range(experts))
    assert {len(rank) for rank in after} == {experts // ranks}
    assert after == now or busiest(loads, after) < busiest(loads, now)
    # With groups, greedy may put others together in a node, and those may divide better or worse among its ranks.
    assert groups > 1 or busiest(loads, after) <= 1.001 * busiest(loads, place(loads, experts, ranks))
    share, size = ranks // nodes, experts // groups
    for node in range(nodes):
        held = Counter(expert // size for rank in after[node * share : (node + 1) * share] for expert in rank)
        assert set(held.values()) == {size} or groups == 1, "a group is split over nodes"
    stayed = [(a, b) for old, new in zip(now, after, strict=True) for a, b in zip(old, new, strict=True) if a in new]
    assert all(a == b for a, b in stayed), "an expert that stays on its rank keeps its slot"


def test_rebalancing_twice_moves_nothing():
    loads = loads_of(1, 32)
    once = rebalance(loads, contiguous(32, 8))
    assert rebalance(loads, once) == once


def test_even_loads_move_nothing():
    assert rebalance([5.0] * 16, contiguous(16, 4)) == contiguous(16, 4)


def test_one_hot_rank_needs_few_moves():
    # Two busy experts on rank 0: one of them changes places with one other, where greedy deals everything anew.
    loads = [9.0, 9.0, 1.0, 1.0] + [1.0, 1.0, 1.0, 1.0] * 3
    now = contiguous(16, 4)
    after = rebalance(loads, now)
    assert moves(now, after) == 2
    assert busiest(loads, after) == busiest(loads, place(loads, 16, 4))
    assert moves(now, place(loads, 16, 4)) > 8


def test_where_swaps_stall_the_greedy_packs_keep_the_names_that_move_least():
    # No single swap helps, but the greedy answer is better.
    loads = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    now = ((0, 1, 5), (2, 3, 4))
    after = rebalance(loads, now)
    assert busiest(loads, after) <= 1.001 * busiest(loads, place(loads, 6, 2))


def test_slots_invert_the_placement():
    assert slots(((2, 0), (3, 1))) == [1, 3, 0, 2]
