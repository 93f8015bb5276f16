"""An MTP module against its formula."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dstrain.config.schema import ModelConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.model.layer import DenseLayer, MoELayer
from dstrain.model.mtp import MtpModule
from dstrain.model.rope import rotation

MODEL = ModelConfig(hidden_size=16, num_heads=2, kv_lora_rank=8, num_experts=4, experts_per_token=2, norm_eps=1e-3)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight


@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_embedding_and_hidden_state_are_normed_joined_in_this_order_and_sent_through_a_layer(dense: bool) -> None:
    torch.manual_seed(5)
    model = replace(MODEL, qk_rope_head_dim=4)
    layer = DenseLayer(model) if dense else MoELayer(model, range(4), LocalDispatcher(4))
    module = MtpModule(model, layer)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    embedded, hidden = torch.randn(2, 2, 5, 16)
    cos_sin = rotation(torch.arange(5), 4, model.rope)
    out, report = layer(module.join(embedded, hidden), *cos_sin)
    out = module.norm(out)
    projected = norm(embedded, module.embed_norm.weight) @ module.proj.weight[:, :16].T
    projected = projected + norm(hidden, module.hidden_norm.weight) @ module.proj.weight[:, 16:].T
    expected = norm(layer(projected, *cos_sin)[0], module.norm.weight)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert (report is None) == dense
