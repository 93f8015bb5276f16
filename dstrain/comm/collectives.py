"""A group of ranks, and the small collectives that every rank waits for at once."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dstrain.comm.failure import names, naming
from dstrain.comm.trace import Trace
from dstrain.mesh.topology import Link


@dataclass(frozen=True)
class Peers:
    """A process group with the account that its traffic goes to."""

    group: dist.ProcessGroup
    trace: Trace
    # For messages and timelines: ep, ep-nodes, ep-node, data, ...
    name: str = "world"
    # The global rank of each member, in the order of the group; empty: all ranks, in order.
    ranks: tuple[int, ...] = ()
    # What lies between this rank and each member; empty: one node.
    links: tuple[Link, ...] = ()
    # Members on a node, where the group is a run of several equally large nodes; otherwise 1.
    per_node: int = 1

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def index(self) -> int:
        return self.group.rank()

    def rank(self, index: int) -> int:
        """The global rank of a member."""
        return self.ranks[index] if self.ranks else index

    def link(self, index: int) -> Link:
        """What lies between this rank and a member."""
        if self.links:
            return self.links[index]
        return Link.SELF if index == self.index else Link.NODE


def all_reduce_sum(x: Tensor, peers: Peers | None) -> Tensor:
    """The sum over the group, in place; without a group, x itself. Raises PeerError."""
    return Reducing(x, peers).wait()


def all_reduce_max(x: Tensor, peers: Peers | None) -> Tensor:
    """The largest of the group's values, in place; for a few scalars. Raises PeerError."""
    return Reducing(x, peers, dist.ReduceOp.MAX).wait()


@dataclass
class Reducing:
    """A sum over the group that has started: `x` must be left alone until the wait. Without a group, x itself."""

    x: Tensor
    peers: Peers | None
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM

    def __post_init__(self) -> None:
        if self.peers is None:
            return
        peers, num_bytes = self.peers, self.x.numel() * self.x.element_size()
        self._transfer = transfer = peers.trace.begin("reduce", peers.name)
        peers.trace.sent(transfer, ring_link(peers), 2 * num_bytes * (peers.size - 1) // peers.size)
        with self._naming(peers):
            self._work = dist.all_reduce(self.x, op=self.op, group=peers.group, async_op=True)
            self._work.get_future().add_done_callback(lambda _: peers.trace.end(transfer))

    def _naming(self, peers: Peers) -> AbstractContextManager[None]:
        others = [peers.rank(index) for index in range(peers.size) if index != peers.index]
        who = names(others) if len(others) == 1 else f"one of {names(others)}"
        return naming(f"{who} (group {peers.name})", others, self._transfer)

    def wait(self, kind: str | None = None) -> Tensor:
        """x, with the result in it; `kind`: as what the account has the wait. Raises PeerError."""
        if self.peers is not None:
            with self._naming(self.peers), self.peers.trace.waiting(self._transfer, kind):
                self._work.wait()
        return self.x


def ring_link(peers: Peers) -> Link:
    """Where the bytes of a library's own collective are assumed to go: round a ring, so to the next member."""
    return peers.link((peers.index + 1) % peers.size)
