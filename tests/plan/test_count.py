"""Published sizes and costs are the oracles."""

from dataclasses import replace

import pytest
import torch

from dstrain.config.load import compose
from dstrain.config.schema import ModelConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.errors import ConfigError
from dstrain.model.transformer import Transformer
from dstrain.plan.count import (
    cache_bytes_per_token,
    cache_values_per_token,
    flops_per_token,
    parameters,
    rank_state_gib,
)


def model(name: str) -> ModelConfig:
    return compose("verify", [f"model={name}"]).model


def test_deepseek_v3():
    counted = parameters(model("deepseek_v3"))
    assert counted.total == 671_026_404_352  # without the 58 * 256 balancing biases
    assert counted.active == pytest.approx(37.55e9, rel=1e-3)
    assert counted.mtp == pytest.approx(11.6e9, rel=1e-2)
    assert counted.trained == counted.total + counted.mtp


def test_deepseek_v3_flops_and_cache():
    v3 = model("deepseek_v3")
    assert round(flops_per_token(v3, 4096, mtp=False) / 1e9, 2) == 250.46
    assert cache_values_per_token(v3) == 576
    assert cache_bytes_per_token(v3) == 70_272


@pytest.mark.parametrize(
    ("name", "total", "active"), [("deepseek_v2", 236e9, 21e9), ("deepseek_v2_lite", 15.7e9, None)]
)
def test_deepseek_v2(name: str, total: float, active: float | None):
    counted = parameters(model(name))
    assert counted.total == pytest.approx(total, rel=2e-3)
    if active:
        assert counted.active == pytest.approx(active, rel=2e-2)


def test_deepseek_v2_flops():
    """155 GFLOP per token: arXiv:2505.09343, table 2."""
    assert flops_per_token(model("deepseek_v2"), 4096) / 1e9 == pytest.approx(155, abs=0.5)


VARIANTS = [
    {},
    {"tie_embeddings": True, "num_shared_experts": 2},
    {"q_lora_rank": 24, "num_dense_layers": 0},
    {"mtp": replace(ModelConfig().mtp, depth=2)},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_counts_what_the_model_has(changes: dict):
    config = replace(ModelConfig(), vocab_size=320, hidden_size=48, num_layers=3, **changes)
    with torch.device("meta"):
        built = Transformer(config, range(16), LocalDispatcher(16))
    counted = parameters(config)
    by_part = {name: p.numel() for name, p in built.named_parameters()}
    assert counted.trained == sum(by_part.values())
    assert counted.mtp == sum(n for name, n in by_part.items() if name.startswith("mtp."))
    assert counted.routed_experts + counted.mtp_routed_experts == sum(n for k, n in by_part.items() if ".experts." in k)


def test_mtp_costs_a_module_and_the_shared_head():
    base = replace(ModelConfig(), vocab_size=320)
    with_mtp = replace(base, mtp=replace(base.mtp, depth=1))
    added = flops_per_token(with_mtp, 256) - flops_per_token(base, 256)
    assert flops_per_token(with_mtp, 256, mtp=False) == flops_per_token(base, 256)
    assert added > 6 * (2 * base.hidden_size**2 + base.hidden_size * 320)


def test_memory_of_the_recipes():
    """The figures in the comments of conf/experiment."""
    lite, small = model("deepseek_v2_lite"), model("small")
    assert rank_state_gib(lite, ep=8, dp=1) == pytest.approx(32.0, abs=0.1)
    assert rank_state_gib(lite, ep=8, dp=4) == pytest.approx(21.0, abs=0.1)
    assert rank_state_gib(lite, ep=8, dp=8) == pytest.approx(19.2, abs=0.1)
    assert rank_state_gib(small, ep=1, dp=8) == pytest.approx(12.6, abs=0.1)


def test_needs_a_vocabulary():
    with pytest.raises(ConfigError, match="model.vocab_size"):
        parameters(ModelConfig())
