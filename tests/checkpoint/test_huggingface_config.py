"""config.json both ways: everything that changes a logit is carried over or refused."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config

from dstrain.checkpoint.huggingface_config import from_json, to_json
from dstrain.config.schema import ModelConfig, MtpConfig, RopeConfig, RouterConfig
from dstrain.errors import UserError
from tests.checkpoint.huggingface_cases import MODELS, V2, V3, WITH_MTP

# config.json of deepseek-ai/DeepSeek-V3, as far as it says what is computed.
RELEASED_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_released_v3_is_understood() -> None:
    assert from_json(RELEASED_V3) == ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_layers=61,
        num_dense_layers=3,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_experts=256,
        num_shared_experts=1,
        experts_per_token=8,
        init_std=0.02,
        rope=RopeConfig(yarn_factor=40.0),
        router=RouterConfig(num_groups=8, groups_per_token=4, scaling_factor=2.5),
        mtp=MtpConfig(depth=1),
    )


def test_export_says_what_the_released_v3_says() -> None:
    written = to_json(from_json(RELEASED_V3), max_positions=1, eos=1, dtype="fp8")
    for name in RELEASED_V3.keys() - {"aux_loss_alpha"}:
        assert written[name] == RELEASED_V3[name], name


@pytest.mark.parametrize("case", [*MODELS, "mtp", "dense_mtp"])
def test_a_model_survives_the_round_trip(case: str) -> None:
    model = MODELS.get(case, WITH_MTP)
    if case == "dense_mtp":
        model = replace(model, num_dense_layers=3)
    written = to_json(model, max_positions=4096, eos=None, dtype="bfloat16")
    back = from_json(written)
    # How far a group ranking goes that limits nothing, and the training recipe, have no place in config.json.
    assert replace(back, router=model.router) == model
    recipe = {"bias_update_rate": model.router.bias_update_rate, "group_score": model.router.group_score}
    assert replace(back.router, **recipe) == model.router


@pytest.mark.parametrize(("case", "theirs"), [("v3_yarn", DeepseekV3Config), ("v2_limited", DeepseekV2Config)])
def test_what_transformers_writes_is_understood(case: str, theirs: type) -> None:
    fields = to_json(MODELS[case], max_positions=128, eos=1, dtype="float32")
    rewritten = theirs(**fields).to_dict()
    assert "rope_parameters" in rewritten
    assert from_json(rewritten | {"architectures": fields["architectures"]}) == from_json(fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("moe_layer_freq", 2),
        ("rope_interleave", False),
        ("rms_norm_eps", 1e-5),
        ("num_key_value_heads", 8),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("first_k_dense_replace", 61),
        ("architectures", ["DeepseekV32ForCausalLM"]),
        ("rope_scaling.type", "linear"),
        ("rope_scaling.attention_factor", 1.3),
        ("rope_scaling.truncate", False),
        ("quantization_config.quant_method", "gptq"),
        ("quantization_config.weight_block_size", [64, 64]),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(field: str, value: Any) -> None:
    fields, (outer, _, inner) = dict(RELEASED_V3), field.partition(".")
    fields[outer] = {**fields[outer], inner: value} if inner else value
    with pytest.raises(UserError, match=f"{field}="):
        from_json(fields)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match="no kv_lora_rank"):
        from_json({name: value for name, value in RELEASED_V3.items() if name != "kv_lora_rank"})


def test_v2_that_normalises_is_refused() -> None:
    fields = to_json(V2, max_positions=128, eos=None, dtype="float32")
    with pytest.raises(UserError, match="norm_topk_prob=True"):
        from_json(fields | {"norm_topk_prob": True})


def test_one_temperature_of_yarn_means_what_deepseek_computes() -> None:
    # Without mscale_all_dim, transformers takes mscale for 1 whatever it is.
    scaling = {**RELEASED_V3["rope_scaling"], "mscale": 1.0}
    del scaling["mscale_all_dim"]
    assert from_json(RELEASED_V3 | {"rope_scaling": scaling}).rope.mscale_all_dim == 0.0
    with pytest.raises(UserError, match="attention_factor"):
        from_json(RELEASED_V3 | {"rope_scaling": {**scaling, "mscale": 0.5}})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"router": replace(V2.router, normalize_weights=True)}, "normalize_weights"),
        ({"router": replace(V2.router, num_groups=4, groups_per_token=1, group_score="top2_sum")}, "group_score"),
        ({"router": replace(V3.router, num_groups=4, groups_per_token=1, group_score="max")}, "group_score"),
        ({"router": replace(V3.router, num_groups=8, groups_per_token=8)}, "num_groups"),
        ({"router": V2.router, "mtp": MtpConfig(depth=1)}, "mtp.depth"),
        ({"router": V2.router, "num_heads": 6}, "num_heads"),
    ],
)
def test_what_transformers_cannot_compute_is_not_exported(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"{field}=.*cannot be exported"):
        to_json(replace(V3, **change), max_positions=128, eos=None, dtype="bfloat16")
