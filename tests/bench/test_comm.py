"""Links and collectives measured over real processes: every kind is there, with the bytes that it must have."""

from dataclasses import replace
from functools import cache

import torch

from dstrain.bench.comm import Exchange, exchanges, speeds
from dstrain.comm.probe import Speed
from dstrain.config.schema import Config, DispatchConfig, EngineConfig, MeshConfig, ModelConfig, TrainConfig
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.mesh.topology import Link
from dstrain.plan.count import parameters
from tests.gloo.spawn import spawn

CONFIG = Config(
    mesh=MeshConfig(ep=4, dp=1),
    model=ModelConfig(hidden_size=64, num_experts=8, experts_per_token=2, moe_intermediate_size=32),
    train=TrainConfig(seq_len=16, micro_batch=2),
    dispatch=DispatchConfig(kind="rank"),
)


def measured(rank: int, world: int, config: Config, ranks_per_node: int) -> tuple[list[Exchange], dict[Link, Speed]]:
    place = Place(rank, world, torch.device("cpu"))
    groups = connect(Mesh(dp=config.mesh.dp or 1, ep=config.mesh.ep), place, ranks_per_node=ranks_per_node)
    assert groups.world is not None
    return list(exchanges(config, groups, groups.world, rounds=1)), speeds(groups.world)


@cache
def on_two_nodes() -> list[tuple[list[Exchange], dict[Link, Speed]]]:
    return spawn(measured, 4, CONFIG, 2)


def test_all_ranks_come_to_the_same_figures():
    (first, links), *others = on_two_nodes()
    assert all(other == (first, links) for other in others)
    assert all(each.ms > 0 for each in first)


def test_every_transport_and_collective_is_there():
    names = [each.what for each in on_two_nodes()[0][0]]
    ways = ("dispatch", "combine", "gradients of both")
    tokens = [f"{kind}: {way}" for kind in ("rank", "alltoall", "hierarchical") for way in ways]
    assert names == [*tokens, "dense bucket: gradients", "dense bucket: parameters", "load of a layer's experts"]


def test_bytes_are_those_of_the_sizes():
    found = {each.what: each.sent_bytes for each in on_two_nodes()[0][0]}
    dense = parameters(replace(CONFIG.model, vocab_size=0)).dense
    share = -(-dense // 4)
    # FP32: inside the node the two shares of the other index, then a share across.
    assert found["dense bucket: gradients"] == {Link.NODE: 2 * share * 4, Link.NETWORK: share * 4}
    # A token goes home over the network once from each rank of the other node, or once from the node.
    assert found["hierarchical: combine"][Link.NETWORK] < found["rank: combine"][Link.NETWORK]
    assert found["rank: combine"][Link.NETWORK] < found["alltoall: combine"][Link.NETWORK]


def test_both_kinds_of_link_are_measured():
    links = on_two_nodes()[0][1]
    assert set(links) == {Link.NODE, Link.NETWORK}
    assert all(speed.gbytes_per_s > 0 and speed.latency_s > 0 for speed in links.values())


def test_replicas_of_experts_sum_a_bucket_of_their_own():
    config = Config(model=CONFIG.model, train=CONFIG.train, mesh=MeshConfig(dp=2), engine=EngineConfig(bucket_mib=1))
    found, links = spawn(measured, 2, config, 2)[0]
    assert [each.what for each in found][-3:-1] == ["experts' bucket: gradients", "experts' bucket: parameters"]
    assert not any(each.group == "ep" for each in found)
    assert set(links) == {Link.NODE}
