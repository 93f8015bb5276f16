"""Flat buffers of which every member of a group owns an equal share: sums of shares, and gathering them.

    flight = flat.reduce_scatter(x, peers, wire, "grad")      flight.wait(): this rank's share of the sum
    flight = flat.all_gather(x, peers, "param")               flight.wait(): all shares are in x
    flight = flat.all_gather_made(make, use, peers, "param", reads)       the same of what exists on the way only

They only start: conversion, exchange and sum run in a lane, one buffer after the other, and x must be left alone until
the wait. Every message goes straight to its reader, in two hops:

    reduce-scatter   inside the node, rank i gets the shares of all ranks with index i; then the sums cross the network
    all-gather       the other way round: a share crosses once per node, to the rank with the same index, and spreads

So a rank sends N - 1 shares over the network and N * (L - 1) inside the node. In a group that isn't a run of several
equal nodes, L is 1. Sums are made in FP32 in the order of ranks, then of nodes: they depend on the values and the
topology only. With a narrow wire dtype, what crosses is rounded to it, the sum of a node as well.

Shapes: N nodes, L ranks of a node, P = N * L ranks of the group, S elements of a share. Rank l of node n is member
n * L + l.
"""

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dstrain.comm.collectives import Peers
from dstrain.comm.lane import Flight, Lane, Stage
from dstrain.comm.mailbox import Exchange, Mailbox, Pool, make_mailbox
from dstrain.comm.trace import Trace, Transfer
from dstrain.mesh.topology import Link

# Buffers between departure and arrival: while one is on the wire, the next one is packed. Each takes about twice its
# size in the wire dtype.
UNDER_WAY = 2


class FlatCollectives:
    """A lane for all groups, and mailboxes for each."""

    def __init__(self, trace: Trace):
        self.trace = trace
        # Any number may wait for its turn, which takes no memory: whoever starts one must never be held up.
        self._lane = Lane(trace, depth=sys.maxsize)
        self._pool = Pool()
        self._room = threading.Semaphore(UNDER_WAY)
        self._mailboxes: dict[tuple[str, int], Mailbox] = {}

    def reduce_scatter(self, x: Tensor, peers: Peers, wire: torch.dtype, kind: str) -> Flight:
        """The sum over the group of every rank's x, FP32 and flat, its length a multiple of the group size.

        `wait` gives this rank's share of the sum, a view of x, or raises PeerError; the rest of x is scratch.
        """
        work = _Reduce(self._mailbox(peers, 0), peers, wire, self.trace.begin(kind, peers.name))
        return self._start(work, lambda: x, _as_it_is, [x])

    def all_gather(self, x: Tensor, peers: Peers, kind: str) -> Flight:
        """Every rank's share of x, flat, its length a multiple of the group size: written into x of all ranks.

        `wait` raises PeerError.
        """
        return self.all_gather_made(lambda: x, _as_it_is, peers, kind, [x])

    def all_gather_made(
        self, make: Callable[[], Tensor], use: Callable[[Tensor], Any], peers: Peers, kind: str, reads: Sequence[Tensor]
    ) -> Flight:
        """`all_gather` of what `make` gives when it is its turn; `wait` gives what `use` returns for all shares.

        Both run in the lane. `reads`: tensors of the current stream that they use, to be left alone until the wait.
        """
        work = _Gather(self._mailbox(peers, 1), peers, None, self.trace.begin(kind, peers.name))
        return self._start(work, make, use, reads)

    def _mailbox(self, peers: Peers, tag: int) -> Mailbox:
        """One for sums and one for gathering: a hop inside the node comes first in one and last in the other."""
        if (peers.name, tag) not in self._mailboxes:
            self._mailboxes[peers.name, tag] = make_mailbox(peers, tag, self._pool)
        return self._mailboxes[peers.name, tag]

    def _start(
        self, work: "_Work", make: Callable[[], Tensor], use: Callable[[Tensor], Any], reads: Sequence[Tensor]
    ) -> Flight:
        def depart(_: Any) -> None:
            self._room.acquire()
            work.hold(make())
            work.depart()

        def close(_: Any) -> None:
            work.close()
            self._room.release()

        stages: list[Stage] = [depart, lambda _: work.relay(), lambda _: use(work.arrive())]
        if self.trace.device.type == "cuda":
            # Threads must not share a communicator: buckets go one after the other.
            stages = [_in_turn(stages)]
        return self._lane.submit(stages, work.transfer, reads, close)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _in_turn(stages: Sequence[Stage]) -> Stage:
    def run(value: Any) -> Any:
        for stage in stages:
            value = stage(value)
        return value

    return run


def sent_bytes(peers: Peers, num_bytes: int) -> dict[Link, int]:
    """What this rank sends over each kind of link when a buffer of so many bytes on the wire is summed, or gathered."""
    share, index, ranks = num_bytes // peers.size, peers.index, peers.per_node
    first = index - index % ranks
    found = {Link.NODE: 0, Link.NETWORK: 0}
    hops = ((range(first, first + ranks), peers.size // ranks), (range(index % ranks, peers.size, ranks), 1))
    for members, shares in hops:
        for member in members:
            if member != index:
                found[peers.link(member)] += shares * share
    return found


class _Work(ABC):
    """A collective under way, in three steps and two hops."""

    x_NLS: Tensor
    dtype: torch.dtype

    def __init__(self, mailbox: Mailbox, peers: Peers, wire: torch.dtype | None, transfer: Transfer):
        self.mailbox, self.wire, self.transfer = mailbox, wire, transfer
        self.size, self.ranks = peers.size, peers.per_node
        self.node, self.local = divmod(peers.index, self.ranks)
        # Of this node, and of this index in every node.
        self.neighbours = [self.node * self.ranks + local for local in range(self.ranks)]
        self.counterparts = list(range(self.local, self.size, self.ranks))
        self.exchanges: list[Exchange] = []

    def hold(self, x: Tensor) -> None:
        """What is to be sent, in the wire dtype or as it is."""
        self.x_NLS = x.view(self.size // self.ranks, self.ranks, -1)
        self.dtype = self.wire or x.dtype

    @abstractmethod
    def depart(self) -> None:
        """Starts the first hop."""

    @abstractmethod
    def relay(self) -> None:
        """Waits for the first hop and starts the second."""

    @abstractmethod
    def arrive(self) -> Tensor:
        """Waits for the second hop."""

    def close(self) -> None:
        for exchange in self.exchanges:
            exchange.close()

    def swap(self, members: list[int], parts: Sequence[Tensor]) -> None:
        """Starts sending a part to each of the members, this rank among them, who send as much."""
        sizes = [0] * self.size
        for member, part in zip(members, parts, strict=True):
            sizes[member] = part.numel() * self.dtype.itemsize
        exchange = self.mailbox.open(self.transfer, sizes)
        buffers = exchange.outgoing(sizes)
        for member, part in zip(members, parts, strict=True):
            buffers[member].view(self.dtype).view(part.shape).copy_(part)
        exchange.send()
        self.exchanges.append(exchange)

    def arrived(self, members: list[int], like: Tensor) -> list[Tensor]:
        """What the members sent in the last swap."""
        parts, num_bytes = self.exchanges[-1].wait(), like.numel() * self.dtype.itemsize
        return [parts[member][:num_bytes].view(self.dtype).view(like.shape) for member in members]


class _Reduce(_Work):
    """Sums inside the node, then across; both replace this rank's own values in x."""

    def depart(self) -> None:
        if len(self.neighbours) > 1:
            self.swap(self.neighbours, self.x_NLS.unbind(1))

    def relay(self) -> None:
        own_NS = self.x_NLS[:, self.local]
        if len(self.neighbours) > 1:
            _add(self.arrived(self.neighbours, own_NS), own_NS)
        if len(self.counterparts) > 1:
            self.swap(self.counterparts, own_NS.unbind(0))

    def arrive(self) -> Tensor:
        own_S = self.x_NLS[self.node, self.local]
        if len(self.counterparts) > 1:
            _add(self.arrived(self.counterparts, own_S), own_S)
        return own_S


class _Gather(_Work):
    """Across the nodes, then inside."""

    def depart(self) -> None:
        if len(self.counterparts) > 1:
            self.swap(self.counterparts, [self.x_NLS[self.node, self.local]] * len(self.counterparts))

    def relay(self) -> None:
        own_NS = self.x_NLS[:, self.local]
        if len(self.counterparts) > 1:
            for row_S, part_S in zip(own_NS, self.arrived(self.counterparts, own_NS[0]), strict=True):
                row_S.copy_(part_S)
        if len(self.neighbours) > 1:
            self.swap(self.neighbours, [own_NS] * len(self.neighbours))

    def arrive(self) -> Tensor:
        if len(self.neighbours) > 1:
            parts = self.arrived(self.neighbours, self.x_NLS[:, self.local])
            for column_NS, part_NS in zip(self.x_NLS.unbind(1), parts, strict=True):
                column_NS.copy_(part_NS)
        return self.x_NLS.view(-1)


def _add(parts: Sequence[Tensor], out: Tensor) -> None:
    """The sum in FP32, in the order of the parts."""
    out.copy_(parts[0])
    for part in parts[1:]:
        # Widened first: torch adds mixed dtypes at a quarter of the speed.
        out.add_(part.float())
