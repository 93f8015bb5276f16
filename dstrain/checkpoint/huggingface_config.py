"""config.json of DeepSeek-V2/V3 and our ModelConfig.

V3 scores experts by sigmoid, with a balancing bias and groups ranked by their two best; V2 by softmax, with groups
ranked by their best and weights as they are. transformers implements these two and nothing between, so the rest is
refused on the way out; on the way in, everything that would change a logit is either carried over or refused.
"""

import math
from typing import Any

from dstrain.checkpoint.blockwise import BLOCK
from dstrain.config.schema import ModelConfig, MtpConfig, RopeConfig, RouterConfig
from dstrain.errors import UserError
from dstrain.model.rope import temperature

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
MODEL_TYPE = {V2: "deepseek_v2", V3: "deepseek_v3"}

# Our field and theirs.
PLAIN = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}

# Their field and the only value that our model computes.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "rms_norm_eps": 1e-6,
}

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}

# Scales that are powers of two, as DeepSeek says it since V3.1.
UE8M0 = {"scale_fmt": "ue8m0"}


def limits_groups(router: RouterConfig) -> bool:
    return router.groups_per_token < router.num_groups


def architecture(model: ModelConfig) -> str:
    """The transformers class that computes this model; UserError with the reason where none does."""
    router, chosen = model.router, V3 if model.router.score == "sigmoid" else V2
    if model.norm_eps != FIXED["rms_norm_eps"]:
        # Their norms of the latents have it built in, whatever rms_norm_eps says.
        _refuse_export("norm_eps", model.norm_eps, f"{chosen} has 1e-6")
    if chosen == V3:
        if limits_groups(router) and router.group_score != "top2_sum":
            _refuse_export("router.group_score", router.group_score, f"{V3} ranks groups by top2_sum")
        if model.num_experts < 2 * router.num_groups:
            _refuse_export("router.num_groups", router.num_groups, f"{V3} needs two experts in a group")
    else:
        if limits_groups(router) and router.group_score != "max":
            _refuse_export("router.group_score", router.group_score, f"{V2} (softmax scores) ranks groups by max")
        if router.normalize_weights:
            _refuse_export("router.normalize_weights", True, f"{V2} (softmax scores) does not normalise")
        if model.mtp.depth:
            _refuse_export("mtp.depth", model.mtp.depth, f"{V2} (softmax scores) has no MTP modules")
        if model.hidden_size % model.num_heads:
            _refuse_export("num_heads", model.num_heads, f"{V2} wants a divisor of hidden_size={model.hidden_size}")
    return chosen


def _refuse_export(field: str, value: Any, reason: str) -> None:
    raise UserError(f"model.{field}={value} has no place in a Hugging Face model: {reason}. It cannot be exported.")


def to_json(
    model: ModelConfig, max_positions: int, eos: int | None, dtype: str, power_of_two: bool = False
) -> dict[str, Any]:
    """config.json as a dictionary. `dtype`: bfloat16 | float32 | fp8, with scales that are powers of two or not.
    UserError for what transformers can't compute."""
    chosen, router = architecture(model), model.router
    is_v3 = chosen == V3
    yarn = model.rope.yarn_factor > 1
    # In an all-dense model, an MTP layer is dense as well.
    is_dense = model.num_dense_layers >= model.num_layers
    fields = {theirs: getattr(model, ours) for ours, theirs in PLAIN.items()}
    fields |= {theirs: value for theirs, value in FIXED.items() if theirs != "rope_interleave" or is_v3}
    return fields | {
        "architectures": [chosen],
        "model_type": MODEL_TYPE[chosen],
        "num_key_value_heads": model.num_heads,
        "first_k_dense_replace": model.num_layers + model.mtp.depth if is_dense else model.num_dense_layers,
        "n_shared_experts": model.num_shared_experts,
        "scoring_func": router.score,
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if limits_groups(router) else "greedy",
        "n_group": router.num_groups,
        "topk_group": router.groups_per_token,
        "norm_topk_prob": router.normalize_weights,
        "routed_scaling_factor": router.scaling_factor,
        "num_nextn_predict_layers": model.mtp.depth,
        "max_position_embeddings": round(model.rope.original_seq_len * model.rope.yarn_factor)
        if yarn
        else max_positions,
        "rope_theta": model.rope.theta,
        "rope_scaling": _yarn_to_json(model.rope) if yarn else None,
        "bos_token_id": None,
        "eos_token_id": eos,
        "torch_dtype": "float32" if dtype == "float32" else "bfloat16",
        **({"quantization_config": FP8 | (UE8M0 if power_of_two else {})} if dtype == "fp8" else {}),
    }


def _yarn_to_json(rope: RopeConfig) -> dict[str, Any]:
    fields = {
        "type": "yarn",
        "factor": rope.yarn_factor,
        "original_max_position_embeddings": rope.original_seq_len,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }
    if not (rope.mscale and rope.mscale_all_dim):
        # transformers would take other terms than DeepSeek's own code where one of them is zero.
        fields["attention_factor"] = _gain(rope)
    return fields


def _gain(rope: RopeConfig) -> float:
    """What YaRN multiplies cosines and sines by."""
    return temperature(rope.yarn_factor, rope.mscale) / temperature(rope.yarn_factor, rope.mscale_all_dim)


def from_json(fields: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes; UserError names the field that ours cannot represent."""
    chosen = _known_architecture(fields)
    for name, value in FIXED.items():
        if fields.get(name, value) not in (value, None):
            _refuse(name, fields[name], f"dstrain computes {value} only")
    heads = _need(fields, "num_attention_heads")
    if fields.get("num_key_value_heads", heads) not in (heads, None):
        _refuse("num_key_value_heads", fields["num_key_value_heads"], "in MLA every head has its own keys and values")
    _check_quantization(fields.get("quantization_config"))
    depth = fields.get("num_nextn_predict_layers") or 0
    optional: dict[str, Any] = {
        "q_lora_rank": None,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    }
    plain: dict[str, Any] = {
        ours: fields.get(theirs, optional[theirs]) if theirs in optional else _need(fields, theirs)
        for ours, theirs in PLAIN.items()
    }
    return ModelConfig(
        **plain,
        num_dense_layers=_dense_layers(fields, depth),
        num_shared_experts=fields.get("n_shared_experts") or 0,
        rope=_rope(fields),
        router=_router_v3(fields) if chosen == V3 else _router_v2(fields),
        mtp=MtpConfig(depth=depth),
    )


def _refuse(field: str, value: Any, reason: str) -> None:
    raise UserError(f"config.json: {field}={value} cannot be imported: {reason}.")


def _need(fields: dict[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise UserError(f"config.json has no {name}, which a DeepSeek-V2/V3 model needs.")
    return fields[name]


def _known_architecture(fields: dict[str, Any]) -> str:
    by_type = {kind: name for name, kind in MODEL_TYPE.items()}
    named = fields.get("architectures") or [by_type.get(fields.get("model_type", ""))]
    if named[0] not in MODEL_TYPE:
        _refuse("architectures", named, f"only {V2} and {V3} can")
    return str(named[0])


def _check_quantization(quantization: dict[str, Any] | None) -> None:
    for name in ("quant_method", "weight_block_size"):
        if quantization and quantization.get(name) != FP8[name]:
            _refuse(f"quantization_config.{name}", quantization.get(name), f"only {FP8[name]} can")


def _dense_layers(fields: dict[str, Any], depth: int) -> int:
    layers, dense = _need(fields, "num_hidden_layers"), fields.get("first_k_dense_replace") or 0
    if depth and layers <= dense < layers + depth:
        _refuse("first_k_dense_replace", dense, "an MTP layer must be like the last layer of the model")
    return min(dense, layers)


def _router_v3(fields: dict[str, Any]) -> RouterConfig:
    if fields.get("scoring_func", "sigmoid") != "sigmoid":
        _refuse("scoring_func", fields["scoring_func"], f"{V3} scores by sigmoid")
    if fields.get("topk_method", "noaux_tc") != "noaux_tc":
        _refuse("topk_method", fields["topk_method"], f"{V3} chooses by noaux_tc")
    return RouterConfig(
        score="sigmoid",
        num_groups=fields.get("n_group") or 1,
        groups_per_token=fields.get("topk_group") or 1,
        group_score="top2_sum",
        normalize_weights=bool(_need(fields, "norm_topk_prob")),
        scaling_factor=_need(fields, "routed_scaling_factor"),
    )


def _router_v2(fields: dict[str, Any]) -> RouterConfig:
    if fields.get("scoring_func", "softmax") != "softmax":
        _refuse("scoring_func", fields["scoring_func"], f"{V2} scores by softmax")
    if fields.get("norm_topk_prob"):
        # DeepSeek's own code normalises then and drops the scaling factor; transformers does neither.
        _refuse("norm_topk_prob", True, f"implementations of {V2} disagree on what it means")
    method = fields.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        _refuse("topk_method", method, f"{V2} chooses by greedy or group_limited_greedy")
    has_groups = method == "group_limited_greedy"
    return RouterConfig(
        score="softmax",
        num_groups=_need(fields, "n_group") if has_groups else 1,
        groups_per_token=_need(fields, "topk_group") if has_groups else 1,
        group_score="max",
        normalize_weights=False,
        scaling_factor=_need(fields, "routed_scaling_factor"),
        # V2 has no balancing bias.
        bias_update_rate=0.0,
    )


def _rope(fields: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters; before, rope_theta and rope_scaling stood apart.
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        _refuse("rope_scaling.type", kind, "dstrain knows default and yarn")
    if given.get("truncate", True) is not True:
        _refuse("rope_scaling.truncate", given["truncate"], "dstrain computes true only")
    rope = RopeConfig(
        theta=theta,
        yarn_factor=float(_need(given, "factor")),
        original_seq_len=int(given.get("original_max_position_embeddings") or _need(fields, "max_position_embeddings")),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        mscale=float(given.get("mscale", 1.0)),
        mscale_all_dim=float(given.get("mscale_all_dim", 0.0)),
    )
    _check_gain(rope, given.get("attention_factor"))
    return rope


def _check_gain(rope: RopeConfig, attention_factor: float | None) -> None:
    both = rope.mscale and rope.mscale_all_dim
    theirs = attention_factor or (_gain(rope) if both else temperature(rope.yarn_factor, 1.0))
    if not math.isclose(theirs, _gain(rope), rel_tol=1e-6):
        _refuse("rope_scaling.attention_factor", theirs, f"mscale and mscale_all_dim make it {_gain(rope)}")
