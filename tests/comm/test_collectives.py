"""The small collectives over real processes: values, bytes, and the time that they take from compute."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers, all_reduce_max, all_reduce_sum, ring_link
from dstrain.comm.flat import FlatCollectives
from dstrain.comm.trace import CommTotals, Trace
from dstrain.mesh.topology import Link
from tests.gloo.spawn import spawn


def everyone(*links: Link) -> Peers:
    return Peers(dist.group.WORLD, Trace(torch.device("cpu")), "data", links=links)


def reduced(rank: int, world: int) -> tuple[Tensor, Tensor, CommTotals]:
    peers = everyone()
    added = all_reduce_sum(torch.tensor([1.0, rank]), peers)
    return added, all_reduce_max(torch.tensor([-rank, rank]), peers), peers.trace.take()


@pytest.fixture(scope="module")
def found() -> list[tuple[Tensor, Tensor, CommTotals]]:
    return spawn(reduced, 4)


def test_sum_and_largest(found: list):
    for added, largest, _ in found:
        assert added.tolist() == [4.0, 6.0]
        assert largest.tolist() == [0, 3]


def test_the_bytes_of_a_ring_are_counted(found: list):
    for _, _, totals in found:
        assert totals.sent_bytes == {"reduce": 2 * (2 * 4) * 3 // 4 + 2 * (2 * 8) * 3 // 4}
        assert totals.link_bytes == {Link.NODE: totals.sent_bytes["reduce"]}
        assert [(t.kind, t.group, t.end_s is not None) for t in totals.transfers] == [("reduce", "data", True)] * 2


def test_a_group_of_one_adds_nothing():
    x = torch.tensor([3.0])
    assert all_reduce_sum(x, None) is x
    assert all_reduce_max(x, None) is x
    assert x.item() == 3.0


def ring(rank: int, world: int) -> Link:
    links = [Link.SELF if other == rank else Link.NETWORK if other == 2 else Link.NODE for other in range(3)]
    return ring_link(everyone(*links))


def test_a_ring_goes_to_the_next_member():
    assert spawn(ring, 3) == [Link.NODE, Link.NETWORK, Link.NODE]


def exposed(rank: int, world: int) -> tuple[float, float]:
    """Milliseconds lost when rank 0 is late, and when the wait comes long after the start."""
    peers = everyone()
    flat = FlatCollectives(peers.trace)
    dist.barrier()
    if rank == 0:
        time.sleep(0.5)
    all_reduce_sum(torch.ones(1), peers)
    late = peers.trace.take().exposed_ms
    flight = flat.reduce_scatter(torch.ones(32), peers, torch.float32, "grad")
    time.sleep(0.5)
    flight.wait()
    return late, peers.trace.take().exposed_ms


def test_only_waiting_is_exposed():
    (on_time, hidden), (kept_waiting, also_hidden) = spawn(exposed, 2)
    assert kept_waiting > 250 > on_time
    assert max(hidden, also_hidden) < 250
