"""The layer table of ARCHITECTURE.md is true. Imports inside functions count like any other."""

import graphlib

import pytest

from tests.rules.tree import imports, layers, modules, unit

# The entry point stands above the table; packages without a row of their own have nothing in `__init__.py`.
MODULES = [name for name in modules() if unit(name) is not None]


def test_table_is_read():
    assert {layer for layer, _ in layers().values()} == {0, 1, 2, 3, 4, 5}


def test_every_module_has_a_layer():
    packages = {name.rpartition(".")[0] for name in modules()}
    assert [name for name in modules() if unit(name) is None and name not in packages] in ([], ["dstrain.__main__"])


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str):
    own = unit(module)
    targets = {name: unit(name) for name in imports(module) if name.startswith("dstrain.")}
    wrong = [name for name, target in targets.items() if target != own and layers()[target] >= layers()[own]]
    assert not wrong, f"{module} ({own}, layer {layers()[own][0]}) imports {wrong}"


def test_no_cycles():
    graph = {name: [target for target in imports(name) if target in modules()] for name in modules()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [name for name in MODULES if layers()[unit(name)][0] == 0])
def test_layer_0_needs_no_torch(module: str):
    assert not [name for name in imports(module) if name.split(".")[0] == "torch"]


def test_model_knows_no_processes():
    reached, waiting = set(), {name for name in MODULES if unit(name) == "model"}
    while waiting:
        reached |= waiting
        waiting = {target for name in waiting for target in imports(name) if target in modules()} - reached
    wrong = [(name, target) for name in reached for target in imports(name) if target.startswith("torch.distributed")]
    assert not wrong
