"""Linear layers and embeddings whose weight gradients can be computed apart (weight_gradients.py); in FP8 where that is
asked for (products.py).

Shapes: ... leading dimensions, K in, M out, F inner width of a SwiGLU, V vocabulary, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dstrain.precision.products import Products, gated, product, quantized
from dstrain.precision.swiglu import swiglu
from dstrain.precision.weight_gradients import WeightGradients, used


def linear(x: Tensor, weight_MK: Tensor, *, shared: bool = False) -> Tensor:
    """x @ weight.T, [..., K] -> [..., M]; bit by bit F.linear, forward and backward.

    `shared`: the weight may be used more than once in a micro-batch.
    """
    gradients = used(weight_MK, shared=shared)
    return F.linear(x, weight_MK) if gradients is None else _Linear.apply(x, weight_MK, gradients)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_MK: Tensor, gradients: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        # As it is: recomputation would give back another tensor for a saved one.
        ctx.weight_MK, ctx.gradients = weight_MK, gradients
        return F.linear(x, weight_MK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,), weight_MK = ctx.saved_tensors, ctx.weight_MK
        grad_NM, x_NK = grad.reshape(-1, grad.shape[-1]), x.detach().reshape(-1, x.shape[-1])
        grad_x = (grad_NM @ weight_MK).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, ctx.gradients.take(weight_MK, lambda: grad_NM.t() @ x_NK), None


def wide_linear(x: Tensor, weight_MK: Tensor) -> Tensor:
    """x @ weight.T in FP32, [..., K] -> [..., M], as of x.float(); what is kept is x as it is."""
    return _WideLinear.apply(x, weight_MK)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_MK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_MK)
        return F.linear(x.float(), weight_MK.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_MK = ctx.saved_tensors
        grad_NM, x_NK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = (grad_NM @ weight_MK.float()).to(x.dtype).view(x.shape)
        return grad_x, (grad_NM.t() @ x_NK.float()).to(weight_MK.dtype)


class _Use(torch.autograd.Function):
    """A weight as it is, whose gradient goes where `gradients` wants it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradients: WeightGradients) -> Tensor:
        ctx.weight, ctx.gradients = weight, gradients
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.gradients.take(ctx.weight, lambda: grad), None


class Linear(nn.Linear):
    """nn.Linear without bias, through `linear`, or in FP8 where it has `products`, by the name of its parameter."""

    products: dict[str, Products] | None = None

    def __init__(self, in_features: int, out_features: int, *, shared: bool = False):
        super().__init__(in_features, out_features, bias=False)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        if self.products is None:
            return linear(x, self.weight, shared=self.shared)
        return product(x, self.weight, None, self.products["weight"], used(self.weight, shared=self.shared))

    def prepared(self, x: Tensor, *others: "Linear") -> Tensor:
        """For this layer and for `others`, which then have no need to quantise `x` each for itself; as it is, if one of
        them takes it so."""
        if self.products is None or any(layer.products is None for layer in others):
            return x
        return quantized(x, self.products["weight"])


class GatedLinear(Linear):
    """SwiGLU of the input, [..., 2F], then Linear: [..., M]."""

    def forward(self, gate_up: Tensor) -> Tensor:
        if self.products is None:
            return linear(swiglu(gate_up), self.weight)
        return gated(gate_up, None, self.weight, None, self.products["weight"], used(self.weight))


class Embedding(nn.Embedding):
    """nn.Embedding, [...] -> [..., D], whose weight may be used more than once in a micro-batch; as the head of a model
    that ties both [..., D] -> [..., V]."""

    def forward(self, tokens: Tensor, *, as_head: bool = False) -> Tensor:
        # Both uses are calls of the module: hooks that wait for its weight hear of them.
        if as_head:
            return linear(tokens, self.weight, shared=True)
        gradients = used(self.weight, shared=True)
        weight_VD = self.weight if gradients is None else _Use.apply(self.weight, gradients)
        return F.embedding(tokens, weight_VD)
