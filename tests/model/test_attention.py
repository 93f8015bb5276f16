"""MLA against attention written out position by position, with rotations as complex numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dstrain.config.schema import ModelConfig, RopeConfig
from dstrain.model.attention import Attention, causal_attention
from dstrain.model.rope import rotation

FULL_RANK = ModelConfig(
    hidden_size=24, num_heads=3, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, norm_eps=1e-3
)
MODELS = {
    "full_rank": FULL_RANK,
    "compressed": replace(FULL_RANK, q_lora_rank=8),
    "wide_values": replace(FULL_RANK, v_head_dim=12),
    "yarn": replace(FULL_RANK, rope=RopeConfig(yarn_factor=8.0, original_seq_len=16, mscale=1.0, mscale_all_dim=0.5)),
}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, angles: Tensor, gain: float) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.full_like(angles, gain), angles)).flatten(-2)


def written_out(attention: Attention, model: ModelConfig, x: Tensor) -> Tensor:
    """One sequence [T, D] through the equations of DeepSeek-V2, section 2.1."""
    w = {name: parameter.detach() for name, parameter in attention.named_parameters()}
    cos, sin = (part.double() for part in rotation(torch.arange(len(x)), model.qk_rope_head_dim, model.rope))
    angles, gain = torch.atan2(sin, cos), torch.hypot(cos, sin)[0, 0].item()
    c = norm((x @ w["kv_a.weight"].T)[:, :10], w["kv_a_norm.weight"], model.norm_eps)
    k_rope = turn((x @ w["kv_a.weight"].T)[:, 10:], angles, gain)
    if model.q_lora_rank is None:
        q_all = x @ w["q.weight"].T
    else:
        q_all = norm(x @ w["q_a.weight"].T, w["q_a_norm.weight"], model.norm_eps) @ w["q_b.weight"].T
    q_width, kv_width = 6 + 4, 6 + model.v_head_dim
    outputs = []
    for head in range(3):
        q = q_all[:, head * q_width : (head + 1) * q_width]
        kv = (c @ w["kv_b.weight"].T)[:, head * kv_width : (head + 1) * kv_width]
        scores = q[:, :6] @ kv[:, :6].T + turn(q[:, 6:], angles, gain) @ k_rope.T
        future = torch.ones(len(x), len(x)).triu(1).bool()
        probabilities = (scores * attention.scale).masked_fill(future, -torch.inf).softmax(-1)
        outputs.append(probabilities @ kv[:, 6:])
    return torch.cat(outputs, dim=-1) @ w["o.weight"].T


def random_attention(model: ModelConfig) -> Attention:
    torch.manual_seed(3)
    attention = Attention(model).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.4)
    return attention


@pytest.mark.parametrize("case", MODELS)
def test_attention_is_the_equations_written_out(case: str) -> None:
    model, attention = MODELS[case], random_attention(MODELS[case])
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    out = attention(x, *rotation(torch.arange(21), 4, model.rope))
    for sequence in range(2):
        torch.testing.assert_close(out[sequence], written_out(attention, model, x[sequence]), rtol=1e-5, atol=1e-6)


def test_no_position_sees_a_later_one() -> None:
    attention = random_attention(FULL_RANK)
    x = torch.randn(1, 9, 24, dtype=torch.float64, requires_grad=True)
    attention(x, *rotation(torch.arange(9), 4, FULL_RANK.rope))[0, 4].sum().backward()
    assert not x.grad[0, 5:].any()
    assert x.grad[0, :5].abs().amin(-1).all()


@pytest.mark.parametrize("value_width", [3, 8, 11])
def test_values_of_any_width(value_width: int) -> None:
    q, k = torch.randn(2, 1, 2, 5, 8, dtype=torch.float64)
    v = torch.randn(1, 2, 5, value_width, dtype=torch.float64)
    scores = (q @ k.mT * 0.3).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(causal_attention(q, k, v, 0.3), scores.softmax(-1) @ v)


def test_the_cache_holds_what_all_heads_share() -> None:
    attention = random_attention(FULL_RANK)
    latent, k_rope = attention.compress(torch.randn(2, 7, 24).double(), *rotation(torch.arange(7), 4, FULL_RANK.rope))
    assert (latent.shape, k_rope.shape) == ((2, 7, 10), (2, 7, 4))
