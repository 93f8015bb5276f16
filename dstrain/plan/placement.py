"""Which rank holds which expert, by measured load (after EPLB, github.com/deepseek-ai/EPLB; DeepSeek-V3 section 3.4).

There is one replica of each expert, and a move costs time. So `rebalance` starts from where the experts are and swaps
until it is as good as EPLB's greedy answer, the heaviest expert to the lightest rank that has room, which takes a
fraction of the moves; where swaps don't get there it takes the greedy answer and names its ranks so that most experts
stay.

Loads are tokens counted over some steps, one number per expert.
"""

from collections.abc import Iterator, Sequence

# The experts of each rank, in the order of its slots; ranks of a node follow one another.
Placement = tuple[tuple[int, ...], ...]

# Swaps may stop this far above the greedy answer: the last thousandth of load is not worth moving everything.
NEAR = 1.001


def contiguous(num_experts: int, ranks: int) -> Placement:
    """The placement of a new run: equal runs of experts."""
    share = num_experts // ranks
    return tuple(tuple(range(rank * share, (rank + 1) * share)) for rank in range(ranks))


def rank_loads(loads: Sequence[float], placement: Placement) -> list[float]:
    """The load of each rank; an expert's load is shared equally by its replicas."""
    copies = [0] * len(loads)
    for expert in (expert for rank in placement for expert in rank):
        copies[expert] += 1
    return [sum(loads[expert] / copies[expert] for expert in rank) for rank in placement]


def slots(placement: Placement) -> list[int]:
    """The number of each expert's slot, counted through the ranks; for a placement without replicas."""
    order = [expert for rank in placement for expert in rank]
    numbers = [0] * len(order)
    for slot, expert in enumerate(order):
        numbers[expert] = slot
    return numbers


def pack(items: Sequence[int], load: Sequence[float], packs: int) -> list[list[int]]:
    """Equally many items in every pack: the heaviest first, each into the lightest pack that has room."""
    room = len(items) // packs
    if room == 1:
        return [[item] for item in items]
    packed: list[list[int]] = [[] for _ in range(packs)]
    weights = [0.0] * packs
    for item in sorted(items, key=lambda item: -load[item]):
        lightest = min((p for p in range(packs) if len(packed[p]) < room), key=weights.__getitem__)
        packed[lightest].append(item)
        weights[lightest] += load[item]
    return packed


def rebalance(loads: Sequence[float], now: Placement, *, groups: int = 1, nodes: int = 1) -> Placement:
    """A placement whose busiest rank has less load than now, or `now` itself; every expert has one replica.

    With several groups, each stays whole in a node; where they don't divide evenly among nodes, both are ignored.
    """
    if groups % nodes:
        groups = nodes = 1
    ranks, size = len(now) // nodes, len(loads) // groups
    group_loads = [sum(loads[group * size : (group + 1) * size]) for group in range(groups)]
    better: list[list[int]] = []
    for node, members in enumerate(_settle(group_loads, _groups_of_nodes(now, groups, nodes, size))):
        experts = {expert for group in members for expert in range(group * size, (group + 1) * size)}
        better += _settle(loads, _stay(loads, now[node * ranks : (node + 1) * ranks], experts))
    if max(rank_loads(loads, now)) <= max(rank_loads(loads, _frozen(better))):
        return now
    return tuple(_same_slots(before, after) for before, after in zip(now, better, strict=True))


def _frozen(packs: Sequence[Sequence[int]]) -> Placement:
    return tuple(tuple(pack) for pack in packs)


def _groups_of_nodes(now: Placement, groups: int, nodes: int, size: int) -> list[list[int]]:
    """The groups that each node holds."""
    if nodes == 1:
        return [list(range(groups))]
    ranks = len(now) // nodes
    held = [{expert // size for rank in now[n * ranks : (n + 1) * ranks] for expert in rank} for n in range(nodes)]
    if any(len(of_node) != groups // nodes for of_node in held):
        raise ValueError(f"{groups} groups do not lie whole in {nodes} nodes")
    return [sorted(of_node) for of_node in held]


def _stay(loads: Sequence[float], now: Placement, experts: set[int]) -> list[list[int]]:
    """`experts` on the ranks of a node: those that are there stay, the others go to the lightest ranks with room."""
    room = len(experts) // len(now)
    packs = [[expert for expert in rank if expert in experts] for rank in now]
    arriving = experts.difference(*now)
    for expert in sorted(arriving, key=lambda expert: (-loads[expert], expert)):
        free = [pack for pack in packs if len(pack) < room]
        min(free, key=lambda pack: sum(loads[e] for e in pack)).append(expert)
    return packs


def _settle(loads: Sequence[float], now: list[list[int]]) -> list[list[int]]:
    """Packs about as light as those of `pack`, by the fewest swaps that lead there from `now`."""
    greedy = pack(sorted(item for items in now for item in items), loads, len(now))
    target = NEAR * max(_weights(loads, greedy))
    packs = [list(items) for items in now]
    while max(_weights(loads, packs)) > target:
        swap = _best_swap(loads, packs)
        if swap is None:
            return _renamed(greedy, now)
        heavy, a, other, b = swap
        packs[heavy][a], packs[other][b] = packs[other][b], packs[heavy][a]
    return packs


def _weights(loads: Sequence[float], packs: Sequence[Sequence[int]]) -> list[float]:
    return [sum(loads[item] for item in items) for items in packs]


def _best_swap(loads: Sequence[float], packs: list[list[int]]) -> tuple[int, int, int, int] | None:
    """The exchange between the heaviest pack and another that leaves the heavier of the two lightest.

    As (heaviest pack, place in it, other pack, place in that); None if none helps.
    """
    weights = _weights(loads, packs)
    heavy = max(range(len(packs)), key=weights.__getitem__)

    def outcomes() -> Iterator[tuple[float, tuple[int, int, int, int]]]:
        for other in range(len(packs)):
            for a, mine in enumerate(packs[heavy]):
                for b, theirs in enumerate(packs[other]):
                    gap = loads[mine] - loads[theirs]
                    if 0 < gap < weights[heavy] - weights[other]:
                        yield max(weights[heavy] - gap, weights[other] + gap), (heavy, a, other, b)

    return min(outcomes(), default=(0.0, None))[1]


def _renamed(packs: list[list[int]], now: list[list[int]]) -> list[list[int]]:
    """The same packs in another order: each takes the place of the one it shares most with, best match first."""
    common = [(len(set(pack) & set(held)), p, n) for p, pack in enumerate(packs) for n, held in enumerate(now)]
    order: dict[int, int] = {}
    for _, p, n in sorted(common, key=lambda match: (-match[0], match[1], match[2])):
        if n not in order and p not in order.values():
            order[n] = p
    return [packs[order[n]] for n in range(len(now))]


def _same_slots(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """The experts of `after`, those that stay in their slots of `before`."""
    arriving = iter(sorted(set(after) - set(before)))
    return tuple(expert if expert in after else next(arriving) for expert in before)
