"""The flat transport: a row per (token, expert) to the rank of the expert. What others must beat."""

from dstrain.comm.collectives import Peers
from dstrain.comm.lane import Lane
from dstrain.comm.mailbox import Pool, connect
from dstrain.dispatch.hop import Hop, equal_share
from dstrain.dispatch.transport import Transport
from dstrain.dispatch.wire import WireFormat


class AllToAllDispatcher(Transport):
    """`num_experts` experts in equal contiguous shares over the ranks of `peers`. What comes home takes `homebound`."""

    row_per_pair = True

    def __init__(
        self,
        num_experts: int,
        peers: Peers,
        wire: WireFormat | None = None,
        homebound: Peers | None = None,
        keeps_quantised: bool = False,
    ):
        experts = equal_share(num_experts, peers.size)
        boxes = connect(peers, homebound or peers, Pool())
        hop = Hop(*boxes, peers.size, experts, self.row_per_pair)
        super().__init__(experts, wire, [hop], Lane(peers.trace), keeps_quantised)
