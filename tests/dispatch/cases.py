"""Routes, inputs and transports that the tests of dispatchers share.

Shapes: T tokens, K experts per token, D width.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers
from dstrain.comm.lane import Lane
from dstrain.comm.mailbox import NcclMailbox
from dstrain.comm.trace import Trace
from dstrain.dispatch.alltoall import AllToAllDispatcher
from dstrain.dispatch.contract import Route
from dstrain.dispatch.hierarchical import HierarchicalDispatcher
from dstrain.dispatch.hop import Hop
from dstrain.dispatch.rank import RankDispatcher
from dstrain.dispatch.transport import Transport
from dstrain.dispatch.wire import WireFormat
from dstrain.mesh.topology import Topology

# A width with a last tile that is not whole.
EXPERTS, WIDTH, TOKENS = 8, 40, 6


def balanced(rank: int) -> Tensor:
    return torch.stack([(3 * torch.arange(3) + token + rank) % EXPERTS for token in range(TOKENS)])


def skewed(rank: int) -> Tensor:
    """Every token visits expert 0, with changing company."""
    return torch.stack([torch.tensor([1 + token % 7, 0]) for token in range(TOKENS)])


def random_choice(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(TOKENS + rank, EXPERTS, generator=generator).topk(3).indices


# experts_TK of a rank.
ROUTES = {
    "balanced": balanced,
    "skewed": skewed,
    "random": random_choice,
    "one expert takes all": lambda rank: torch.full((TOKENS, 1), 2),
    "one expert per token": lambda rank: torch.arange(TOKENS)[:, None] % EXPERTS,
    "every expert": lambda rank: torch.stack([torch.arange(EXPERTS).roll(token) for token in range(TOKENS)]),
    "rank without tokens": lambda rank: balanced(rank)[: 0 if rank == 1 else TOKENS],
    "no tokens at all": lambda rank: balanced(rank)[:0],
}


def route_of(experts_TK: Tensor, rank: int) -> Route:
    """Weights that sum to one."""
    generator = torch.Generator().manual_seed(100 + rank)
    weights_TK = torch.rand(experts_TK.shape, generator=generator).softmax(-1)
    return Route(experts_TK, weights_TK.requires_grad_())


def tokens(count: int, rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(200 + rank)
    return torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()


@cache
def everyone() -> Peers:
    return Peers(dist.group.WORLD, Trace(torch.device("cpu")))


@cache
def grid(nodes: int, ranks: int) -> tuple[Peers, Peers]:
    """Groups of a made-up grid: the ranks with this rank's index, one per node, and those of its node."""
    topology, trace = Topology(tuple(n for n in range(nodes) for _ in range(ranks))), everyone().trace
    columns = [[node * ranks + index for node in range(nodes)] for index in range(ranks)]
    rows = [[node * ranks + index for index in range(ranks)] for node in range(nodes)]

    def mine(name: str, lists: list[list[int]]) -> Peers:
        group, _ = dist.new_subgroups_by_enumeration(lists)
        (members,) = (members for members in lists if dist.get_rank() in members)
        links = tuple(topology.link(dist.get_rank(), member) for member in members)
        return Peers(group, trace, name, tuple(members), links)

    return mine("ep-nodes", columns), mine("ep-node", rows)


def make(name: str, wire: WireFormat | None = None, keeps_quantised: bool = False) -> Transport:
    """A transport over all ranks of the default group; `hierarchical 2x2` names its grid."""
    if name == "alltoall":
        return AllToAllDispatcher(EXPERTS, everyone(), wire, keeps_quantised=keeps_quantised)
    if name == "rank":
        return RankDispatcher(EXPERTS, everyone(), wire, keeps_quantised=keeps_quantised)
    if name == "rank, sized beforehand":
        # What carries rows on GPUs, here over gloo's all-to-all.
        ranks, box = everyone().size, NcclMailbox(everyone())
        hop = Hop(box, box, ranks, EXPERTS // ranks)
        return Transport(hop.experts, wire, [hop], Lane(everyone().trace), keeps_quantised)
    nodes, ranks = map(int, name.removeprefix("hierarchical ").split("x"))
    return HierarchicalDispatcher(EXPERTS, *grid(nodes, ranks), wire, keeps_quantised=keeps_quantised)


TRANSPORTS = {
    1: ("alltoall", "rank"),
    2: ("alltoall", "rank", "hierarchical 2x1", "hierarchical 1x2"),
    4: ("alltoall", "rank", "rank, sized beforehand", "hierarchical 2x2"),
}
