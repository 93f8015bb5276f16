"""Published sizes of models, and what plan.count counts for those that dstrain builds."""

from dataclasses import replace

import pytest

from dstrain.config.load import compose
from dstrain.config.schema import ModelConfig
from dstrain.plan import count
from dstrain.plan.architecture import Architecture
from dstrain.plan.published import read

BASE = replace(ModelConfig(), vocab_size=320, hidden_size=48, num_layers=3)
CONFIGS = {
    "deepseek_v3": compose("verify", ["model=deepseek_v3"]).model,
    "deepseek_v2": compose("verify", ["model=deepseek_v2"]).model,
    "deepseek_v2_lite": compose("verify", ["model=deepseek_v2_lite"]).model,
    "plain": BASE,
    "tied": replace(BASE, tie_embeddings=True, num_shared_experts=2),
    "q_lora": replace(BASE, q_lora_rank=24, num_dense_layers=0),
    "dense": replace(BASE, num_dense_layers=3),
    "mtp": replace(BASE, mtp=replace(BASE.mtp, depth=2)),
}

# Billions of parameters, and those that a token uses (both embedding tables included), as their makers publish them.
SIZES = {
    "llama3-8b": (8.03, 8.03),
    "llama3-70b": (70.6, 70.6),
    "llama3-405b": (405.9, 405.9),
    "nemotron-15b": (15.6, 15.6),
    "nemotron-340b": (341, 341),
    "gpt3-175b": (175, 175),
    "mt-530b": (530, 530),
    "mpt-7b": (6.65, 6.65),
    "mpt-30b": (30.0, 30.0),
    "mixtral-8x22b": (140.6, 39.1),
    "qwen3-235b": (235.1, 22.2),
    "qwen3-30b": (30.5, 3.35),
    "grok1": (314, None),
    "dsv3": (671.03, 37.55),
    "dsv3-nomtp": (671.03, 37.55),
}
MODELS = {row.model.name: row.model for row in read()}


def test_deepseek_v3():
    assert MODELS["dsv3"].total == 671_026_404_352
    assert Architecture.of(CONFIGS["deepseek_v3"]).total == 671_026_404_352


@pytest.mark.parametrize("name", sorted(SIZES.keys() & MODELS.keys()))
def test_published_sizes(name: str):
    model, (total, active) = MODELS[name], SIZES[name]
    assert model.total / 1e9 == pytest.approx(total, rel=8e-3)
    if active is not None:
        embedding = 0 if model.tied else model.embedding_weights
        assert (model.active + embedding) / 1e9 == pytest.approx(active, rel=5e-3)


def test_sizes_are_those_of_models_in_rows():
    """Or the test above would look at less and less."""
    assert len(SIZES.keys() & MODELS.keys()) >= 12


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_count_of_a_config(name: str):
    config, counted = CONFIGS[name], count.parameters(CONFIGS[name])
    model = Architecture.of(config)
    assert model.total == counted.total
    assert model.flops_per_token(512) == count.flops_per_token(config, 512)
    # A look-up multiplies nothing, and norms hardly anything; a tied embedding is also the head.
    assert model.active == counted.active - counted.norms - (0 if config.tie_embeddings else counted.embedding)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_is_the_sum_of_its_matrices(name: str):
    config = CONFIGS[name]
    model = Architecture.of(config)
    assert model.attention_weights == count.attention_weights(config)
    assert model.expert_weights == count.expert_weights(config)
    shared = config.num_shared_experts * count.expert_weights(config)
    assert model.moe_dense_weights == shared + config.num_experts * config.hidden_size


def test_grouped_queries():
    """Llama 3 8B: queries and output of 4096 x 4096, keys and values of 8 heads of 128, three matrices of 14336."""
    model = MODELS["llama3-8b"]
    assert model.attention_weights == 2 * 4096**2 + 2 * 4096 * 8 * 128
    assert model.ffn_weights(model.ffn) == 3 * 4096 * 14336
    assert replace(model, gated=False).ffn_weights(model.ffn) == 2 * 4096 * 14336
    assert not model.is_mla
    assert model.moe_layers == 0


def test_flops_of_a_dense_model():
    """6 for each weight of a matrix, and attention over half of the positions: 12 for each value of a layer's heads."""
    model, seq_len = MODELS["llama3-8b"], 8192
    matrices = 32 * (model.attention_weights + 3 * 4096 * 14336) + 128256 * 4096
    assert model.flops_per_token(seq_len) == pytest.approx(6 * matrices + 12 * 32 * 4096 * (seq_len + 1) / 2)
