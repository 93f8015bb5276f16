from dataclasses import replace

import pytest
import torch

from dstrain.config.schema import ModelConfig
from dstrain.inference.cache import LatentCache
from dstrain.inference.generate import advance
from dstrain.plan.count import cache_bytes_per_token
from tests.inference.models import BASE, VARIANTS, build, random_tokens

V3 = ModelConfig(num_layers=61, kv_lora_rank=512, qk_rope_head_dim=64)


@pytest.mark.parametrize("config", [V3, *VARIANTS.values()])
def test_bytes_per_token_are_those_of_the_plan(config: ModelConfig) -> None:
    cache = LatentCache(config, 2, 8, dtype=torch.bfloat16, device="meta")
    assert cache.bytes_per_token == cache_bytes_per_token(config)


def test_deepseek_v3_keeps_70272_bytes_per_token() -> None:
    assert LatentCache(V3, 1, 8, dtype=torch.bfloat16, device="meta").bytes_per_token == 70_272


def test_a_wider_dtype_counts() -> None:
    double = LatentCache(BASE, 1, 8, dtype=torch.float32, device="meta").bytes_per_token
    assert double == 3 * (20 + 8) * 4


def test_tokens_beyond_its_room_are_refused_and_leave_it_as_it_was() -> None:
    model = build(replace(BASE, num_layers=1))
    cache = LatentCache(model.config, 1, 4, dtype=torch.float32, device="cpu")
    advance(model, random_tokens(BASE, 1, 3), cache)
    with pytest.raises(ValueError, match=r"room for 4 tokens; 3 \+ 2 do not fit"):
        advance(model, random_tokens(BASE, 1, 2), cache)
    assert cache.length == 3
