"""Collectives over real processes: their sums, their gradients, their bytes, and what they hide."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import (
    AllGather,
    Peers,
    ReduceScatter,
    all_reduce_max,
    all_reduce_sum,
    all_to_all,
    all_to_all_equal,
)
from dstrain.comm.trace import Trace
from tests.gloo.spawn import spawn

WIDTH = 5
# ROWS[source][target]: uneven, with a rank that sends nothing and one that gets nothing from anybody else.
ROWS = [[2, 0, 3], [0, 0, 0], [4, 0, 1]]


def everyone() -> Peers:
    return Peers(dist.group.WORLD, Trace(torch.device("cpu")))


def sent_by(rank: int, rows: int) -> Tensor:
    """Distinct whole numbers, so that sums are exact."""
    return 1000.0 * rank + torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH)


def exchange(rank: int, world: int, table: list[list[int]]) -> tuple[Tensor, Tensor]:
    """What arrives, and the gradient of what was sent when rank r multiplies what it got by r + 1."""
    x = sent_by(rank, sum(table[rank])).requires_grad_()
    arrived = all_to_all(x, table[rank], [row[rank] for row in table], everyone(), "dispatch").wait()
    (arrived * (rank + 1)).sum().backward()
    assert x.grad is not None
    return arrived.detach(), x.grad


@pytest.mark.parametrize("table", [ROWS, [[0] * 3] * 3, [[1, 2, 3]] * 3], ids=["uneven", "nothing", "equal"])
def test_all_to_all(table: list[list[int]]):
    found = spawn(exchange, 3, table)
    shares = [sent_by(rank, sum(rows)).split(rows) for rank, rows in enumerate(table)]
    for rank, (arrived, grad) in enumerate(found):
        assert torch.equal(arrived, torch.cat([share[rank] for share in shares]))
        expected = torch.cat([torch.full((rows, WIDTH), target + 1.0) for target, rows in enumerate(table[rank])])
        assert torch.equal(grad, expected)


class Note(torch.autograd.Function):
    """The identity; writes down when it runs backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str]) -> Tensor:
        ctx.log = log
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.log.append("shadow")
        return grad, None


def backward_order(rank: int, world: int) -> list[str]:
    log: list[str] = []
    x = torch.ones(2, WIDTH, requires_grad=True)
    transfer = all_to_all(x * 1.0, [1, 1], [1, 1], everyone(), "dispatch")
    shadow = Note.apply(x, log)
    arrived = transfer.wait()
    # From here on only the backward pass uses the transfer.
    depart, land = transfer.depart, transfer.land
    transfer.depart = lambda *args: (log.append("start"), depart(*args))[1]
    transfer.land = lambda: (log.append("wait"), land())[1]
    (arrived.sum() + shadow.sum()).backward()
    return log


def test_what_hides_the_transfer_forward_hides_it_backward():
    assert spawn(backward_order, 2) == [["start", "shadow", "wait"]] * 2


def wait_twice(rank: int, world: int) -> str:
    transfer = all_to_all(torch.ones(2, 1), [1, 1], [1, 1], everyone(), "combine")
    transfer.wait()
    with pytest.raises(RuntimeError) as raised:
        transfer.wait()
    return str(raised.value)


def test_waiting_twice_is_an_error():
    assert spawn(wait_twice, 2) == ["the combine transfer was waited for twice"] * 2


def noise(rank: int, length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(rank)) * 10 ** (rank % 3)


def sums(rank: int, world: int) -> dict[str, Tensor]:
    peers, full, half = everyone(), torch.float32, torch.bfloat16
    # In BF16, 256 + 1 is 256.
    small = torch.full((world,), 256.0 if rank == 0 else 1.0)
    gathered = torch.full((8 * world,), -1.0)
    gathered[8 * rank : 8 * rank + 8] = noise(rank, 8)
    AllGather.start(gathered, peers, "param").wait()
    return {
        "first": ReduceScatter.start(noise(rank, 64 * world), peers, full, "grad").wait(),
        "again": ReduceScatter.start(noise(rank, 64 * world), peers, full, "grad").wait(),
        "narrow": ReduceScatter.start(small, peers, half, "grad").wait(),
        "gathered": gathered,
        "equal": all_to_all_equal(torch.arange(world) + 10 * rank, peers, "counts"),
        "sum": all_reduce_sum(torch.tensor([1.0, rank]), peers),
        "max": all_reduce_max(torch.tensor([-rank, rank]), peers),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Tensor]]:
    return spawn(sums, 4)


def test_reduce_scatter_adds_in_the_order_of_ranks(found: list[dict[str, Tensor]]):
    in_order = noise(0, 256)
    for rank in range(1, 4):
        in_order = in_order + noise(rank, 256)
    backwards = noise(3, 256) + noise(2, 256) + noise(1, 256) + noise(0, 256)
    assert not torch.equal(in_order, backwards)
    for rank, results in enumerate(found):
        assert torch.equal(results["first"], in_order.chunk(4)[rank])
        assert torch.equal(results["again"], results["first"])


def test_a_narrow_wire_adds_in_fp32(found: list[dict[str, Tensor]]):
    for results in found:
        assert results["narrow"].dtype == torch.float32
        assert results["narrow"].tolist() == [259.0]


def test_all_gather(found: list[dict[str, Tensor]]):
    for results in found:
        assert torch.equal(results["gathered"], torch.cat([noise(rank, 8) for rank in range(4)]))


def test_small_collectives(found: list[dict[str, Tensor]]):
    for rank, results in enumerate(found):
        assert results["equal"].tolist() == [rank, 10 + rank, 20 + rank, 30 + rank]
        assert results["sum"].tolist() == [4.0, 6.0]
        assert results["max"].tolist() == [0, 3]


def test_a_group_of_one_adds_nothing():
    x = torch.tensor([3.0])
    assert all_reduce_sum(x, None) is x
    assert all_reduce_max(x, None) is x
    assert x.item() == 3.0


def traffic(rank: int, world: int) -> dict[str, int]:
    peers = everyone()
    x = torch.ones(sum(ROWS[rank]), WIDTH, dtype=torch.bfloat16, requires_grad=True)
    all_to_all(x, ROWS[rank], [row[rank] for row in ROWS], peers, "dispatch").wait().sum().backward()
    all_to_all_equal(torch.arange(2 * world), peers, "counts")
    all_reduce_sum(torch.ones(30, dtype=torch.float64), peers)
    ReduceScatter.start(torch.ones(12 * world), peers, torch.float32, "grad").wait()
    ReduceScatter.start(torch.ones(12 * world), peers, torch.bfloat16, "narrow grad").wait()
    AllGather.start(torch.ones(12 * world, dtype=torch.bfloat16), peers, "param").wait()
    return peers.trace.take().sent_bytes


def test_bytes_to_other_ranks_are_counted():
    for rank, sent in enumerate(spawn(traffic, 3)):
        leaving = sum(ROWS[rank]) - ROWS[rank][rank]
        returning = sum(row[rank] for row in ROWS) - ROWS[rank][rank]
        row_bytes = WIDTH * 2
        assert sent == {
            **({"dispatch": (leaving + returning) * row_bytes} if leaving + returning else {}),
            "counts": 2 * 2 * 8,
            "reduce": 2 * 30 * 8 * 2 // 3,
            "grad": 12 * 2 * 4,
            "narrow grad": 12 * 2 * 2,
            "param": 12 * 2 * 2,
        }


def exposed(rank: int, world: int) -> tuple[float, float]:
    """Milliseconds lost when rank 0 is late, and when the wait comes long after the start."""
    peers = everyone()
    dist.barrier()
    if rank == 0:
        time.sleep(0.4)
    all_to_all(torch.ones(2, 1), [1, 1], [1, 1], peers, "dispatch").wait()
    late = peers.trace.take().exposed_ms
    dist.barrier()
    transfer = all_to_all(torch.ones(2, 1), [1, 1], [1, 1], peers, "dispatch")
    time.sleep(0.4)
    transfer.wait()
    return late, peers.trace.take().exposed_ms


def test_only_the_wait_is_exposed():
    (on_time, hidden), (kept_waiting, also_hidden) = spawn(exposed, 2)
    assert kept_waiting > 200 > on_time
    assert max(hidden, also_hidden) < 200
