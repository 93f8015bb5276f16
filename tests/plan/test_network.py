"""Links against formulas done by hand, the exact bytes of plan.traffic, and published transfers."""

import json
from dataclasses import replace
from importlib import resources

import pytest

from dstrain.config.hardware import HardwareConfig
from dstrain.hardware import named
from dstrain.mesh.topology import Link
from dstrain.plan.architecture import Architecture
from dstrain.plan.job import Job
from dstrain.plan.network import HOP_S, LATENCY_US, Group, Network, exchanges, router_key, rows_sent
from dstrain.plan.traffic import Router, Way, expected, link_bytes
from dstrain.plan.traffic import Rows as RowBytes

LATENCY_S = LATENCY_US * 1e-6
# Eight devices a node; 100 and 10 GB/s, and no byte more takes less.
MACHINE = HardwareConfig(
    devices_per_node=8,
    intra_node_gbytes_per_s=100.0,
    inter_node_gbytes_per_s=10.0,
    intra_node_efficiency=1.0,
    inter_node_efficiency=1.0,
    intra_node_alltoall_efficiency=1.0,
    inter_node_alltoall_efficiency=1.0,
)
V3 = Architecture("v3", 129280, 7168, 61, 3, 128, 128, 192, 128, 1536, 512, 64, 18432, True, 256, 8, 2048, 2048, 8, 4)


def published(file: str, name: str):
    return json.loads((resources.files("dstrain.plan") / "data" / f"{file}.json").read_text())[name]


@pytest.mark.parametrize(
    ("size", "stride", "local", "nodes"),
    [(1, 1, 1, 1), (4, 1, 4, 1), (8, 1, 8, 1), (64, 1, 8, 8), (16, 4, 2, 8), (16, 8, 1, 16), (16, 64, 1, 16)],
)
def test_members_of_a_group_on_a_node(size: int, stride: int, local: int, nodes: int):
    group = Group.of(size, stride, 8)
    assert (group.local, group.nodes) == (local, nodes)


def test_a_ring_in_a_node():
    """Seven eighths of 8 GB over 100 GB/s."""
    got = Network(MACHINE).collective_s(8e9, Group.of(8, 1, 8))
    assert got == pytest.approx(7 / 100 + LATENCY_S)
    assert Network(MACHINE).collective_s(8e9, Group.of(1, 1, 8)) == 0


def test_a_ring_over_nodes():
    """Eight cards carry 80 GB/s, less than the links inside; one card 10; sixteen cards more than the links inside."""
    network = Network(MACHINE)
    hops_s = 7 * HOP_S + LATENCY_S
    assert network.collective_s(64e9, Group.of(64, 1, 8)) == pytest.approx(63 / 80 + hops_s)
    assert network.collective_s(64e9, Group.of(8, 8, 8)) == pytest.approx(56 / 10 + hops_s)
    wide = Network(replace(MACHINE, devices_per_node=16))
    assert wide.collective_s(64e9, Group.of(64, 1, 16)) == pytest.approx(63 / 100 + 3 * HOP_S + LATENCY_S)


def test_latencies_of_a_machine():
    network = Network(replace(MACHINE, intra_node_latency_us=5.0, inter_node_latency_us=50.0))
    assert network.collective_s(0.0, Group.of(8, 1, 8)) == pytest.approx(5e-6)
    assert network.exchange_s(0.0, 0.0, Group.of(16, 1, 8)) == pytest.approx(50e-6)


def test_a_send():
    """All of it once, over one card or inside of a node."""
    network = Network(MACHINE)
    assert network.send_s(1e9, crosses=True) == pytest.approx(1 / 10, abs=1e-4)
    assert network.send_s(1e9, crosses=False) == pytest.approx(1 / 100, abs=1e-4)


def test_the_slower_link_decides_an_exchange():
    network, group = Network(MACHINE), Group.of(16, 1, 8)
    assert network.exchange_s(2e9, 1e9, group) == pytest.approx(1 / 10 + LATENCY_S)
    assert network.exchange_s(20e9, 1e9, group) == pytest.approx(20 / 100 + LATENCY_S)
    assert network.exchange_s(20e9, 1e9, Group.of(8, 1, 8)) == pytest.approx(20 / 100 + LATENCY_S)
    assert network.exchange_s(20e9, 1e9, Group.of(1, 1, 8)) == 0


@pytest.mark.parametrize("groups", [(1, 1), (8, 4)])
@pytest.mark.parametrize("nodes", [1, 2, 8])
@pytest.mark.parametrize("kind", ["alltoall", "rank", "hierarchical"])
def test_rows_are_those_of_the_traffic(kind: str, nodes: int, groups: tuple[int, int]):
    """Byte for byte, on the way home of a combine, which has no headers or counts; on one node, where dstrain's
    hierarchical transport has a hop to the rank itself, too."""
    tokens, hidden, ranks = 4096, 7168, 8 * nodes
    model = replace(V3, groups=groups[0], groups_per_token=groups[1])
    router = Router(*router_key(model))
    sizes = RowBytes(0, 2 * hidden)
    messages = expected(kind, [8] * nodes, router, tokens)
    counted = link_bytes(messages, [rank // 8 for rank in range(ranks)], sizes)
    rows = rows_sent(kind, router_key(model), ranks, 8)
    assert rows.inside * tokens * 2 * hidden == pytest.approx(counted[Way.COMBINE, Link.NODE])
    assert rows.across * tokens * 2 * hidden == pytest.approx(counted[Way.COMBINE, Link.NETWORK])


def test_deepep_sends_as_hierarchical_does():
    assert rows_sent("deepep", router_key(V3), 64, 8) == rows_sent("hierarchical", router_key(V3), 64, 8)


def test_no_token_goes_to_more_nodes_than_its_router_lets_it():
    """Four of eight, of which its own is one half of the time; without groups it goes to more of them."""
    limited = rows_sent("hierarchical", router_key(V3), 64, 8)
    free = rows_sent("hierarchical", router_key(replace(V3, groups=1, groups_per_token=1)), 64, 8)
    assert limited.across == pytest.approx(4 * 7 / 8)
    assert limited.across < free.across < 7


def test_a_group_that_ends_within_a_node():
    """12 ranks on nodes of 8: a third of the rows goes to a node that only holds 4 of them."""
    rows = rows_sent("alltoall", (24, 6, 1, 1), 12, 8)
    assert rows.inside == pytest.approx(6 * 7 / 12)
    assert rows.across == pytest.approx(6 * 4 / 12)


def deepseek(ep: int, **changes: object) -> Job:
    job = Job(V3, ep, 4096, ep, ep=ep, products="fp8_block", dispatcher="deepep", wire="fp8")
    return replace(job, **changes)


@pytest.mark.parametrize(("ranks", "close"), [(8, 0.15), (16, 0.45), (32, 0.06), (64, 0.04)])
def test_published_bandwidth_of_deepep(ranks: int, close: float):
    """Logical bytes, a row for each node (or, on one of them, each rank) of a token, over the time of the kernels. Of
    two nodes, where every token goes to both of them, it reaches less than of four, which nothing here explains."""
    table, hardware = published("gpu_microbenchmarks", "deepep_v1_h800"), named("h800_sxm")
    model = V3 if ranks > 8 else replace(V3, groups=1, groups_per_token=1)
    nodes = ranks // 8
    logical = Router(*router_key(model)).places(nodes if nodes > 1 else ranks)
    network, group = Network(hardware), Group.of(ranks, 1, 8)
    rows = rows_sent("deepep", router_key(model), ranks, 8)
    for name, row in (("dispatch_GBps", 7168 + 4 * 56), ("combine_GBps", 2 * 7168)):
        seconds = network.exchange_s(rows.inside * 4096 * row, rows.across * 4096 * row, group)
        assert logical * 4096 * row / seconds / 1e9 == pytest.approx(table[name][str(ranks)], rel=close)


def test_published_exchanges_of_64_h100():
    """BF16 both ways: plainly by NCCL 8.7 to 9.2 ms, and with a row for each node 4.4 to 4.6 ms, which is half of it
    where tokens go to half of the nodes."""
    (row,) = (row for row in published("alltoall_microbenchmarks", "hybridep") if row["gpu"] == "H100")
    for kind, known in (("alltoall", row["alltoall_us"]), ("deepep", row["hybridep_us"])):
        low_s, high_s = (float(us) * 1e-6 for us in known.split("-"))
        sent = exchanges(deepseek(64, dispatcher=kind, wire="bfloat16"), named("h100_sxm"), 4096.0)
        assert sent.out_s == sent.home_s
        assert 0.85 * low_s < sent.out_s < 1.15 * high_s, kind


def test_what_changes_an_exchange():
    hardware = named("h800_sxm")
    plain = exchanges(deepseek(64), hardware, 4096.0)
    beside = exchanges(deepseek(64, overlap=True), hardware, 4096.0)
    assert 1.3 < beside.home_s / plain.home_s < 1.5
    skewed = exchanges(deepseek(64, skew=1.5), hardware, 4096.0)
    assert 1.4 < skewed.home_s / plain.home_s < 1.5
    wide = exchanges(deepseek(64, wire="bfloat16"), hardware, 4096.0)
    assert wide.out_s == wide.home_s == plain.home_s
    for alone in (deepseek(1), deepseek(64, dispatcher="local")):
        assert (exchanges(alone, hardware, 4096.0).out_s, exchanges(alone, hardware, 4096.0).home_s) == (0.0, 0.0)


def test_values_of_float32_go_home_as_such():
    job = deepseek(64, products="float32", wire="float32")
    sent = exchanges(job, named("h800_sxm"), 4096.0)
    bf16 = exchanges(deepseek(64, wire="bfloat16"), named("h800_sxm"), 4096.0)
    assert sent.out_s == sent.home_s
    assert 1.9 < sent.home_s / bf16.home_s < 2.0
