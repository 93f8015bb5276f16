"""What outlives a process is named and placed without regard to the layout."""

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor, nn

from dstrain.comm.trace import Trace
from dstrain.config.schema import MtpConfig
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place
from dstrain.parallel.apply import build_model, holders, logical_parameters
from dstrain.plan.count import parameters
from dstrain.schedule.pipelines.choose import NAMES, layout
from tests.tiny import CPU, TINY, alone, tiny_config

# (whole shape, offset, flat values of this rank)
Part = tuple[tuple[int, ...], int, Tensor]


def groups_of(mesh: Mesh, rank: int) -> Groups:
    """Without processes: enough to build a model whose dispatcher is never used."""
    return Groups(mesh, Place(rank, mesh.world, CPU), mesh.coordinate(rank), Trace(CPU), None, None, None, None, None)


def parts(mesh: Mesh, rank: int) -> dict[str, Part]:
    logicals = logical_parameters(build_model(TINY, groups_of(mesh, rank)))
    return {x.name: (x.shape, x.offsets[0], x.parameter.detach().flatten()) for x in logicals}


def test_every_parameter_is_listed_once_under_its_name():
    model = build_model(TINY, alone())
    logicals = logical_parameters(model)
    expected = dict(model.named_parameters())
    assert [x.name for x in logicals] == list(expected)
    for x in logicals:
        assert x.parameter is expected[x.name]
        assert (x.shape, x.offsets[0]) == (tuple(x.parameter.shape), 0)
    assert {"embed.weight", "head.weight", "layers.1.moe.experts.gate_up", "mtp.0.proj.weight"} <= expected.keys()


def test_tied_embeddings_are_one_parameter():
    logicals = logical_parameters(build_model(tiny_config(model={"tie_embeddings": True}), alone()))
    names = [x.name for x in logicals]
    assert "head.weight" not in names
    assert names.count("embed.weight") == 1


@pytest.mark.parametrize("mesh", [Mesh(ep=2), Mesh(ep=4), Mesh(dp=2, ep=2)], ids=str)
def test_a_rank_holds_its_part_of_what_one_process_holds(mesh: Mesh):
    complete = parts(Mesh(), 0)
    for rank in range(mesh.world):
        held = parts(mesh, rank)
        assert held.keys() == complete.keys()
        for name, (shape, offset, values) in held.items():
            assert shape == complete[name][0]
            assert torch.equal(values, complete[name][2][offset : offset + len(values)])
            share = mesh.ep if ".experts." in name else 1
            assert len(values) * share == prod(shape)
            assert offset == (mesh.coordinate(rank).ep * len(values) if share > 1 else 0)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_decay_applies_to_the_matrices_that_transform(depth: int, tied: bool):
    config = tiny_config(model={"tie_embeddings": tied, "mtp": MtpConfig(depth)})
    model = build_model(config, alone())
    spared = {"embed.weight"} | {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.RMSNorm)}
    logicals = logical_parameters(model)
    assert {x.name for x in logicals if not x.decays} == spared
    assert ("head.weight" in {x.name for x in logicals if x.decays}) is not tied
    assert "layers.1.moe.router.weight" in {x.name for x in logicals if x.decays}


def test_experts_and_fp32_weights():
    logicals = logical_parameters(build_model(TINY, alone()))
    assert {x.name for x in logicals if x.is_expert} == {x.name for x in logicals if ".experts." in x.name} != set()
    assert {x.name for x in logicals if x.keeps_fp32} == {x.name for x in logicals if ".router." in x.name} != set()


def test_the_planner_counts_the_same():
    model = build_model(TINY, alone())
    assert sum(x.parameter.numel() for x in logical_parameters(model)) == parameters(TINY.model).trained


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_with_those_who_hold_its_stage(name: str):
    """The values that one process has, and no parameter that only other stages use."""
    config = tiny_config(model={"num_layers": 4}, schedule={"pipeline": name})
    complete = {x.name: x.parameter for x in logical_parameters(build_model(config, alone()))}
    mesh = Mesh(2, 1, 1, layout(name, 2))
    found: dict[str, int] = {}
    for rank in range(2):
        model = build_model(config, groups_of(mesh, rank))
        assert (len(model.stages), model.own) == (mesh.stages.num_stages, mesh.stages.held[rank])
        for x in logical_parameters(model):
            assert torch.equal(x.parameter, complete[x.name])
            assert model.users(x.name)
            found[x.name] = found.get(x.name, 0) + 1
    assert found.keys() == complete.keys()
    twice = {key for key, ranks in found.items() if ranks == 2}
    # A V has both ends of the model on its first rank.
    folded = {"zb_v": set(), "dualpipev": set(), "dualpipe": set(complete)}
    assert twice == folded.get(name, {"embed.weight"})


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_at_both_ends_has_holders_of_its_own(depth: int, tied: bool):
    config = tiny_config(model={"tie_embeddings": tied, "mtp": MtpConfig(depth)})
    for joined in (True, False):
        # Names instead of groups: which one is asked for.
        groups = replace(alone(), data="data", expert_data="experts", embedding="ends" if joined else None)  # type: ignore[arg-type]
        found = {x.name: holders(x, groups) for x in logical_parameters(build_model(config, alone()))}
        at_both = joined and (tied or depth > 0)
        assert found.pop("embed.weight") == ("ends" if at_both else "data")
        assert {name: "experts" if ".experts." in name else "data" for name in found} == found


def test_a_listed_split_is_that_of_the_pipeline():
    config = tiny_config(model={"num_layers": 4}, schedule={"split": (1, 3)})
    staged = build_model(config, groups_of(Mesh(pp=2), 1))
    assert [stage.layers for stage in staged.stages] == [range(1), range(1, 4)]
    whole = build_model(config, alone())
    assert [stage.layers for stage in whole.stages] == [range(4)]
    assert hasattr(whole, "head")
