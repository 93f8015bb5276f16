"""Which modules compute in FP8, by name."""

from dataclasses import replace

import pytest
import torch

from dstrain.config.schema import Config, MeshConfig
from dstrain.errors import ConfigError
from dstrain.mesh.groups import Place, connect, disconnect, mesh_of
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import build_model
from dstrain.parallel.precision import modules_in_fp8
from tests.tiny import tiny_config

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
