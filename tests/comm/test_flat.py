"""Sums and gathers of flat buffers over real processes: values and bytes, and that starting them never waits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers
from dstrain.comm.flat import FlatCollectives, sent_bytes
from dstrain.comm.trace import Trace
from dstrain.mesh.topology import Topology
from tests.gloo.spawn import spawn

SHARE = 48


def everyone(rank: int, world: int, per_node: int) -> Peers:
    topology = Topology(tuple(r // per_node for r in range(world)))
    links = tuple(topology.link(rank, r) for r in range(world))
    trace = Trace(torch.device("cpu"))
    return Peers(dist.group.WORLD, trace, f"data of {per_node}", tuple(range(world)), links, per_node)


def noise(rank: int, length: int) -> Tensor:
    """Of different magnitudes, so that the order of addition shows."""
    return torch.randn(length, generator=torch.Generator().manual_seed(rank)) * 10 ** (rank % 3)


def own(rank: int, world: int, dtype: torch.dtype) -> Tensor:
    x = torch.full((SHARE * world,), -1.0, dtype=dtype)
    x.view(world, -1)[rank] = noise(rank, SHARE).to(dtype)
    return x


def run(rank: int, world: int, per_node: int) -> dict[str, Any]:
    peers = everyone(rank, world, per_node)
    flat, full, half = FlatCollectives(peers.trace), torch.float32, torch.bfloat16
    # In BF16, 256 + 1 is 256.
    small = torch.full((16 * world,), 256.0 if rank == 0 else 1.0)
    flights = {
        "sum": flat.reduce_scatter(noise(rank, SHARE * world), peers, full, "grad"),
        "gathered": flat.all_gather(own(rank, world, full), peers, "param"),
        "again": flat.reduce_scatter(noise(rank, SHARE * world), peers, full, "grad"),
        "narrow": flat.reduce_scatter(small, peers, half, "narrow"),
        "gathered in bf16": flat.all_gather(own(rank, world, half), peers, "half"),
        "made": flat.all_gather_made(lambda: own(rank, world, half), lambda x: x.float() * 2, peers, "half", []),
    }
    found: dict[str, Any] = {name: flight.wait().flatten() for name, flight in flights.items()}
    transfers = peers.trace.take().transfers
    found["bytes"] = [(t.kind, {link.value: n for link, n in t.sent_bytes.items()}) for t in transfers]
    known = sent_bytes(peers, SHARE * world * full.itemsize)
    found["known"] = {link.value: n for link, n in known.items() if n}
    return found


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["all across", "two nodes", "one node"])
def found(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    return request.param, spawn(run, 4, request.param)


def in_order(per_node: int) -> Tensor:
    nodes = [sum(noise(rank, SHARE * 4) for rank in range(n, n + per_node)) for n in range(0, 4, per_node)]
    return sum(nodes[1:], start=nodes[0])


def test_sums_are_added_inside_nodes_and_then_across_in_the_order_of_ranks(found: tuple[int, list]):
    per_node, ranks = found
    for rank, results in enumerate(ranks):
        assert torch.equal(results["sum"], in_order(per_node).chunk(4)[rank])
        assert torch.equal(results["again"], results["sum"])


def test_the_order_of_addition_shows():
    assert not torch.equal(in_order(2), in_order(1))


def test_a_narrow_wire_adds_in_fp32(found: tuple[int, list]):
    for results in found[1]:
        assert results["narrow"].dtype == torch.float32
        # 256 + 1 becomes 256 again where it crosses as the sum of a node.
        assert results["narrow"].unique().tolist() == [258.0 if found[0] == 2 else 259.0]


def test_all_shares_are_gathered(found: tuple[int, list]):
    for results in found[1]:
        expected = torch.cat([noise(rank, SHARE) for rank in range(4)])
        assert torch.equal(results["gathered"], expected)
        assert torch.equal(results["gathered in bf16"], expected.bfloat16())
        assert torch.equal(results["made"], expected.bfloat16().float() * 2)


def test_shares_cross_the_network_once_per_node(found: tuple[int, list]):
    node, network = {1: (0, 3), 2: (2, 1), 4: (3, 0)}[found[0]]
    for results in found[1]:
        for kind, sent in results["bytes"]:
            share = {"grad": 4 * SHARE, "param": 4 * SHARE, "narrow": 2 * 16, "half": 2 * SHARE}[kind]
            assert sent == {k: v * share for k, v in {"node": node, "network": network}.items() if v}


def test_what_is_sent_is_known_beforehand(found: tuple[int, list]):
    for results in found[1]:
        assert [sent for kind, sent in results["bytes"] if kind in ("grad", "param")] == [results["known"]] * 3


def start_many(rank: int, world: int) -> list[float]:
    """The other rank starts nothing before this one has started everything."""
    peers = everyone(rank, world, 1)
    flat, store = FlatCollectives(peers.trace), dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["all started"])
    flights = [flat.reduce_scatter(torch.full((32,), float(n)), peers, torch.float32, "grad") for n in range(40)]
    if rank == 0:
        store.set("all started", "")
    return [flight.wait()[0].item() for flight in flights]


def test_starting_never_waits_for_a_peer():
    assert spawn(start_many, 2, timeout_s=30) == [[2.0 * n for n in range(40)]] * 2
