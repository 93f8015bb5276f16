"""Tensors from rank to rank, first in, first out on every way.

A receive is posted before its tensor sets out, so that it leaves at once; both ends know its shape, and nothing but the
data travels. A send takes a tensor over and holds it until it has left, in a lane: nobody waits for it. Each way (two
ranks, a direction, a kind) is a queue of its own: a batch of sends and receives would end with the last of them, and
what goes down a pipeline would wait for what comes up.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers
from dstrain.comm.lane import Lane
from dstrain.comm.mailbox import naming
from dstrain.comm.trace import Trace, Transfer

# Sends are never held back: their receiver may be busy with what this rank does next.
UNBOUNDED = 1 << 20


@dataclass(frozen=True)
class Way:
    """From this rank to a member of a group, or from it to this rank. `tag` keeps the kinds of a pair apart on gloo; on
    NCCL each way has a group of its own."""

    peers: Peers
    index: int
    tag: int

    def start(self, x: Tensor, transfer: Transfer, *, outbound: bool) -> dist.Work:
        """Sends `x`, or receives into it. Raises PeerError."""
        operation, other = dist.isend if outbound else dist.irecv, self.peers.rank(self.index)
        with naming(self.peers, self.index, transfer):
            # The form that needs no other members of the group; of one operation, it is that operation.
            (work,) = dist.batch_isend_irecv([dist.P2POp(operation, x, other, self.peers.group, self.tag)])
        return work


def meet(peers: Peers, *, sends: bool) -> None:
    """The first transfer between the two members of a group of NCCL, which connects them; returns when it is done.

    Both wait for the other in it. With receives posted before anything is sent, that would be for ever. PeerError if
    the other does not come.
    """
    x, transfer = torch.zeros(1, device=peers.trace.device), Transfer("meet", peers.name, peers.trace.label, 0.0)
    Way(peers, 1 - peers.index, 0).start(x, transfer, outbound=sends).wait()
    torch.cuda.current_stream().synchronize()


class Outbox:
    """What leaves this rank, over any way."""

    def __init__(self, trace: Trace):
        self._trace, self._lane = trace, Lane(trace, UNBOUNDED)

    def send(self, way: Way, x: Tensor, kind: str) -> None:
        """Starts; nobody may write into `x` from then on. Raises PeerError if this or an earlier send has failed."""
        x = x.contiguous()
        transfer = self._trace.begin(kind, way.peers.name)
        self._trace.sent(transfer, way.peers.link(way.index), x.numel() * x.element_size())
        stages = (partial(_start, way, x, transfer), partial(_finish, way, transfer))
        flight = self._lane.submit(stages, transfer, reads=(x,))
        if flight.result.done():
            flight.result.result()

    def close(self) -> None:
        self._lane.close()


def _start(way: Way, x: Tensor, transfer: Transfer, _: None) -> tuple[dist.Work, Tensor]:
    return way.start(x, transfer, outbound=True), x


def _finish(way: Way, transfer: Transfer, sent: tuple[dist.Work, Tensor]) -> None:
    work, x = sent
    with naming(way.peers, way.index, transfer):
        work.wait()
        if x.is_cuda:
            torch.cuda.current_stream().synchronize()


@dataclass
class Inbox:
    """What comes over one way: tensors of the same shape, of which `ahead` are posted before they are asked for."""

    way: Way
    like: Tensor
    expected: int
    ahead: int
    _posted: "deque[tuple[dist.Work, Tensor]]" = field(default_factory=deque)
    _unposted: int = field(init=False)
    # On CUDA, of its own: a receive needs nothing that has been computed here.
    _stream: Any = None

    def __post_init__(self) -> None:
        self._unposted = self.expected
        if self.like.is_cuda:
            self._stream = torch.cuda.Stream(self.like.device)
        self._post(self.ahead)

    def _post(self, number: int) -> None:
        """A receive gets its account when it is waited for: until its tensor sets out, nothing is under way."""
        while self._unposted and len(self._posted) < number:
            trace = self.way.peers.trace
            transfer = Transfer("receive", self.way.peers.name, trace.label, 0.0)
            with torch.cuda.stream(self._stream):
                x = torch.empty_like(self.like, memory_format=torch.contiguous_format)
                self._posted.append((self.way.start(x, transfer, outbound=False), x))
            self._unposted -= 1

    def take(self, kind: str) -> Tensor:
        """The next one. Raises PeerError."""
        self._post(1)
        work, x = self._posted.popleft()
        self._post(self.ahead)
        way = self.way
        transfer = way.peers.trace.begin(kind, way.peers.name)
        with naming(way.peers, way.index, transfer), way.peers.trace.waiting(transfer), torch.cuda.stream(self._stream):
            work.wait()
            if self._stream is not None:
                # The host, too: what it issued meanwhile could wait for this kernel, and its sender for that.
                self._stream.synchronize()
        if self._stream is not None:
            x.record_stream(torch.cuda.current_stream())
        way.peers.trace.end(transfer)
        return x
