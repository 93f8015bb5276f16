"""A decoder layer against its formula, whole and phase by phase."""

from dataclasses import replace

import torch
from torch import Tensor

from dstrain.config.schema import ModelConfig, RouterConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.model.layer import DenseLayer, MoELayer
from dstrain.model.rope import rotation

MODEL = ModelConfig(
    hidden_size=16,
    num_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=6,
    experts_per_token=2,
    router=RouterConfig(scaling_factor=2.0),
)


def rotations() -> tuple[Tensor, Tensor]:
    return rotation(torch.arange(7), 4, MODEL.rope)


def random_layer(model: ModelConfig = MODEL) -> MoELayer:
    torch.manual_seed(4)
    layer = MoELayer(model, range(6), LocalDispatcher(6))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return layer


def routed(layer: MoELayer, normed_TD: Tensor) -> Tensor:
    """Every token through every one of its experts, one by one."""
    route, _ = layer.moe.router(normed_TD[None])
    out = torch.zeros_like(normed_TD)
    for t, (experts, weights) in enumerate(zip(route.experts_TK.tolist(), route.weights_TK, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (layer.moe.experts.gate_up[expert] @ normed_TD[t]).chunk(2)
            out[t] += weight * (layer.moe.experts.down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


@torch.no_grad()
def test_an_moe_layer_adds_attention_then_shared_and_routed_experts() -> None:
    for shared in (0, 1):
        layer, x = random_layer(replace(MODEL, num_shared_experts=shared)), torch.randn(2, 7, 16)
        out, report = layer(x, *rotations())
        after = x + layer.attn(layer.attn_norm(x), *rotations())
        normed = layer.ffn_norm(after)
        expected = after + torch.stack([routed(layer, sequence) for sequence in normed])
        if layer.moe.shared is not None:
            expected = expected + layer.moe.shared(normed)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert report.load_E.sum() == 2 * 7 * 2


def test_the_phases_one_by_one_are_the_layer() -> None:
    layer, x = random_layer(), torch.randn(2, 7, 16)
    attended = layer.attend(x, *rotations())
    arrived = layer.dispatch(attended).wait()
    home = layer.combine(layer.experts(arrived), arrived).wait()
    assert layer.moe.shared is not None
    by_phase = attended.x_BTD + layer.moe.shared(attended.normed_BTD) + home.view_as(x)
    whole, _ = layer(x, *rotations())
    assert torch.equal(by_phase, whole)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    for name, found, expected in zip(
        names,
        torch.autograd.grad(by_phase.square().sum(), parameters),
        torch.autograd.grad(whole.square().sum(), parameters),
        strict=True,
    ):
        assert torch.equal(found, expected), name


@torch.no_grad()
def test_a_dense_layer_adds_attention_then_its_network() -> None:
    torch.manual_seed(0)
    layer, x = DenseLayer(MODEL), torch.randn(2, 7, 16)
    out, report = layer(x, *rotations())
    after = x + layer.attn(layer.attn_norm(x), *rotations())
    torch.testing.assert_close(out, after + layer.mlp(layer.ffn_norm(after)))
    assert report is None
