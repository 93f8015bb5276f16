"""The rules of model.*, which need nothing else of a config."""

from dstrain.config.rules import above_zero, at_least, near, need, one_of
from dstrain.config.schema import ModelConfig


def check_model(model: ModelConfig) -> None:
    at_least(model, 1, "hidden_size", "num_layers", "num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    at_least(model, 1, "qk_rope_head_dim", "intermediate_size", "moe_intermediate_size", "num_experts")
    at_least(model, 0, "num_dense_layers", "num_shared_experts", "mtp.depth", "mtp.loss_weight")
    for name in ("vocab_size", "q_lora_rank"):
        if getattr(model, name) is not None:
            at_least(model, 1, name)
    above_zero(model, "norm_eps", "init_std", "rope.theta")
    need(
        model.num_dense_layers <= model.num_layers,
        ("model.num_dense_layers", model.num_dense_layers),
        f"it can't exceed model.num_layers={model.num_layers}",
        "Make it smaller.",
    )
    need(
        model.qk_rope_head_dim % 2 == 0,
        ("model.qk_rope_head_dim", model.qk_rope_head_dim),
        "rotary positions turn pairs of dimensions, so it must be even",
        f"Set it to {model.qk_rope_head_dim + 1}.",
    )
    # The kernel for many experts reads whole 16 bytes; rotary pairs begin at even places.
    for name, unit in (("hidden_size", 8), ("moe_intermediate_size", 8), ("qk_nope_head_dim", 2), ("kv_lora_rank", 2)):
        value = getattr(model, name)
        rule = f"it must be a multiple of {unit}"
        need(value % unit == 0, (f"model.{name}", value), rule, f"Set it to {near(value, unit)}.")
    _check_rope(model)
    _check_router(model)


def _check_rope(model: ModelConfig) -> None:
    rope = model.rope
    at_least(model, 1, "rope.yarn_factor", "rope.original_seq_len")
    need(
        rope.beta_fast > rope.beta_slow > 0,
        ("model.rope.beta_fast", rope.beta_fast),
        f"it must be above model.rope.beta_slow={rope.beta_slow}, and both above 0",
        "32 and 1 are usual.",
    )


def _check_router(model: ModelConfig) -> None:
    router, experts = model.router, model.num_experts
    one_of(model, "router.score", "sigmoid", "softmax")
    one_of(model, "router.group_score", "top2_sum", "max")
    at_least(model, 1, "experts_per_token", "router.num_groups", "router.groups_per_token")
    at_least(model, 0, "router.bias_update_rate", "router.balance_loss_weight", "router.z_loss_weight")
    above_zero(model, "router.scaling_factor")
    groups = ("model.router.num_groups", router.num_groups)
    need(experts % router.num_groups == 0, groups, f"it must divide model.num_experts={experts}", "Use equal groups.")
    need(
        router.groups_per_token <= router.num_groups,
        ("model.router.groups_per_token", router.groups_per_token),
        f"a token can't use more than model.router.num_groups={router.num_groups} groups",
        "Make it smaller.",
    )
    size = experts // router.num_groups
    need(
        router.num_groups == 1 or router.group_score == "max" or size >= 2,
        groups,
        "group_score=top2_sum needs two experts in a group",
        "Use fewer groups, or group_score=max.",
    )
    allowed = router.groups_per_token * size
    need(
        model.experts_per_token <= allowed,
        ("model.experts_per_token", model.experts_per_token),
        f"a token may choose among {allowed} experts ({router.groups_per_token} of {router.num_groups} groups)",
        f"Set it to at most {allowed}, or raise model.router.groups_per_token.",
    )
