"""The layout that a machine has room for, and the rules of `dstrain plan`."""

from dataclasses import replace

import pytest

from dstrain.config.plan import (
    PlanRoot,
    SearchRoot,
    TraceRoot,
    ValidateRoot,
    changes,
    check_plan,
    check_search,
    check_trace,
    check_validate,
    devices,
    fitted,
)
from dstrain.config.schema import MeshConfig, TrainConfig
from dstrain.errors import ConfigError
from dstrain.hardware import named

H100, CPU = named("h100_sxm"), named("cpu")
CONFIG = PlanRoot(hardware=H100, train=TrainConfig(sequences=64))


def meshed(pp: int, ep: int, dp: int | None, nodes: int = 0) -> PlanRoot:
    return replace(CONFIG, mesh=MeshConfig(pp, ep, dp), hardware=replace(H100, nodes=nodes))


@pytest.mark.parametrize(
    ("mesh", "nodes", "expected"),
    [
        # As many devices as the mesh asks for, at least a node full.
        ((2, 4, 3), 0, (2, 4, 3)),
        ((2, 4, None), 0, (2, 4, 1)),
        ((1, 1, None), 0, (1, 1, 8)),
        ((2, 16, None), 0, (2, 16, 1)),
        # As many as the machine has.
        ((2, 4, None), 4, (2, 4, 4)),
        ((2, 4, 8), 2, (2, 4, 2)),
        ((4, 16, 1), 2, (4, 4, 1)),
        # Experts on a number of devices that divides both.
        ((3, 16, None), 3, (3, 8, 1)),
    ],
)
def test_a_mesh_that_fits(mesh: tuple[int, int, int | None], nodes: int, expected: tuple[int, int, int]):
    fit = fitted(meshed(*mesh, nodes))
    assert (fit.mesh.pp, fit.mesh.ep, fit.mesh.dp) == expected
    assert devices(fit) == fit.mesh.pp * fit.mesh.ep * (fit.mesh.dp or 0)


@pytest.mark.parametrize(
    ("mesh", "expected"), [((2, 4, None, 4), ""), ((4, 16, 1, 2), "mesh.ep=4"), ((2, 4, 8, 2), "mesh.dp=2")]
)
def test_what_was_changed(mesh: tuple[int, int, int | None, int], expected: str):
    given = meshed(*mesh)
    assert changes(given, fitted(given)) == expected


def test_layouts_that_pass():
    check_plan(CONFIG)
    check_plan(meshed(2, 4, None, 2))
    check_search(SearchRoot(hardware=replace(H100, nodes=2), train=TrainConfig(sequences=64), vary=("precision",)))
    check_trace(TraceRoot(hardware=H100, train=TrainConfig(sequences=64), out="a/step.json"))
    check_validate(ValidateRoot("runs.json", "errors.json"))


TRACE = TraceRoot(hardware=H100, train=TrainConfig(sequences=64), out="step.json")
SEARCH = SearchRoot(hardware=H100, train=TrainConfig(sequences=64))
WRONG = [
    (check_plan, replace(CONFIG, hardware=CPU), "hardware.peak_bf16_tflops"),
    (check_plan, meshed(1, 3, None), "mesh.ep"),
    (check_plan, meshed(3, 1, None, 1), "mesh.pp"),
    (check_plan, meshed(5, 1, 8), "mesh.pp"),
    (check_plan, replace(CONFIG, train=TrainConfig(sequences=63)), "train.sequences"),
    (check_plan, replace(CONFIG, hardware=replace(H100, nodes=-1)), "hardware.nodes"),
    (check_plan, replace(CONFIG, hardware=replace(H100, memory_gbytes_per_s=0.0)), "hardware.memory_gbytes_per_s"),
    (check_search, replace(SEARCH, top=0), "top"),
    (check_search, replace(SEARCH, vary=("speed",)), "vary"),
    (check_search, replace(SEARCH, hardware=CPU), "hardware.peak_bf16_tflops"),
    (check_trace, replace(TRACE, out=""), "out"),
    (check_trace, replace(TRACE, out="step.svg"), "out"),
    (check_validate, ValidateRoot(out="errors.txt"), "out"),
]


@pytest.mark.parametrize(("check", "config", "field"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_is_refused(check, config, field: str):
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.field == field


def test_a_search_needs_no_layout():
    """It is what is looked for."""
    check_search(replace(SEARCH, mesh=MeshConfig(5, 3, 7)))
