"""Every kind of group cuts the world into disjoint sets, and coordinates are ranks written differently."""

from itertools import chain, product

import pytest

from dstrain.mesh.axes import Coordinate, Mesh

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
