"""Collectives as started transfers, traced; the all-to-all carries gradients.

`start ... wait` is split in both directions: the backward pass of `wait` starts the reverse transfer and the backward
pass of `start` waits for it, so what ran between them forward (the shared expert, say) runs between them backward and
hides the way back, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.comm.trace import Trace, Transfer
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


@dataclass
class _Flight:
    """A transfer in the air. The sent tensor is kept until arrival: the transport reads it meanwhile."""

    peers: Peers
    work: dist.Work
    sent: Tensor
    transfer: Transfer

    def land(self) -> None:
        with self.peers.trace.waiting(self.transfer):
            self.work.wait()
        self.peers.trace.end(self.transfer)


def _exchange(x: Tensor, out_rows: list[int], in_rows: list[int], peers: Peers, kind: str) -> tuple[Tensor, _Flight]:
    """Starts sending runs of `out_rows` rows of x, one run per rank; the buffer fills until the flight lands."""
    x = x.contiguous()
    arrived = x.new_empty((sum(in_rows), *x.shape[1:]))
    transfer = peers.trace.begin(kind, peers.name)
    work = dist.all_to_all_single(arrived, x, in_rows, out_rows, group=peers.group, async_op=True)
    row_bytes = x[:1].numel() * x.element_size() if len(x) else 0
    for index, rows in enumerate(out_rows):
        peers.trace.sent(transfer, peers.link(index), rows * row_bytes)
    return arrived, _Flight(peers, work, x, transfer)


@dataclass
class AllToAll:
    """An exchange of rows with autograd. `wait` gives the arrived rows, ordered by source rank.

    The graph runs through an empty `token` from start to wait; rows travel beside it, since there is no tensor with the
    shape of either end until they have arrived.
    """

    peers: Peers
    kind: str
    out_rows: list[int]
    in_rows: list[int]
    token: Tensor | None = None
    rows: Tensor | None = None
    flight: _Flight | None = None

    def launch(self, x: Tensor) -> "AllToAll":
        self.token = _Start.apply(x, self)
        return self

    def wait(self) -> Tensor:
        if self.token is None:
            raise RuntimeError(f"the {self.kind} transfer was waited for twice")
        token, self.token = self.token, None
        return _Wait.apply(token, self)

    def depart(self, x: Tensor, out_rows: list[int], in_rows: list[int]) -> None:
        self.rows, self.flight = _exchange(x, out_rows, in_rows, self.peers, self.kind)

    def land(self) -> Tensor:
        if self.flight is None or self.rows is None:
            raise RuntimeError(f"the {self.kind} transfer was never started")
        self.flight.land()
        rows, self.rows, self.flight = self.rows, None, None
        return rows


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: AllToAll) -> Tensor:
        ctx.transfer = transfer
        transfer.depart(x, transfer.out_rows, transfer.in_rows)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token_grad: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.land(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: AllToAll) -> Tensor:
        ctx.transfer = transfer
        return transfer.land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.depart(grad, transfer.in_rows, transfer.out_rows)
        return grad.new_empty(0), None


def all_to_all(x: Tensor, out_rows: list[int], in_rows: list[int], peers: Peers, kind: str) -> AllToAll:
    """Starts sending the first out_rows[0] rows of x to rank 0 of the group, the next out_rows[1] to rank 1, ...

    in_rows[r] rows come back from rank r. x is [rows, ...]; differentiable.
    """
    return AllToAll(peers, kind, out_rows, in_rows).launch(x)


def all_to_all_equal(x: Tensor, peers: Peers, kind: str) -> Tensor:
    """Blocking exchange of equal shares of dim 0, no gradient."""
    share = len(x) // peers.size
    arrived, flight = _exchange(x, [share] * peers.size, [share] * peers.size, peers, kind)
    flight.land()
    return arrived


def all_reduce_sum(x: Tensor, peers: Peers | None) -> Tensor:
    """The sum over the group, in place; without a group, x itself."""
    if peers is not None:
        _all_reduce(x, peers, dist.ReduceOp.SUM)
    return x


def all_reduce_max(x: Tensor, peers: Peers | None) -> Tensor:
    """The largest of the group's values, in place; for a few scalars."""
    if peers is not None:
        _all_reduce(x, peers, dist.ReduceOp.MAX)
    return x


def _all_reduce(x: Tensor, peers: Peers, op: dist.ReduceOp.RedOpType) -> None:
    transfer = peers.trace.begin("reduce", peers.name)
    with peers.trace.waiting(transfer):
        dist.all_reduce(x, op=op, group=peers.group)
    peers.trace.end(transfer)
    peers.trace.sent(transfer, ring_link(peers), 2 * x.numel() * x.element_size() * (peers.size - 1) // peers.size)


def ring_link(peers: Peers) -> Link:
    """Where the bytes of a ring go, which gloo's and, for few ranks, NCCL's collectives are assumed to be: to the next
    member."""
    return peers.link((peers.index + 1) % peers.size)


@dataclass
class ReduceScatter:
    """The sum over the group of each rank's share, added in FP32 in the order of the ranks.

    An all-to-all and a local sum: the bytes of a ring reduce-scatter, a fixed order of addition, and a narrow wire
    dtype without narrow additions (gloo's own reduce-scatter sends as much as an all-reduce).
    """

    peers: Peers
    arriving: Tensor
    flight: _Flight

    @staticmethod
    def start(x: Tensor, peers: Peers, wire: torch.dtype, kind: str) -> "ReduceScatter":
        """x is flat and its length a multiple of the group size."""
        share = x.numel() // peers.size
        rows = [share] * peers.size
        return ReduceScatter(peers, *_exchange(x.to(wire), rows, rows, peers, kind))

    def wait(self) -> Tensor:
        """This rank's share of the sum, FP32."""
        self.flight.land()
        return self.arriving.view(self.peers.size, -1).sum(0, dtype=torch.float32)


@dataclass
class AllGather:
    """Every rank's share of a flat buffer, written into it in place."""

    flight: _Flight

    @staticmethod
    def start(flat: Tensor, peers: Peers, kind: str) -> "AllGather":
        share = flat.view(peers.size, -1)[peers.index].clone()
        transfer = peers.trace.begin(kind, peers.name)
        work = dist.all_gather_single(flat, share, group=peers.group, async_op=True)
        peers.trace.sent(transfer, ring_link(peers), share.numel() * share.element_size() * (peers.size - 1))
        return AllGather(_Flight(peers, work, share, transfer))

    def wait(self) -> None:
        self.flight.land()
