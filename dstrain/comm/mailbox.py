"""Messages between the ranks of a group that carry their own size, as uint8 buffers.

    exchange = mailbox.open(transfer)            receives are posted, before anything is packed
    parts = exchange.outgoing(sizes)             one buffer per rank of the group, to be filled
    exchange.send()
    parts = exchange.wait()                      what arrived, one buffer per rank; valid until
    exchange.close()                             everything has left; buffers go back to the pool

On gloo a message goes point to point: one that finds its receive posted leaves at once, while gloo's own all-to-all
posts sends first and turns the wire half-duplex as soon as ranks are not in step. A receive may be larger than its
message, so the receive is posted before the size is known: with a size that both ends derive from messages that are
long past (`Forecast`). What does not fit follows as a second message of exactly known size: buffers stay bounded, and
nothing is dropped. Where the receiver knows the sizes (`open(transfer, sizes)`), there is one message, without header.

On NCCL the sizes go ahead in a small exchange while the messages are packed, then one all-to-all follows.

What a rank sends to itself does not travel: `wait` returns the very buffer that was filled. An empty message of known
size is not sent.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm import failure
from dstrain.comm.collectives import Peers
from dstrain.comm.lane import DEPTH
from dstrain.comm.trace import Transfer

# Length of the message, int64.
HEADER_BYTES = 8
# Parts of a buffer begin at multiples of this, so that they can be viewed as wider dtypes.
ALIGN = 16
FIRST_BYTES = 1 << 20
MOST_POSTED_BYTES = 1 << 26
MOST_IDLE_BYTES = 1 << 28


def align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN) * ALIGN


class Exchange(Protocol):
    """One message from every rank to every other."""

    def outgoing(self, sizes: Sequence[int]) -> list[Tensor]:
        """A buffer of each size, to be filled before `send`."""
        ...

    def send(self) -> None: ...

    def wait(self) -> list[Tensor]:
        """What arrived, by rank; PeerError if a peer does not answer."""
        ...

    def close(self) -> None:
        """Waits until the own messages have left, and gives the buffers back."""
        ...


class Mailbox(Protocol):
    """One stream of exchanges; all ranks open the same ones in the same order, at most `lane.DEPTH` at once."""

    def open(self, transfer: Transfer, sizes: Sequence[int] | None = None) -> Exchange:
        """`sizes`: bytes that each rank will send here, if they are known."""
        ...


class Pool:
    """Buffers for reuse, rounded up to powers of two; beyond `most_idle_bytes` they are freed instead."""

    def __init__(self, most_idle_bytes: int = MOST_IDLE_BYTES):
        self.most_idle_bytes = most_idle_bytes
        self.idle_bytes = 0
        self._idle: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:
        """At least `num_bytes` of uint8."""
        size = 1 << max(12, (num_bytes - 1).bit_length())
        with self._lock:
            if idle := self._idle.get(size):
                self.idle_bytes -= size
                return idle.pop()
        return torch.empty(size, dtype=torch.uint8)

    def give(self, buffer: Tensor) -> None:
        with self._lock:
            if self.idle_bytes + len(buffer) <= self.most_idle_bytes:
                self.idle_bytes += len(buffer)
                self._idle.setdefault(len(buffer), []).append(buffer)


class Forecast:
    """The size of the receive that awaits message n of a link: a quarter more than the largest of some older messages.

    At most DEPTH exchanges are under way, so when n is posted, both ends know message n - DEPTH and all before it.
    """

    WINDOW = 32

    def __init__(self, first_bytes: int = FIRST_BYTES, most_bytes: int = MOST_POSTED_BYTES):
        self.first_bytes, self.most_bytes = first_bytes, most_bytes
        self.posted = 0
        self._sizes: dict[int, int] = {}

    def note(self, size: int) -> None:
        """Messages come in order; what is older than the window is forgotten."""
        number = max(self._sizes, default=-1) + 1
        self._sizes[number] = size
        self._sizes.pop(number - self.WINDOW - DEPTH, None)

    def post(self) -> int:
        """The receive for the next message in bytes, header included."""
        last = self.posted - DEPTH
        self.posted += 1
        if last < 0:
            return self.first_bytes
        largest = max(self._sizes[number] for number in range(max(0, last - self.WINDOW + 1), last + 1))
        return min(self.most_bytes, max(self.first_bytes, align(largest + largest // 4)))


def naming(peers: Peers, index: int, transfer: Transfer) -> AbstractContextManager[None]:
    """Turns an error of the transport into one that says who was waited for, and in what."""
    rank = peers.rank(index)
    return failure.naming(f"rank {rank} (group {peers.name})", [rank], transfer)


class GlooMailbox:
    """Point to point over a gloo group. `tag` keeps mailboxes of one group apart: gloo's tags 2 tag and 2 tag + 1."""

    def __init__(self, peers: Peers, tag: int, pool: Pool, first_bytes: int = FIRST_BYTES):
        self.peers, self.pool = peers, pool
        self.tag, self.rest_tag = 2 * tag, 2 * tag + 1
        self.others = [index for index in range(peers.size) if index != peers.index]
        self.sent = {index: Forecast(first_bytes) for index in self.others}
        self.received = {index: Forecast(first_bytes) for index in self.others}

    def open(self, transfer: Transfer, sizes: Sequence[int] | None = None) -> Exchange:
        return _Unsized(self, transfer) if sizes is None else _Sized(self, transfer, sizes)


class _GlooExchange:
    """What exchanges of known and of unknown sizes share."""

    header_bytes = 0

    def __init__(self, box: GlooMailbox, transfer: Transfer):
        self.box, self.peers, self.transfer = box, box.peers, transfer
        self.taken: list[Tensor] = []
        self.incoming: dict[int, Tensor] = {}
        self.receives: dict[int, dist.Work] = {}
        self.sends: list[tuple[int, dist.Work]] = []
        self.messages: list[Tensor] = []

    def take(self, sizes: Sequence[int]) -> list[Tensor]:
        """Parts of one pooled buffer."""
        buffer = self.box.pool.take(sum(align(size) for size in sizes))
        self.taken.append(buffer)
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + align(size))
        return [buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]

    def receive(self, index: int, buffer: Tensor, tag: int) -> dist.Work:
        with naming(self.peers, index, self.transfer):
            return _work(dist.irecv(buffer, group_src=index, group=self.peers.group, tag=tag))

    def isend(self, index: int, message: Tensor, tag: int) -> None:
        with naming(self.peers, index, self.transfer):
            work = _work(dist.isend(message, group_dst=index, group=self.peers.group, tag=tag))
        self.sends.append((index, work))
        self.peers.trace.sent(self.transfer, self.peers.link(index), len(message))

    def outgoing(self, sizes: Sequence[int]) -> list[Tensor]:
        self.messages = self.take([size + self.header_bytes for size in sizes])
        return [message[self.header_bytes :] for message in self.messages]

    def land(self, index: int) -> Tensor:
        with naming(self.peers, index, self.transfer):
            self.receives[index].wait()
        return self.incoming[index]

    def wait(self) -> list[Tensor]:
        own = self.messages[self.peers.index][self.header_bytes :]
        return [own if index == self.peers.index else self.land(index) for index in range(self.peers.size)]

    def close(self) -> None:
        for index, work in self.sends:
            with naming(self.peers, index, self.transfer):
                work.wait()
        for buffer in self.taken:
            self.box.pool.give(buffer)


class _Sized(_GlooExchange):
    """Everybody knows what comes: exact receives, no header, nothing where there is nothing."""

    def __init__(self, box: GlooMailbox, transfer: Transfer, sizes: Sequence[int]):
        super().__init__(box, transfer)
        parts = self.take([0 if index == self.peers.index else size for index, size in enumerate(sizes)])
        for index in box.others:
            self.incoming[index] = parts[index]
            if sizes[index]:
                self.receives[index] = self.receive(index, parts[index], box.tag)

    def send(self) -> None:
        for index in self.box.others:
            if len(self.messages[index]):
                self.isend(index, self.messages[index], self.box.tag)

    def land(self, index: int) -> Tensor:
        return super().land(index) if index in self.receives else self.incoming[index]


class _Unsized(_GlooExchange):
    """Receives by forecast; a message says how long it is, and its rest follows."""

    # Keeps the parts behind it aligned, too.
    header_bytes = ALIGN

    def __init__(self, box: GlooMailbox, transfer: Transfer):
        super().__init__(box, transfer)
        for index in box.others:
            (buffer,) = self.take([box.received[index].post()])
            self.incoming[index] = buffer
            self.receives[index] = self.receive(index, buffer, box.tag)

    def send(self) -> None:
        for index in self.box.others:
            message, forecast = self.messages[index], self.box.sent[index]
            message[:HEADER_BYTES].view(torch.int64).fill_(len(message))
            posted = forecast.post()
            forecast.note(len(message))
            self.isend(index, message[:posted], self.box.tag)
            if len(message) > posted:
                self.isend(index, message[posted:], self.box.rest_tag)

    def land(self, index: int) -> Tensor:
        buffer = super().land(index)
        size = int(buffer[:HEADER_BYTES].view(torch.int64).item())
        self.box.received[index].note(size)
        if size > len(buffer):
            first = buffer
            (buffer,) = self.take([size])
            buffer[: len(first)] = first
            rest = self.receive(index, buffer[len(first) :], self.box.rest_tag)
            with naming(self.peers, index, self.transfer):
                rest.wait()
        return buffer[self.header_bytes : size]


def _work(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise RuntimeError("this rank is not in the group")
    return work


def make_mailbox(peers: Peers, tag: int, pool: Pool) -> Mailbox:
    """For the device of the group. Mailboxes of one group have different tags: dispatch/ takes 0 and 1 of its groups,
    comm/flat.py 0 and 1, engine/placement.py 2 of the data group. On NCCL `tag` and `pool` mean nothing."""
    return NcclMailbox(peers) if peers.trace.device.type == "cuda" else GlooMailbox(peers, tag, pool)


def connect(peers: Peers, homebound: Peers, pool: Pool) -> tuple[Mailbox, Mailbox]:
    """A mailbox for each direction; with NCCL the two groups must be different communicators."""
    return make_mailbox(peers, 0, pool), make_mailbox(homebound, 1, pool)


class NcclMailbox:
    """All-to-all over a group of its own: two threads must not use one communicator at a time."""

    def __init__(self, peers: Peers):
        self.peers, device = peers, peers.trace.device
        self.others = [peers.rank(index) for index in range(peers.size) if index != peers.index]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def open(self, transfer: Transfer, sizes: Sequence[int] | None = None) -> Exchange:
        return _NcclExchange(self, transfer, sizes)

    def finish(self, work: dist.Work, transfer: Transfer) -> None:
        """Blocks this thread, not the stream that it issues into: there, the next exchange can be packed meanwhile."""
        with self._waiting(work, transfer):
            if self.stream is not None:
                self.stream.synchronize()

    def numbers(self, work: dist.Work, arrived: Tensor, transfer: Transfer) -> list[int]:
        """What has arrived, on the host; blocks as `finish` does."""
        with self._waiting(work, transfer):
            return arrived.tolist()

    @contextmanager
    def _waiting(self, work: dist.Work, transfer: Transfer) -> Iterator[None]:
        name = f"a rank of group {self.peers.name}"
        with failure.naming(name, self.others, transfer), torch.cuda.stream(self.stream):
            work.wait()
            yield


class _NcclExchange:
    def __init__(self, box: NcclMailbox, transfer: Transfer, sizes: Sequence[int] | None):
        self.box, self.peers, self.transfer = box, box.peers, transfer
        self.in_sizes = None if sizes is None else [align(size) for size in sizes]
        self.out_sizes: list[int] = []

    def outgoing(self, sizes: Sequence[int]) -> list[Tensor]:
        """The sizes travel while the messages are packed."""
        device, self.out_sizes = self.peers.trace.device, [align(size) for size in sizes]
        if self.in_sizes is None:
            # From pinned memory: the host need not wait until they are there.
            counts = torch.tensor(self.out_sizes, pin_memory=device.type == "cuda").to(device, non_blocking=True)
            self.counts = torch.empty_like(counts)
            self.counting = dist.all_to_all_single(self.counts, counts, group=self.peers.group, async_op=True)
        self.message = torch.empty(sum(self.out_sizes), dtype=torch.uint8, device=device)
        return [part[:size] for part, size in zip(self.message.split(self.out_sizes), sizes, strict=True)]

    def send(self) -> None:
        if self.in_sizes is None:
            self.in_sizes = self.box.numbers(self.counting, self.counts, self.transfer)
        self.incoming = self.message.new_empty(sum(self.in_sizes))
        self.work = dist.all_to_all_single(
            self.incoming, self.message, self.in_sizes, self.out_sizes, group=self.peers.group, async_op=True
        )
        for index, size in enumerate(self.out_sizes):
            self.peers.trace.sent(self.transfer, self.peers.link(index), size)

    def wait(self) -> list[Tensor]:
        self.box.finish(self.work, self.transfer)
        return list(self.incoming.split(self.in_sizes or []))

    def close(self) -> None:
        """NCCL is done with the buffers once the exchange has been waited for."""
