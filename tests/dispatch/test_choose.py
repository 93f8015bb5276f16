"""Which transport is taken, and why; the measurement on real processes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dstrain.comm.probe import Speed, measure
from dstrain.config.schema import (
    Config,
    DispatchConfig,
    HardwareConfig,
    MeshConfig,
    ModelConfig,
    PrecisionConfig,
    TrainConfig,
)
from dstrain.dispatch.choose import Links, Task, choose, decide, estimate, find_speeds, make_dispatcher, wire_of
from dstrain.errors import ConfigError
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect, disconnect
from dstrain.mesh.topology import Link
from dstrain.plan.traffic import Router, Rows
from tests.gloo.spawn import spawn

CPU = torch.device("cpu")
BF16 = Rows.of("bfloat16", "bfloat16", 512)
V3 = Task((8,) * 8, True, Router(256, 8, 8, 4), 4096, Rows.of("fp8", "bfloat16", 7168))
SMALL = Task((2, 2), True, Router(16, 6), 256, BF16)
ONE_NODE = replace(SMALL, node_sizes=(4,), is_grid=False)


def links(node: float, network: float, latency_s: float) -> Links:
    speeds = {Link.NODE: Speed(node, latency_s), Link.NETWORK: Speed(network, latency_s)}
    return Links(speeds, "measured")


H800 = links(200, 50, 20e-6)


@pytest.mark.parametrize(
    ("task", "over", "best"),
    [
        (V3, H800, "hierarchical"),
        # The second hop costs more than the first one saves: links inside a node are the slower ones.
        (replace(V3, router=Router(256, 8), node_sizes=(2,) * 4), links(10, 50, 0), "rank"),
        # A few tokens: time is latency, and one hop has less of it.
        (replace(V3, tokens=4), H800, "rank"),
        (SMALL, links(1, 0.025, 2e-4), "hierarchical"),
        (SMALL, links(1, 1, 2e-4), "rank"),
        (ONE_NODE, None, "rank"),
        (replace(ONE_NODE, node_sizes=(3, 1)), None, "rank"),
        # One row per pair is all there is.
        (replace(ONE_NODE, router=Router(4, 1)), None, "rank"),
    ],
)
def test_decisions(task: Task, over: Links | None, best: str):
    kind, reason = decide(task, over)
    assert kind == best
    assert reason.startswith(f"{best}: ")
    costs = {kind: estimate(kind, task, over) for kind in task.kinds}
    assert costs[kind] == min(costs.values())


def test_reasons():
    assert decide(SMALL, links(1, 0.025, 2e-4))[1] == (
        "hierarchical: 2 nodes of 2 ranks, 45.5 ms a layer and micro-batch against 75.3 ms for rank "
        "over 0.025 GB/s between nodes (measured)"
    )
    assert decide(ONE_NODE, None)[1] == (
        "rank: 4 ranks on one node, 2.79 MB a layer and micro-batch against 4.73 MB for alltoall"
    )
    assert "nodes of 3 and 1 ranks" in decide(replace(ONE_NODE, node_sizes=(3, 1)), None)[1]
    assert "4 nodes of 1 rank," in decide(replace(ONE_NODE, node_sizes=(1,) * 4), None)[1]


def test_estimate_by_hand():
    """One token, one expert on each of four ranks, all four visited."""
    task = Task((2, 2), True, Router(4, 4), 1, Rows(out_bytes=1000, home_bytes=2000))
    # Three links, of them two slow; 32 bytes before a first row (16 of header), 16 of numbers on the last way home.
    ways = [2 * 1032, 2 * 2000, 2 * 1000, 2 * 2016]
    assert estimate("rank", task, links(1e3, 1e-9, 0.5)) == pytest.approx(sum(ways) + 4 * 0.5)
    # One slow link, with two weights; then the rows of two tokens to the other rank of the node, in no time.
    across = [1048, 2000, 1000, 2016]
    assert estimate("hierarchical", task, links(1e3, 1e-9, 0.5)) == pytest.approx(sum(across) + 8 * 0.5, abs=1e-3)


def config(kind: str = "auto", wire: str = "auto", ep: int = 4, hardware: HardwareConfig | None = None) -> Config:
    return Config(
        mesh=MeshConfig(ep=ep),
        model=ModelConfig(num_experts=16, experts_per_token=6),
        train=TrainConfig(seq_len=64),
        dispatch=DispatchConfig(kind=kind, wire=wire),
        precision=PrecisionConfig(compute_dtype="float32"),
        hardware=hardware or HardwareConfig(),
    )


def with_products(products: str, wire: str = "auto", dtype: str = "bfloat16", **more: Any) -> Config:
    made = config(wire=wire, **more)
    return replace(made, precision=PrecisionConfig(compute_dtype=dtype, products=products))


@pytest.mark.parametrize(
    ("case", "wire"),
    [
        (with_products("compute"), "bfloat16"),
        (with_products("compute", dtype="float32"), "float32"),
        (with_products("fp8", dtype="float32"), "fp8"),
        (with_products("mxfp8"), "mxfp8"),
        (with_products("fp8", "bfloat16"), "bfloat16"),
        (with_products("compute", "logfmt10"), "logfmt10"),
    ],
)
def test_auto_is_the_format_of_the_products(case: Config, wire: str):
    assert wire_of(case) == wire


# -- Real processes ---------------------------------------------------------------------------------------------------


def joined(rank: int, world: int, ep: int, ranks_per_node: int) -> Groups:
    return connect(Mesh(1, world // ep, ep), Place(rank, world, CPU), 30, ranks_per_node)


def measured(rank: int, world: int) -> tuple[Speed | None, Speed | None, Speed | None]:
    pairs, whole = joined(rank, world, 2, 2), joined(rank, world, 4, 2)
    return (
        measure(whole.ep, Link.NODE, whole.world, 0.01),
        measure(whole.ep, Link.NETWORK, whole.world, 0.01),
        measure(pairs.ep, Link.NETWORK, pairs.world, 0.01),
    )


def test_all_ranks_measure_the_same_speed():
    first, *others = spawn(measured, 4)
    assert others == [first] * 3
    node, network, absent = first
    assert absent is None
    for speed in (node, network):
        assert speed.gbytes_per_s > 0
        assert speed.latency_s > 0


def chosen(rank: int, world: int, ranks_per_node: int, *cases: Config) -> list[tuple[str, str, str]]:
    """Kind, wire and reason, and the class that is built, of each config; or the error."""
    groups, found = joined(rank, world, cases[0].mesh.ep, ranks_per_node), []
    for case in cases:
        try:
            choice = choose(case, groups)
        except ConfigError as error:
            found.append((error.field, error.rule, error.cure))
        else:
            again = replace(case, dispatch=DispatchConfig(choice.kind, choice.wire))
            dispatcher = make_dispatcher(again, groups)
            found.append((type(dispatcher).__name__, f"{choice.wire} {dispatcher.wire.name}", choice.reason))
            dispatcher.close()
    return found


def test_choices_over_two_nodes():
    slow = HardwareConfig(intra_node_gbytes_per_s=10.0, inter_node_gbytes_per_s=0.001)
    cases = [config(hardware=slow), config(), config("alltoall", "fp8"), config("hierarchical")]
    first, *others = spawn(chosen, 4, 2, *cases)
    assert others == [first] * 3
    written, measured_, flat, explicit = first
    assert written[:2] == ("HierarchicalDispatcher", "float32 float32")
    assert written[2].endswith("for rank over 0.001 GB/s between nodes (from the hardware file)")
    assert measured_[2].endswith("between nodes (measured)")
    assert flat == ("AllToAllDispatcher", "fp8 fp8", "alltoall: asked for; 2 nodes of 2 ranks")
    assert explicit[2] == "hierarchical: asked for; 2 nodes of 2 ranks"


def speeds_of_file(rank: int, world: int) -> dict[Link, Speed]:
    written = HardwareConfig(intra_node_gbytes_per_s=10.0, inter_node_gbytes_per_s=2.0, inter_node_latency_us=300.0)
    return find_speeds(written, joined(rank, world, world, 1)).speeds


def test_a_hardware_file_may_know_latencies():
    speeds = spawn(speeds_of_file, 2)[0]
    assert speeds[Link.NETWORK] == Speed(2.0, pytest.approx(300e-6))
    assert speeds[Link.NODE] == Speed(10.0, pytest.approx(20e-6))


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "layout"),
    [(2, 2, "2 ranks on one node"), (4, 1, "4 nodes of 1 rank"), (4, 3, "nodes of 3 and 1 ranks")],
)
def test_choices_where_there_is_no_grid(ep: int, ranks_per_node: int, layout: str):
    first, *others = spawn(chosen, 4, ranks_per_node, config(ep=ep), config("hierarchical", ep=ep))
    assert others == [first] * 3
    free, refused = first
    assert free[0] == "RankDispatcher"
    assert free[2].startswith(f"rank: {layout}, ")
    assert refused[0] == "dispatch.kind"
    assert refused[1].endswith(f"here are {layout}")
    assert "dispatch.kind=rank" in refused[2]


def test_where_nothing_can_be_measured_bytes_decide():
    groups = connect(Mesh(ep=4), Place(0, 4, torch.device("meta")), ranks_per_node=2)
    try:
        known = HardwareConfig(intra_node_gbytes_per_s=10.0, inter_node_gbytes_per_s=0.001)
        half = replace(known, inter_node_gbytes_per_s=0.0)
        reasons = [choose(config(hardware=hardware), groups).reason for hardware in (known, half, None)]
        assert reasons[0].endswith("GB/s between nodes (from the hardware file)")
        assert reasons[1] == reasons[2]
        assert reasons[1].split(" against ")[0].endswith("MB a layer and micro-batch")
    finally:
        disconnect()


def kept(rank: int, world: int, *cases: Config) -> list[str]:
    """The format in which what arrives stays, "" if it is decoded."""
    groups, found = joined(rank, world, world, 2), []
    for case in cases:
        dispatcher = make_dispatcher(case, groups)
        found.append(dispatcher.kept.name if dispatcher.kept else "")
        dispatcher.close()
    return found


def test_what_products_take_as_it_arrives_stays_quantised():
    kinds = ("alltoall", "rank", "hierarchical")
    cases = [with_products("fp8", kind=kind) for kind in kinds]
    cases += [with_products("mxfp8", kind="rank"), with_products("fp8", "mxfp8", kind="rank")]
    cases += [with_products("compute", "fp8", kind="rank"), with_products("fp8", "bfloat16", kind="rank")]
    assert spawn(kept, 4, *cases) == [["fp8"] * 3 + ["mxfp8", "", "", ""]] * 4


def test_one_rank_has_all_experts():
    groups = connect(Mesh(), Place(0, 1, CPU))
    case = config("auto", "fp8", ep=1)
    assert choose(case, groups).kind == "local"
    dispatcher = make_dispatcher(case, groups)
    # Rounded as if they travelled: the same numbers at any number of ranks.
    assert dispatcher.wire.name == "fp8"
    assert dispatcher.kept is None
    assert not dispatcher.hops
    assert make_dispatcher(with_products("fp8", ep=1), groups).kept.name == "fp8"
