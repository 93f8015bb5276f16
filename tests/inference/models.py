"""Tiny models whose attention is far from uniform, in the variants that inference must not get wrong."""

from dataclasses import replace

import torch

from dstrain.config.schema import ModelConfig, MtpConfig, RopeConfig, RouterConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.model.init import init_weights
from dstrain.model.transformer import Transformer

BASE = ModelConfig(
    vocab_size=96,
    hidden_size=48,
    num_layers=3,
    num_heads=3,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    intermediate_size=64,
    moe_intermediate_size=24,
    num_experts=8,
    experts_per_token=2,
    init_std=0.3,
    router=RouterConfig(scaling_factor=2.5),
)
YARN = RopeConfig(yarn_factor=4.0, original_seq_len=16, beta_fast=2.0, mscale=0.7)

VARIANTS = {
    "full-rank queries": BASE,
    "compressed queries": replace(BASE, q_lora_rank=24),
    "YaRN": replace(BASE, rope=YARN),
    "compressed queries, YaRN, MTP, groups, tied": replace(
        BASE,
        q_lora_rank=24,
        rope=YARN,
        mtp=MtpConfig(depth=1),
        router=RouterConfig(num_groups=4, groups_per_token=2),
        tie_embeddings=True,
    ),
}


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config, range(config.num_experts), LocalDispatcher(config.num_experts))
    init_weights(model, seed)
    for _, router in model.routers():
        router.bias.copy_(torch.linspace(-0.1, 0.1, config.num_experts))
    return model


def random_tokens(config: ModelConfig, sequences: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size or 1, (sequences, count), generator=generator)
