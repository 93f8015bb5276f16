"""Over the slow link once per node, then on inside the node.

A token's row goes to each node that has experts for it, to the rank with this rank's index there, and from that rank to
those of its node that hold the experts. On the way back partial sums are added inside the node before they cross.

    rank (n, i)  --slow link-->  rank (m, i)  --fast link-->  rank (m, j)
"""

from dstrain.comm.collectives import Peers
from dstrain.comm.lane import Lane
from dstrain.comm.mailbox import Pool, connect
from dstrain.dispatch.hop import Hop, equal_share
from dstrain.dispatch.transport import Transport
from dstrain.dispatch.wire import WireFormat


class HierarchicalDispatcher(Transport):
    """`num_experts` experts in equal contiguous shares over a grid of ranks, row by row.

    `nodes`: the ranks with this rank's index, one per node. `node`: the ranks of this node. `homebound`: the same two,
    for what comes home.
    """

    def __init__(
        self,
        num_experts: int,
        nodes: Peers,
        node: Peers,
        wire: WireFormat | None = None,
        homebound: tuple[Peers, Peers] | None = None,
        keeps_quantised: bool = False,
    ):
        nodes_home, node_home = homebound or (nodes, node)
        pool, experts = Pool(), equal_share(num_experts, nodes.size * node.size)
        per_node = experts * node.size
        across = Hop(*connect(nodes, nodes_home, pool), nodes.size, per_node)
        inside = Hop(*connect(node, node_home, pool), node.size, experts)
        super().__init__(experts, wire, [across, inside], Lane(nodes.trace), keeps_quantised)
