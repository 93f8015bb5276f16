"""EPLB as published (github.com/deepseek-ai/EPLB; DeepSeek-V3 section 3.4): what `rebalance` is compared with.

Groups of experts go to nodes, experts that are busy get further replicas inside their node, and replicas go to the
ranks of the node, each time the heaviest to the lightest that has room. One thing is mended: no rank gets two replicas
of one expert.
"""

from collections.abc import Sequence

from dstrain.plan.placement import Placement, pack


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
