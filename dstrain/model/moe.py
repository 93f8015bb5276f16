"""Feed-forward networks: SwiGLU (arXiv:2002.05202), and DeepSeekMoE (arXiv:2401.06066) with shared and routed experts.

Shapes: D hidden, F width, E local experts, I width of an expert, R rows.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.config.schema import ModelConfig
from dstrain.model.router import Router
from dstrain.precision.grouped import grouped_linear


class SwiGLU(nn.Module):
    """[..., 2F] (gate, then up) -> silu(gate) * up, [..., F]."""

    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class FeedForward(nn.Module):
    """A dense SwiGLU network, [..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.activation = SwiGLU()
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate_up(x)))


class Experts(nn.Module):
    """The routed experts `held` by this rank, as stacked weights."""

    def __init__(self, model: ModelConfig, held: range):
        super().__init__()
        self.held = held
        width, hidden = model.moe_intermediate_size, model.hidden_size
        self.gate_up = nn.Parameter(torch.empty(len(held), 2 * width, hidden))
        self.activation = SwiGLU()
        self.down = nn.Parameter(torch.empty(len(held), hidden, width))

    def forward(self, rows_RD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts` of them each, through their experts: [R, D]."""
        inner_RI = self.activation(grouped_linear(rows_RD, self.gate_up, counts))
        return grouped_linear(inner_RI, self.down, counts)


class MoE(nn.Module):
    """The parts of an MoE layer; model/layer.py runs them as phases."""

    def __init__(self, model: ModelConfig, held: range):
        super().__init__()
        self.router = Router(model)
        self.experts = Experts(model, held)
        shared_width = model.num_shared_experts * model.moe_intermediate_size
        self.shared = FeedForward(model.hidden_size, shared_width) if shared_width else None
