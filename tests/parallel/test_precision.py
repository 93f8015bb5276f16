"""Which modules compute in FP8, by name."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dstrain.config.schema import Config, MeshConfig
from dstrain.errors import ConfigError
from dstrain.mesh.groups import Place, connect, disconnect, mesh_of
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import build_model
from dstrain.parallel.precision import modules_in_fp8, product_names
from dstrain.precision.formats import E4M3, E5M6
from dstrain.precision.products import Products
from dstrain.precision.tensor import QuantizedTensor
from tests.tiny import alone, samples, tiny_config

META = torch.device("meta")


def stage(config: Config, pp: int) -> Transformer:
    """What a rank of the pipeline holds, without memory."""
    mesh = mesh_of(config)
    groups = connect(mesh, Place(mesh.rank(pp, 0, 0), mesh.world, META))
    try:
        return build_model(config, groups)
    finally:
        disconnect()


def in_two_stages(*exclude: str) -> Config:
    config = tiny_config(precision={"products": "fp8", "exclude": exclude}, schedule={"pipeline": "1f1b"})
    return replace(config, mesh=MeshConfig(2, 1, 1))


def test_every_linear_but_the_head_and_all_experts():
    config = replace(in_two_stages(), mesh=MeshConfig(1, 1, 1))
    names = modules_in_fp8(stage(config, 0), config.precision).keys()
    assert {"layers.0.mlp.down", "layers.1.attn.o", "layers.1.moe.experts", "layers.1.moe.shared.gate_up"} <= names
    assert not {name for name in names if "router" in name or name in ("embed", "head")}


def test_a_pattern_may_name_what_another_stage_holds():
    config = in_two_stages("layers.0.*", "*.moe.experts")
    found = [modules_in_fp8(stage(config, pp), config.precision).keys() for pp in range(2)]
    assert not {name for name in found[0] if name.startswith("layers.0.")}
    assert {name for name in found[1] if name.startswith("layers.1.attn.")}
    assert not {name for names in found for name in names if name.endswith("experts")}


def test_a_pattern_that_names_nothing_is_refused_on_every_stage():
    config = in_two_stages("layers.7.*")
    for pp in range(2):
        with pytest.raises(ConfigError, match=r"layers\.7\.\*: no module that computes in fp8 .* layers\.0\.attn"):
            modules_in_fp8(stage(config, pp), config.precision)


@pytest.mark.parametrize("name", ["head", "embed", "layers.1.moe.router", "layers.0.attn.q_a_norm"])
def test_what_never_computes_in_fp8_need_not_be_excluded(name: str):
    with pytest.raises(ConfigError, match="no module that computes in fp8"):
        modules_in_fp8(stage(in_two_stages(name), 0), in_two_stages(name).precision)


def built(*exclude: str, **precision: str) -> Transformer:
    return build_model(tiny_config(precision={"products": "fp8", "exclude": exclude} | precision), alone())


def test_every_parameter_has_a_product_of_its_name():
    model = built("layers.0.*")
    found = {f"{name}.{part}": x for name, m in model.named_modules() for part, x in (products(m) or {}).items()}
    assert {x.name for x in found.values()} == found.keys()
    assert {name for name in product_names(model) if not name.startswith("layers.0.")} == found.keys()
    outputs = {name for name in found if name.endswith(".attn.o.weight")}
    assert {name for name, x in found.items() if x.keeps is E5M6} == outputs
    assert len(outputs) == 2
    assert all(x.keeps is E4M3 and x.watch is model.watch for name, x in found.items() if name not in outputs)


def products(module: nn.Module) -> dict[str, Products] | None:
    return getattr(module, "products", None)


def test_names_are_those_of_all_stages_from_the_first_on():
    names = product_names(stage(in_two_stages(), 1))
    assert names == product_names(built())
    assert names.index("layers.0.mlp.down.weight") < names.index("layers.1.attn.o.weight")
    assert not [name for name in names if name.startswith("head")]


def test_without_fp8_no_module_has_products():
    assert not any(products(module) for module in build_model(tiny_config(), alone()).modules())


def seen(model: Transformer, name: str) -> Tensor:
    """The input of a module."""
    found: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    model(samples(tiny_config(), 0, 2), 2)
    return found[0]


@pytest.mark.parametrize("model", [{}, {"q_lora_rank": None}], ids=str)
def test_what_is_excluded_gets_its_input_as_it_is(model: dict[str, None]):
    """Though another module takes the same input in FP8."""
    query = "q" if model else "q_a"
    for excluded, other in ((query, "kv_a"), ("kv_a", query)):
        config = tiny_config(model=model, precision={"products": "fp8", "exclude": (f"*.attn.{excluded}",)})
        for name in (excluded, other):
            assert not isinstance(seen(build_model(config, alone()), f"layers.0.attn.{name}"), QuantizedTensor)
    config = tiny_config(model=model, precision={"products": "fp8"})
    for name in (query, "kv_a"):
        assert isinstance(seen(build_model(config, alone()), f"layers.0.attn.{name}"), QuantizedTensor)
