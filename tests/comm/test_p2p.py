"""Tensors from rank to rank over real gloo processes: order, bytes, memory, and lost peers."""

import os
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dstrain.comm.collectives import Peers
from dstrain.comm.p2p import Inbox, Outbox, Way
from dstrain.comm.trace import Label, Trace
from dstrain.errors import PeerError
from dstrain.mesh.topology import Link
from tests.gloo.spawn import spawn

SHAPE, COUNT = (3, 5), 6


def everyone(group: dist.ProcessGroup | None = None) -> Peers:
    rank = dist.get_rank()
    links = tuple(Link.SELF if other == rank else Link.NETWORK for other in range(dist.get_world_size()))
    return Peers(group or dist.group.WORLD, Trace(torch.device("cpu")), "pp", tuple(range(len(links))), links)


def numbered(number: int) -> Tensor:
    return torch.full(SHAPE, float(number))


def inbox(way: Way, count: int = COUNT, ahead: int = 2) -> Inbox:
    return Inbox(way, torch.empty(1).expand(SHAPE), count, ahead)


def there_and_back(rank: int, world: int) -> tuple[list[float], list[float], dict[str, int], dict[str, float]]:
    """Two ways from rank 0 to rank 1; the second one is read first. Then one way back."""
    peers = everyone()
    down, up = Way(peers, 1 - rank, 0), Way(peers, 1 - rank, 1)
    first: list[float] = []
    second: list[float] = []
    if rank == 0:
        box = Outbox(peers.trace)
        for number in range(COUNT):
            box.send(down, numbered(number), "pipe")
            # Not contiguous: its elements travel in the order of the tensor.
            box.send(up, (torch.arange(15.0).view(5, 3) + 100 * number).t(), "pipe")
        back = inbox(down)
        first = [back.take("pipe")[0, 0].item() for _ in range(COUNT)]
    else:
        ways = inbox(down), inbox(up)
        second = [x for _ in range(COUNT) for x in ways[1].take("pipe")[:, 1].tolist()]
        first = [ways[0].take("pipe")[0, 0].item() for _ in range(COUNT)]
        box = Outbox(peers.trace)
        for number in reversed(range(COUNT)):
            box.send(down, numbered(number), "pipe")
    dist.barrier()
    box.close()
    comm = peers.trace.take()
    return first, second, comm.sent_bytes, comm.waited_ms


def test_each_way_is_a_queue_of_its_own():
    (back, _, sent, waited), (first, second, sent_back, _) = spawn(there_and_back, 2)
    assert first == list(range(COUNT))
    assert second == [x for n in range(COUNT) for x in (100 * n + 3.0, 100 * n + 4.0, 100 * n + 5.0)]
    assert back == list(reversed(range(COUNT)))
    assert (sent, sent_back) == ({"pipe": 2 * COUNT * 60}, {"pipe": COUNT * 60})
    assert waited["pipe"] > 0


def to_a_busy_rank(rank: int, world: int) -> tuple[list[bool], list[bool]]:
    """Which of the tensors are there before and after they were received, which nobody does before all are sent."""
    peers = everyone()
    way = Way(peers, 1 - rank, 0)
    if rank == 1:
        box = inbox(way, ahead=1)
        dist.recv(torch.zeros(1), src=0, tag=9)
        assert [box.take("pipe")[0, 0].item() for _ in range(COUNT)] == list(range(COUNT))
        dist.barrier()
        return [], []
    out, kept = Outbox(peers.trace), []
    for number in range(COUNT):
        x = numbered(number)
        kept.append(StorageWeakRef(x.untyped_storage()))
        out.send(way, x, "pipe")
        del x
    before = [not ref.expired() for ref in kept]
    dist.send(torch.zeros(1), dst=1, tag=9)
    dist.barrier()
    out.close()
    deadline = time.monotonic() + 20
    while not all(ref.expired() for ref in kept) and time.monotonic() < deadline:
        time.sleep(0.01)
    return before, [not ref.expired() for ref in kept]


def test_a_send_waits_for_nobody_and_keeps_its_tensor_until_it_has_left():
    (before, after), _ = spawn(to_a_busy_rank, 2)
    # One receive was posted beforehand.
    assert before[1:] == [True] * (COUNT - 1)
    assert after == [False] * COUNT


def buffers_posted(rank: int, world: int, ahead: int) -> list[int]:
    """Receives under way before the first one is asked for and after each."""
    peers = everyone()
    way = Way(peers, 1 - rank, 0)
    if rank == 0:
        out = Outbox(peers.trace)
        for number in range(3):
            out.send(way, numbered(number), "pipe")
        dist.barrier()
        out.close()
        return []
    box = inbox(way, count=3, ahead=ahead)
    found = [len(box._posted)]
    for _ in range(3):
        box.take("pipe")
        found.append(len(box._posted))
    dist.barrier()
    return found


@pytest.mark.parametrize(("ahead", "posted"), [(2, [2, 2, 1, 0]), (0, [0, 0, 0, 0])])
def test_no_more_is_posted_than_comes(ahead: int, posted: list[int]):
    assert spawn(buffers_posted, 2, ahead)[1] == posted


def send_until_it_fails(way: Way) -> None:
    """A later send says what became of an earlier one."""
    box, deadline = Outbox(way.peers.trace), time.monotonic() + 20
    while time.monotonic() < deadline:
        box.send(way, torch.zeros(1 << 20), "pipe")
        time.sleep(0.1)


def lost(rank: int, world: int, reads: bool) -> str:
    peers = everyone(dist.new_group(timeout=timedelta(seconds=5)))
    peers.trace.label = Label(stage=1, micro_batch=2, direction="forward", step=7)
    way = Way(peers, 1 - rank, 0)
    # Not before the other one is connected.
    first = torch.zeros(1)
    if rank == 1:
        dist.recv(first, group_src=0, group=peers.group, tag=9)
        os._exit(1)
    dist.send(first, group_dst=1, group=peers.group, tag=9)
    with pytest.raises(PeerError) as raised:
        inbox(way).take("pipe") if reads else send_until_it_fails(way)
    # The barrier at the end would wait for the other one.
    dist.destroy_process_group()
    return str(raised.value)


@pytest.mark.parametrize("reads", [True, False], ids=["receive", "send"])
def test_a_lost_peer_is_named(reads: bool):
    message = spawn(lost, 2, reads, victims=[1])[0]
    kind = "(pipe|receive)" if reads else "pipe"
    where = "stage 1, micro-batch 2, forward, step 7"
    assert re.match(rf"rank 1 \(group pp\) (is gone|did not answer).* in {kind}, {where}", message), message
