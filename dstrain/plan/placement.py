"""Which rank holds which expert, by measured load (EPLB, github.com/deepseek-ai/EPLB; DeepSeek-V3 section 3.4).

`place` is the published greedy algorithm: groups of experts go to nodes, experts that are busy get further replicas
inside their node, and replicas go to the ranks of the node, each time the heaviest to the lightest that has room. One
thing is mended: no rank gets two replicas of one expert.

`rebalance` is for training, where there is one replica of each expert and a move costs time. It starts from where the
experts are and swaps until it is as good as the greedy answer, which takes a fraction of the moves; where swaps don't
get there it takes the greedy answer and names its ranks so that most experts stay.

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


# -- EPLB -------------------------------------------------------------------------------------------------------------


def place(loads: Sequence[float], replicas: int, ranks: int, *, groups: int = 1, nodes: int = 1) -> Placement:
    """`replicas` copies of the experts on `ranks` ranks of `nodes` nodes, `replicas / ranks` on each.

    Groups stay whole in a node if they divide evenly among nodes; otherwise groups and nodes are ignored, as in EPLB.
    Raises ValueError where counts don't divide, or where a rank would need two replicas of one expert.
    """
    if groups % nodes:
        groups = nodes = 1
    _check_division(len(loads), replicas, ranks, groups, nodes)
    size = len(loads) // groups
    group_loads = [sum(loads[group * size : (group + 1) * size]) for group in range(groups)]
    placement: list[tuple[int, ...]] = []
    for node in pack(range(groups), group_loads, nodes):
        experts = [expert for group in node for expert in range(group * size, (group + 1) * size)]
        copies = replicate([loads[expert] for expert in experts], replicas // nodes, most=ranks // nodes)
        placement += _pack_replicas(experts, copies, loads, ranks // nodes)
    return tuple(placement)


def _check_division(experts: int, replicas: int, ranks: int, groups: int, nodes: int) -> None:
    if experts % groups or ranks % nodes or replicas % ranks:
        raise ValueError(f"{experts} experts in {groups} groups, {replicas} replicas, {ranks} ranks on {nodes} nodes")
    if not experts <= replicas <= experts * (ranks // nodes):
        raise ValueError(f"{replicas} replicas of {experts} experts: at least one each, at most one on every rank")


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


def replicate(loads: Sequence[float], places: int, most: int) -> list[int]:
    """How many copies each expert gets: every further place goes to the one with the highest load per copy."""
    copies = [1] * len(loads)
    for _ in range(places - len(loads)):
        growing = (n for n in range(len(loads)) if copies[n] < most)
        copies[max(growing, key=lambda n: loads[n] / copies[n])] += 1
    return copies


def _pack_replicas(
    experts: Sequence[int], copies: Sequence[int], loads: Sequence[float], packs: int
) -> list[tuple[int, ...]]:
    """`pack` for replicas: a pack that holds an expert already is passed over, and makes room where none is left."""
    room = sum(copies) // packs
    share = {expert: loads[expert] / count for expert, count in zip(experts, copies, strict=True)}
    replicas = [expert for expert, count in zip(experts, copies, strict=True) for _ in range(count)]
    packed: list[list[int]] = [[] for _ in range(packs)]
    for expert in sorted(replicas, key=lambda expert: -share[expert]):
        lacking = [pack for pack in packed if expert not in pack]
        free = [pack for pack in lacking if len(pack) < room]
        if free:
            min(free, key=lambda pack: sum(share[e] for e in pack)).append(expert)
        else:
            _squeeze_in(expert, lacking[0], next(pack for pack in packed if len(pack) < room), share)
    return [tuple(pack) for pack in packed]


def _squeeze_in(expert: int, full: list[int], free: list[int], share: dict[int, float]) -> None:
    """Puts `expert` into a full pack, whose expert closest in load moves to the pack with room, which has `expert`."""
    movable = [other for other in full if other not in free]
    other = min(movable, key=lambda other: abs(share[other] - share[expert]))
    free.append(other)
    full[full.index(other)] = expert


# -- training ---------------------------------------------------------------------------------------------------------


def rebalance(loads: Sequence[float], now: Placement, *, groups: int = 1, nodes: int = 1) -> Placement:
    """A placement whose busiest rank has less load than now, or `now` itself; every expert has one replica.

    With several groups, each stays whole in a node; `groups` must be a multiple of `nodes`, as it is in `place`.
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
