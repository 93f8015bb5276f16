"""Process groups join the ranks that the mesh names."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dstrain.comm.collectives import Peers
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect, disconnect
from dstrain.mesh.topology import Link, Topology
from dstrain.schedule.pipelines.choose import layout
from tests.gloo.spawn import spawn

CPU = torch.device("cpu")
KINDS = ("ep", "expert_data", "data", "world")


def members(peers: Peers | None) -> list[int] | None:
    """Those who answer in the group, in its order."""
    if peers is None:
        return None
    ranks = torch.zeros(peers.size, dtype=torch.int64)
    ranks[peers.index] = dist.get_rank()
    dist.all_reduce(ranks, group=peers.group)
    return ranks.tolist()


def all_members(rank: int, world: int, meshes: list[Mesh]) -> list[dict[str, list[int] | None]]:
    found = []
    for mesh in meshes:
        groups = connect(mesh, Place(rank, world, CPU))
        assert groups.background is not None
        assert groups.background.size() == world
        # Whoever waits for another rank's tokenising or writing must not give up after minutes.
        assert groups.background._get_backend(CPU).options._timeout >= timedelta(hours=6)
        assert groups.coordinate == mesh.coordinate(rank)
        found.append({kind: members(getattr(groups, kind)) for kind in KINDS})
    return found


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, list[int] | None]]]:
    return spawn(all_members, 4, [Mesh(dp=2, ep=2), Mesh(ep=4), Mesh(dp=4), Mesh(pp=2, ep=2)])


def test_ep2_dp2(found: list):
    experts, replicas = [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]
    for rank in range(4):
        everyone = [0, 1, 2, 3]
        assert found[rank][0] == dict(zip(KINDS, (experts[rank], replicas[rank], everyone, everyone), strict=True))


def test_there_is_no_group_of_one(found: list):
    for rank in range(4):
        assert found[rank][1] == {"ep": [0, 1, 2, 3], "expert_data": None, "data": [0, 1, 2, 3], "world": [0, 1, 2, 3]}
        assert found[rank][2] == {"ep": None, "expert_data": [0, 1, 2, 3], "data": [0, 1, 2, 3], "world": [0, 1, 2, 3]}


def test_stages_have_groups_of_their_own(found: list):
    for rank in range(4):
        stage = [0, 1] if rank < 2 else [2, 3]
        assert found[rank][3] == {"ep": stage, "expert_data": None, "data": stage, "world": [0, 1, 2, 3]}


PIPE_KINDS = ("pp", "data", "expert_data", "embedding")


def pipeline_members(rank: int, world: int, names: list[str]) -> list[dict[str, list[int] | None]]:
    """Of two times two ranks under each schedule, then of a line of four, on nodes of one rank each."""
    # The line comes last: its ends have a group more, and later ones would not meet.
    meshes = [*(Mesh(2, 1, 2, layout(name, 2)) for name in names), Mesh(pp=4)]
    found = []
    for mesh in meshes:
        groups = connect(mesh, Place(rank, world, CPU), ranks_per_node=1)
        assert groups.pp is not None
        assert not groups.pp_ways
        found.append({kind: members(getattr(groups, kind)) for kind in (*PIPE_KINDS, "ep_nodes")})
    return found


def test_groups_of_a_pipeline():
    found = spawn(pipeline_members, 4, ["1f1b", "zb_v", "dualpipe"])
    everyone = [0, 1, 2, 3]
    for rank, (one_f_one_b, zb_v, dualpipe, line) in enumerate(found):
        stage, column = [[0, 1], [2, 3]][rank // 2], [rank % 2, rank % 2 + 2]
        ends = [0, 3] if rank in (0, 3) else None
        assert line == {"pp": everyone, "data": None, "expert_data": None, "embedding": ends, "ep_nodes": None}
        own = {"pp": column, "data": stage, "expert_data": None, "embedding": everyone, "ep_nodes": stage}
        assert one_f_one_b == own
        assert zb_v == {**own, "embedding": None}
        assert dualpipe == {**own, "data": everyone, "expert_data": column, "embedding": None}


def test_one_process_needs_no_groups():
    groups = connect(Mesh(), Place(0, 1, CPU))
    assert not dist.is_initialized()
    assert [getattr(groups, kind) for kind in (*KINDS, "ep_nodes", "ep_node", "background")] == [None] * 7
    assert groups.topology == Topology((0,))
    disconnect()


def test_one_process_takes_a_place_in_a_large_world_where_nothing_is_computed():
    mesh = Mesh(pp=16, dp=2, ep=64)
    rank = mesh.rank(3, 1, 10)
    try:
        groups = connect(mesh, Place(rank, mesh.world, torch.device("meta")), ranks_per_node=8)
        assert groups.world is not None
        assert (groups.world.size, groups.world.index) == (2048, rank)
        of_kind = {kind: getattr(groups, kind) for kind in ("ep", "expert_data", "data", "pp", "ep_nodes", "ep_node")}
        for peers in of_kind.values():
            assert (peers.size, peers.ranks[peers.index]) == (len(peers.ranks), rank)
        first = mesh.rank(3, 1, 0)
        assert of_kind["ep"].ranks == tuple(range(first, first + 64))
        assert of_kind["expert_data"].ranks == (rank - 64, rank)
        assert of_kind["data"].ranks == tuple(range(first - 64, first + 64))
        assert of_kind["pp"].ranks == tuple(mesh.rank(pp, 1, 10) for pp in range(16))
        assert of_kind["ep_nodes"].ranks == tuple(range(first + 2, first + 64, 8))
        assert of_kind["ep_node"].ranks == tuple(range(first + 8, first + 16))
        assert groups.background is None
    finally:
        disconnect()
    assert not dist.is_initialized()


def nodes_of_groups(rank: int, world: int, cases: list[tuple[Mesh, int | None]]) -> list[dict[str, Any]]:
    found = []
    for mesh, ranks_per_node in cases:
        groups = connect(mesh, Place(rank, world, CPU), ranks_per_node=ranks_per_node)
        kinds = {kind: getattr(groups, kind) for kind in ("ep", "ep_nodes", "ep_node")}
        for kind, peers in kinds.items():
            assert members(peers) == (list(peers.ranks) if peers else None)
            # On gloo, what travels home shares the group.
            assert getattr(groups, f"{kind}_home") is peers
        assert groups.world is not None
        found.append(
            {
                "ranks": [peers.ranks if peers else None for peers in kinds.values()],
                "names": [peers.name for peers in kinds.values() if peers],
                "links": groups.world.links,
                "nodes": groups.topology.node_of_rank,
            }
        )
    return found


@pytest.fixture(scope="module")
def nodes() -> list[list[dict[str, Any]]]:
    cases = [(Mesh(ep=4), 2), (Mesh(ep=4), 1), (Mesh(ep=4), 3), (Mesh(ep=2, dp=2), 1), (Mesh(dp=2, ep=2), None)]
    return spawn(nodes_of_groups, 4, cases)


def test_nodes_of_an_ep_group(nodes: list):
    for rank in range(4):
        node = (0, 1) if rank < 2 else (2, 3)
        found = nodes[rank][0]
        assert found["ranks"] == [(0, 1, 2, 3), (rank % 2, rank % 2 + 2), node]
        assert found["names"] == ["ep", "ep-nodes", "ep-node"]
        assert found["nodes"] == (0, 0, 1, 1)
    self, node, network = Link.SELF, Link.NODE, Link.NETWORK
    assert nodes[2][0]["links"] == (network, network, self, node)


def test_a_rank_alone_on_its_node_has_no_group_there(nodes: list):
    assert [nodes[rank][1]["ranks"] for rank in range(4)] == [[(0, 1, 2, 3), (0, 1, 2, 3), None]] * 4
    assert [found[3]["ranks"] for found in nodes] == [[(0, 1), (0, 1), None]] * 2 + [[(2, 3), (2, 3), None]] * 2


def test_uneven_nodes_have_no_groups(nodes: list):
    assert [nodes[rank][2]["ranks"] for rank in range(4)] == [[(0, 1, 2, 3), None, None]] * 4


def test_ranks_of_one_machine_find_each_other(nodes: list):
    for rank in range(4):
        assert nodes[rank][4]["nodes"] == (0, 0, 0, 0)
        assert nodes[rank][4]["names"] == ["ep"]


def test_the_launcher_says_who_we_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (Place.from_environment().rank, Place.from_environment().world) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (Place.from_environment().rank, Place.from_environment().world) == (3, 8)
