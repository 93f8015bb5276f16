"""Real compute: attention, shared expert and routed experts of a small model in BF16, on this machine's cores.

The layers are those of training; only the router is missing, as routes are given.

Shapes: T tokens, D hidden, R rows.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dstrain.bench.workload import Workload
from dstrain.config.schema import ModelConfig
from dstrain.model.layer import DecoderLayer
from dstrain.model.moe import Experts, FeedForward
from dstrain.model.rope import rotation

DTYPE = torch.bfloat16
INIT_STD = 0.02


class Real(nn.Module):
    """What a rank computes; the last stretch, head and loss, takes no time."""

    def __init__(self, work: Workload):
        super().__init__()
        model = model_config(work)
        blocks = range(work.blocks)
        self.stretches = nn.ModuleList(DecoderLayer(model) for _ in blocks)
        self.shared_experts = nn.ModuleList(FeedForward(model.hidden_size, model.moe_intermediate_size) for _ in blocks)
        self.routed_experts = nn.ModuleList(Experts(model, range(work.held)) for _ in blocks)
        generator = torch.Generator().manual_seed(work.seed)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=INIT_STD, generator=generator)
        self.to(DTYPE)
        self.rotation = rotation(torch.arange(work.tokens), model.qk_rope_head_dim, model.rope)

    def attend(self, x_TD: Tensor, stretch: int) -> Tensor:
        if stretch == len(self.stretches):
            return x_TD
        layer = cast(DecoderLayer, self.stretches[stretch])
        return layer.attention(x_TD.unsqueeze(0), *self.rotation).squeeze(0)

    def shared(self, x_TD: Tensor, block: int) -> Tensor:
        y_TD: Tensor = self.shared_experts[block](x_TD)
        return y_TD

    def experts(self, rows_RD: Tensor, counts: Sequence[int], block: int, weights_R: Tensor | None = None) -> Tensor:
        y_RD: Tensor = self.routed_experts[block](rows_RD, torch.tensor(counts), weights_R)
        return y_RD


def model_config(work: Workload) -> ModelConfig:
    """As wide as the rows that travel, experts half as wide."""
    heads = max(1, work.hidden_size // 64)
    return ModelConfig(
        hidden_size=work.hidden_size,
        num_heads=heads,
        kv_lora_rank=max(16, work.hidden_size // 4),
        q_lora_rank=None,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=64,
        moe_intermediate_size=max(8, work.hidden_size // 16 * 8),
        num_experts=work.num_experts,
        experts_per_token=work.experts_per_token,
    )
