"""Feed-forward networks with SwiGLU, and DeepSeekMoE (arXiv:2401.06066) with shared and routed experts.

Shapes: D hidden, F width, E local experts, I width of an expert, R rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dstrain.config.schema import ModelConfig
from dstrain.model.router import Router
from dstrain.precision.chunked import chunked
from dstrain.precision.grouped import grouped_linear
from dstrain.precision.linear import GatedLinear, Linear
from dstrain.precision.products import Products, gated, product
from dstrain.precision.swiglu import swiglu
from dstrain.precision.weight_gradients import used


class FeedForward(nn.Module):
    """A dense SwiGLU network, [..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * width)
        self.down = GatedLinear(width, hidden_size)

    def lower(self, gate_up: Tensor) -> Tensor:
        """From the input of the activation on; a method of its own, so that it can be computed again."""
        return self.down(gate_up)

    def forward(self, x: Tensor) -> Tensor:
        return self.lower(self.gate_up(x))


class Experts(nn.Module):
    """The routed experts `held` by this rank, as stacked weights."""

    def __init__(self, model: ModelConfig, held: Sequence[int]):
        super().__init__()
        # Expert of each slot; the balancer changes it where it moves experts between ranks.
        self.held = tuple(held)
        width, hidden = model.moe_intermediate_size, model.hidden_size
        self.gate_up = nn.Parameter(torch.empty(len(held), 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(len(held), hidden, width))
        # Its parameters' products in FP8, by their names; None: in the dtype of the weights.
        self.products: dict[str, Products] | None = None
        # More rows than this go through in chunks, so that memory stays bounded. None: all at once.
        self.chunk_rows: int | None = None

    def upper(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """To the input of the activation; where each expert's rows end, `ends_E` says (int32)."""
        if self.products is None:
            return grouped_linear(rows_RD, self.gate_up, ends_E)
        return product(rows_RD, self.gate_up, ends_E, self.products["gate_up"], used(self.gate_up))

    def lower(self, gate_up: Tensor, weights_R: Tensor | None, ends_E: Tensor) -> Tensor:
        """From the input of the activation on; a method of its own, so that it can be computed again."""
        if self.products is None:
            return grouped_linear(swiglu(gate_up, weights_R), self.down, ends_E)
        return gated(gate_up, weights_R, self.down, ends_E, self.products["down"], used(self.down))

    def compute(self, rows_RD: Tensor, weights_R: Tensor | None, ends_E: Tensor) -> Tensor:
        return self.lower(self.upper(rows_RD, ends_E), weights_R, ends_E)

    def forward(self, rows_RD: Tensor, counts_E: Tensor, weights_R: Tensor | None = None) -> Tensor:
        """Rows sorted by expert, `counts_E` of them each, through their experts, times their weights (FP32; None: all
        one): [R, D]."""
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        if self.chunk_rows is not None and len(rows_RD) > self.chunk_rows:
            weights = (self.gate_up, self.down)
            return chunked(self.compute, weights, rows_RD, weights_R, ends_E, self.chunk_rows)
        return self.compute(rows_RD, weights_R, ends_E)


class MoE(nn.Module):
    """The parts of an MoE layer; model/layer.py runs them as phases."""

    def __init__(self, model: ModelConfig, held: Sequence[int]):
        super().__init__()
        self.router = Router(model)
        self.experts = Experts(model, held)
        # The slot of each expert, counted through the ranks of the group: where its tokens go. None: in order.
        self.slots_E: Tensor | None = None
        shared_width = model.num_shared_experts * model.moe_intermediate_size
        self.shared = FeedForward(model.hidden_size, shared_width) if shared_width else None
