"""The absorbed form is the training form, whatever the order in which tokens arrive."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dstrain.config.schema import ModelConfig
from dstrain.inference.attention import cached_attention
from dstrain.inference.cache import LatentCache
from dstrain.inference.generate import advance
from dstrain.model.attention import Attention
from dstrain.model.rope import rotation
from dstrain.model.transformer import Transformer
from tests.inference.models import BASE, VARIANTS, YARN, build, random_tokens

LENGTH = 40
CHUNKS = {"one by one": [1] * LENGTH, "prompt, then one by one": [17] + [1] * 23, "chunks": [1, 9, 2, 13, 1, 14]}


def logits_in_chunks(model: Transformer, tokens_BT: Tensor, chunks: list[int]) -> Tensor:
    weight = model.embed.weight
    cache = LatentCache(model.config, len(tokens_BT), tokens_BT.shape[1], dtype=weight.dtype, device=weight.device)
    parts = [model.scores(advance(model, chunk, cache)) for chunk in tokens_BT.split(chunks, dim=1)]
    assert cache.length == tokens_BT.shape[1]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def worst_relative_error(model: Transformer, chunks: list[int]) -> float:
    tokens_BT = random_tokens(model.config, sequences=2, count=LENGTH)
    expected = model.logits(tokens_BT)
    assert expected.std() > 0.5, "logits so small would hide any mistake"
    return float((logits_in_chunks(model, tokens_BT, chunks) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", CHUNKS)
def test_logits_equal_those_of_training_at_every_position(variant: str, order: str) -> None:
    assert worst_relative_error(build(VARIANTS[variant]), CHUNKS[order]) < 1e-5


@pytest.mark.parametrize("order", CHUNKS)
def test_in_double_precision_the_forms_differ_by_rounding_only(order: str) -> None:
    # Routers compute in FP32 always, hence dense layers.
    model = build(replace(BASE, q_lora_rank=24, rope=YARN, num_dense_layers=BASE.num_layers)).double()
    assert worst_relative_error(model, CHUNKS[order]) < 1e-13


@torch.no_grad()
def test_in_bf16_it_is_as_exact_as_training() -> None:
    model = build(replace(BASE, num_dense_layers=BASE.num_layers)).bfloat16()
    tokens_BT = random_tokens(model.config, sequences=4, count=LENGTH)
    trained, absorbed = model.logits(tokens_BT), logits_in_chunks(model, tokens_BT, CHUNKS["one by one"])
    exact = model.float().logits(tokens_BT)
    assert (absorbed - exact).norm() < 1.1 * (trained - exact).norm()


@torch.no_grad()
def test_a_token_sees_those_of_its_own_chunk_but_not_the_later_ones() -> None:
    config = replace(BASE, rope=YARN)
    attn = Attention(config).double()
    x_BTD = torch.randn(1, 12, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 9] += 1
    before, after = (attend_in_two(attn, config, x, 5) for x in (x_BTD, changed_BTD))
    assert torch.equal(before[:, :9], after[:, :9])
    assert ((before - after)[:, 9:].abs().amax(-1) > 1e-6).all()


def attend_in_two(attn: Attention, config: ModelConfig, x_BTD: Tensor, first: int) -> Tensor:
    cache = LatentCache(config, len(x_BTD), x_BTD.shape[1], dtype=x_BTD.dtype, device="cpu")
    parts = []
    for chunk_BTD in x_BTD.split((first, x_BTD.shape[1] - first), dim=1):
        parts.append(cached_attention(attn, chunk_BTD, *cache.rotation(chunk_BTD.shape[1]), cache, layer=0))
        cache.length += chunk_BTD.shape[1]
    positions_T = torch.arange(x_BTD.shape[1])
    expected = attn(x_BTD, *rotation(positions_T, config.qk_rope_head_dim, config.rope))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-12, atol=1e-13)
    return torch.cat(parts, dim=1)
