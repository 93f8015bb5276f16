"""Whether groups of experts follow the nodes: what a limit of groups per token means for the network.

Experts lie in equal contiguous shares over the ranks of an expert-parallel group, and so do groups of experts over
experts. Where each group lies whole on one node, a token that uses M groups crosses to M nodes at most.
"""

from collections.abc import Sequence

from dstrain.plan.traffic import Router


def group_nodes(router: Router, node_sizes: Sequence[int]) -> list[int]:
    """On how many nodes each group of experts lies; `node_sizes` are the ranks of each node, in order."""
    size, held = router.num_experts // router.num_groups, router.num_experts // sum(node_sizes)
    node_of_rank = [node for node, ranks in enumerate(node_sizes) for _ in range(ranks)]
    firsts = range(0, router.num_experts, size)
    return [len({node_of_rank[expert // held] for expert in range(first, first + size)}) for first in firsts]


def describe(router: Router, node_sizes: Sequence[int]) -> str:
    """What the limit does, or how it would do it; "" without a limit or where nothing crosses between nodes."""
    nodes, allowed = len(node_sizes), router.groups_per_token
    if nodes == 1 or allowed == router.num_groups:
        return ""
    spans = group_nodes(router, node_sizes)
    most = min(nodes, sum(sorted(spans)[-allowed:]))
    reach = f"a token visits at most {most} of {nodes} nodes{_average(router, node_sizes)}"
    if max(spans) == 1:
        return f"routing limit follows the nodes: {reach}"
    cure = f"model.router.num_groups as a multiple of {nodes} would keep each group on one node"
    return f"routing limit does not follow the nodes, a group lies on up to {max(spans)}: {reach}; {cure}"


def _average(router: Router, node_sizes: Sequence[int]) -> str:
    if len(set(node_sizes)) > 1:
        return ""
    free = Router(router.num_experts, router.experts_per_token)
    limited, unlimited = (one.places(len(node_sizes)) for one in (router, free))
    return f", {limited:.2f} on average instead of {unlimited:.2f}"
