"""Messages that carry their size, over real gloo processes: contents, bytes, bounded buffers, and lost peers."""

import os
import random
import re
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers
from dstrain.comm.lane import DEPTH, Lane
from dstrain.comm.mailbox import ALIGN, Exchange, Forecast, GlooMailbox, Pool, align
from dstrain.comm.trace import Label, Trace, Transfer
from dstrain.errors import PeerError
from dstrain.mesh.topology import Link
from tests.gloo.spawn import spawn

SMALL = 256


def everyone(group: dist.ProcessGroup | None = None) -> Peers:
    world, rank = dist.get_world_size(), dist.get_rank()
    links = tuple(Link.SELF if r == rank else Link.NODE if r // 2 == rank // 2 else Link.NETWORK for r in range(world))
    return Peers(group or dist.group.WORLD, Trace(torch.device("cpu")), "ep", tuple(range(world)), links)


def begin(peers: Peers) -> Transfer:
    return peers.trace.begin("dispatch", peers.name, Label(block=3, micro_batch=5, direction="forward"))


def size_of(source: int, target: int, number: int) -> int:
    """Mostly small; some messages are empty, and now and then one exceeds every forecast."""
    kind = random.Random(f"{source} {target} {number}").random()
    return 0 if kind < 0.2 else int(40 * SMALL * kind) if kind > 0.9 else int(2 * SMALL * kind)


def content(source: int, target: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + 10 * source + target)
    return torch.randint(256, (size_of(source, target, number),), dtype=torch.uint8, generator=generator)


def depart(box: GlooMailbox, transfer: Transfer, number: int, sized: bool) -> Exchange:
    rank, world = box.peers.index, range(box.peers.size)
    exchange = box.open(transfer, [size_of(source, rank, number) for source in world] if sized else None)
    messages = [content(rank, target, number) for target in world]
    for part, message in zip(exchange.outgoing([len(m) for m in messages]), messages, strict=True):
        part.copy_(message)
    exchange.send()
    return exchange


def arrived(exchange: Exchange, rank: int, number: int) -> bool:
    parts = exchange.wait()
    return all(torch.equal(part, content(source, rank, number)) for source, part in enumerate(parts))


def stress(rank: int, world: int, rounds: int) -> tuple[bool, int]:
    """Four lanes over one group, all at once, sizes known and unknown; whether all is right, and the idle bytes."""
    peers, pool = everyone(), Pool(most_idle_bytes=1 << 20)
    flights, lanes = [], [Lane(peers.trace) for _ in range(4)]
    boxes = [GlooMailbox(peers, tag, pool, first_bytes=SMALL) for tag in range(4)]

    def stages(box: GlooMailbox, transfer: Transfer, number: int, sized: bool):
        exchange: list[Exchange] = []
        return (
            [
                lambda _: exchange.append(depart(box, transfer, number, sized)),
                lambda _: arrived(exchange[0], rank, number),
            ],
            lambda _: exchange[0].close(),
        )

    def fly(lane: Lane, box: GlooMailbox, sized: bool) -> None:
        for number in range(rounds):
            transfer = begin(peers)
            work, cleanup = stages(box, transfer, number, sized)
            flights.append(lane.submit(work, transfer, cleanup=cleanup))

    threads = [
        threading.Thread(target=fly, args=(lane, box, n % 2 == 0))
        for n, (lane, box) in enumerate(zip(lanes, boxes, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(flights) == 4 * rounds
    return all(flight.wait() for flight in flights), pool.idle_bytes


def test_several_threads_share_a_group():
    for all_right, idle_bytes in spawn(stress, 3, 100):
        assert all_right
        assert 0 < idle_bytes <= 1 << 20


def exact_traffic(rank: int, world: int) -> dict[bool, tuple[dict[Link, int], int]]:
    """Bytes sent by link, and number of messages to others, with known and unknown sizes."""
    found = {}
    for sized in (False, True):
        peers = everyone()
        box, transfer = GlooMailbox(peers, 0, Pool(), first_bytes=SMALL), begin(peers)
        exchange = depart(box, transfer, 7, sized)
        assert arrived(exchange, rank, 7)
        exchange.close()
        found[sized] = transfer.sent_bytes, len(exchange.sends)
    return found


def test_bytes_by_link_headers_included():
    for rank, found in enumerate(spawn(exact_traffic, 4)):
        for sized, (sent_bytes, messages) in found.items():
            expected = dict.fromkeys((Link.NODE, Link.NETWORK), 0)
            sizes = [size_of(rank, other, 7) + (0 if sized else ALIGN) for other in range(4)]
            for other in set(range(4)) - {rank}:
                expected[Link.NODE if other // 2 == rank // 2 else Link.NETWORK] += sizes[other]
                messages -= 0 if sizes[other] == 0 else 1 + (not sized and sizes[other] > SMALL)
            assert {link: n for link, n in expected.items() if n} == sent_bytes
            assert messages == 0


def growing(rank: int, world: int) -> tuple[list[int], int, int]:
    """Messages of 10 KB where 256 bytes are posted, then one of 8 MB: the pieces each takes, and the pool before and
    after the last one."""
    pool, pieces = Pool(most_idle_bytes=1 << 18), []
    peers = everyone()
    box = GlooMailbox(peers, 0, pool, first_bytes=SMALL)
    sizes = [10_000] * (DEPTH + 3) + [1 << 23]
    idle = []
    for size in sizes:
        exchange = box.open(begin(peers))
        for part in exchange.outgoing([size] * world):
            part.fill_(rank)
        exchange.send()
        assert all((part == source).all() and len(part) == size for source, part in enumerate(exchange.wait()))
        exchange.close()
        pieces.append(len(exchange.sends))
        idle.append(pool.idle_bytes)
    return pieces, idle[-2], idle[-1]


def test_receives_grow_with_the_messages_and_buffers_stay_bounded():
    for pieces, usual, after_a_large_one in spawn(growing, 2):
        # Two until both ends know that such messages have come, one from then on, two for the exception.
        assert pieces == [2] * DEPTH + [1] * 3 + [2]
        assert 0 < usual <= 1 << 18
        assert 0 < after_a_large_one <= 1 << 18


def test_a_forecast_depends_on_messages_that_are_long_past():
    sender, receiver = Forecast(100, 10_000), Forecast(100, 10_000)
    sizes = [random.Random(n).randrange(20_000 if n % 50 == 40 else 800) for n in range(200)]
    posted = [receiver.post() for _ in range(DEPTH)]
    for n, size in enumerate(sizes):
        assert sender.post() == posted[n]
        sender.note(size)
        receiver.note(size)
        posted.append(receiver.post())
    assert min(posted) == 100
    assert max(posted) == 10_000
    assert posted[DEPTH + 3] == max(100, align(max(sizes[:4]) * 5 // 4))


def test_buffers_are_reused():
    pool = Pool(most_idle_bytes=10_000)
    first = pool.take(5000)
    assert len(first) == 8192
    pool.give(first)
    assert pool.idle_bytes == 8192
    pool.give(torch.empty(4096, dtype=torch.uint8))
    assert pool.idle_bytes == 8192
    assert pool.take(4097) is first
    assert pool.idle_bytes == 0


# A busy machine adds less than two time-outs, so that three in a row are too long.
TIMEOUT_S, BUSY_S = 5, 9


def failing(rank: int, world: int, mode: str) -> tuple[str, str, float] | None:
    """One exchange works; before the next one rank 1 dies, or does nothing."""
    peers = everyone(dist.new_group(timeout=timedelta(seconds=TIMEOUT_S)))
    box = GlooMailbox(peers, 0, Pool())
    exchange = depart(box, begin(peers), 0, False)
    assert arrived(exchange, rank, 0)
    exchange.close()
    if rank == 1:
        time.sleep(0.5)
        if mode != "dies":
            time.sleep(60)
        os._exit(1)
    began = time.perf_counter()
    try:
        depart(box, begin(peers), 1, False).wait()
    except PeerError as error:
        took_s = time.perf_counter() - began
        dist.destroy_process_group()
        return str(error), str(type(error.__cause__)), took_s
    return None


@pytest.mark.parametrize("mode", ["dies", "stalls"])
def test_a_lost_peer_is_named(mode: str):
    found = spawn(failing, 3, mode, victims=[1])
    for outcome in (found[0], found[2]):
        assert outcome is not None
        message, cause, took_s = outcome
        assert message.startswith("rank 1 (group ep)")
        assert "in dispatch, layer 3, micro-batch 5, forward" in message
        assert ("is gone" in message) == (mode == "dies")
        assert ("did not answer" in message) == (mode == "stalls")
        assert "RuntimeError" in cause
        waited_s = float(re.findall(r" after ([\d.]+) s of waiting", message)[0])
        assert (waited_s >= TIMEOUT_S) == (mode == "stalls")
        assert waited_s <= took_s + 0.05
        # A connection that breaks is noticed at once, silence after one time-out.
        assert took_s < (TIMEOUT_S if mode == "stalls" else 0) + BUSY_S
