"""Every kind of group cuts the world into disjoint sets, and coordinates are ranks written differently."""

from itertools import chain, product

import pytest

from dstrain.mesh.axes import Coordinate, Mesh
from dstrain.schedule.pipelines.choose import NAMES, layout, make

MESHES = [Mesh(pp, dp, ep) for pp, dp, ep in product((1, 2, 3), (1, 2, 5), (1, 2, 4))]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ranks_and_coordinates_are_inverse(mesh: Mesh):
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.world)]
    assert [mesh.rank(c.pp, c.dp, c.ep) for c in coordinates] == list(range(mesh.world))
    everywhere = product(range(mesh.pp), range(mesh.dp), range(mesh.ep))
    assert set(coordinates) == {Coordinate(*place) for place in everywhere}


def test_the_formula_of_a_rank():
    mesh = Mesh(pp=2, dp=3, ep=4)
    assert mesh.rank(pp=1, dp=2, ep=3) == (1 * 3 + 2) * 4 + 3 == 23
    assert mesh.coordinate(17) == Coordinate(pp=1, dp=1, ep=1)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_kind_of_group_partitions_the_world(mesh: Mesh):
    sizes = {"ep": mesh.ep, "expert_data": mesh.dp, "data": mesh.dp * mesh.ep, "pp": mesh.pp}
    for kind, size in sizes.items():
        groups = getattr(mesh, f"{kind}_groups")()
        assert {len(group) for group in groups} == {size}
        assert sorted(chain(*groups)) == list(range(mesh.world))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_members_of_a_group_differ_in_its_axes_only(mesh: Mesh):
    """Members also come in the order of their index, which the transports rely on."""
    free = {"ep": {"ep"}, "expert_data": {"dp"}, "data": {"dp", "ep"}, "pp": {"pp"}}
    for kind, axes in free.items():
        for group in getattr(mesh, f"{kind}_groups")():
            members = [mesh.coordinate(rank) for rank in group]
            for axis in {"pp", "dp", "ep"} - axes:
                assert len({getattr(member, axis) for member in members}) == 1
            assert [(m.pp, m.dp, m.ep) for m in members] == sorted((m.pp, m.dp, m.ep) for m in members)


def test_expert_parallel_groups_are_neighbours():
    assert Mesh(pp=2, dp=2, ep=2).ep_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Mesh(pp=2, dp=2, ep=2).expert_data_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_ranks_of_a_stage_share_the_batch(mesh: Mesh):
    for group in mesh.data_groups():
        assert [mesh.data_index(rank) for rank in group] == list(range(mesh.data))


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_the_ranks_of_an_expert_parallel_group_hold_every_expert_once(ep: int):
    held = [Mesh(ep=ep).local_experts(12, index) for index in range(ep)]
    assert list(chain(*held)) == list(range(12))
    assert {len(experts) for experts in held} == {12 // ep}


# -- pipelines --------------------------------------------------------------------------------------------------------

PIPELINES = [Mesh(pp, dp, ep, layout(name, pp)) for name in NAMES for pp, dp, ep in ((2, 1, 2), (4, 2, 2), (6, 1, 1))]


def stages_of(mesh: Mesh, rank: int) -> tuple[int, ...]:
    return mesh.stages.held[mesh.coordinate(rank).pp]


@pytest.mark.parametrize("mesh", PIPELINES, ids=str)
def test_a_data_group_is_all_who_hold_the_same_stages(mesh: Mesh):
    groups = mesh.data_groups()
    assert sorted(chain(*groups)) == list(range(mesh.world))
    held = [{frozenset(stages_of(mesh, rank)) for rank in group} for group in groups]
    assert [len(stages) for stages in held] == [1] * len(groups)
    assert len(set().union(*held)) == len(groups)


@pytest.mark.parametrize("mesh", PIPELINES, ids=str)
def test_an_expert_data_group_is_all_who_hold_the_same_experts(mesh: Mesh):
    groups = mesh.expert_data_groups()
    assert sorted(chain(*groups)) == list(range(mesh.world))
    places = [{(frozenset(stages_of(mesh, rank)), mesh.coordinate(rank).ep) for rank in group} for group in groups]
    assert [len(place) for place in places] == [1] * len(groups)
    assert len(set().union(*places)) == len(groups)
    assert {len(group) for group in groups} == {mesh.dp * mesh.stages.copies}


def test_mirrored_stages_are_summed_over_both_ends():
    mesh = Mesh(4, 1, 2, layout("dualpipe", 4))
    assert mesh.data_groups() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert mesh.expert_data_groups() == [[0, 6], [1, 7], [2, 4], [3, 5]]


@pytest.mark.parametrize("mesh", PIPELINES, ids=str)
def test_an_embedding_group_joins_the_ends_where_no_rank_holds_both(mesh: Mesh):
    ends = {0, mesh.stages.num_stages - 1}
    at_an_end = [rank for rank in range(mesh.world) if ends & set(stages_of(mesh, rank))]
    at_both = [rank for rank in at_an_end if ends <= set(stages_of(mesh, rank))]
    assert mesh.embedding_groups() == ([] if at_both else [at_an_end])


def test_the_ends_of_a_line_and_of_a_v():
    assert Mesh(4, 1, 2, layout("zb_1p", 4)).embedding_groups() == [[0, 1, 6, 7]]
    assert Mesh(4, 1, 2, layout("interleaved", 4)).embedding_groups() == [[0, 1, 6, 7]]
    assert Mesh(4, 1, 2, layout("zb_v", 4)).embedding_groups() == []
    assert Mesh(4, 1, 2, layout("dualpipe", 4)).embedding_groups() == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_hops_are_what_the_tables_ask_for(name: str, ranks: int):
    where = make(name, ranks, 2 * ranks).rank_of
    asked = {(at, where[stage + 1, m]) for (stage, m), at in where.items() if (stage + 1, m) in where}
    assert Mesh(ranks, layout=layout(name, ranks)).hops() == sorted((a, b) for a, b in asked if a != b)
