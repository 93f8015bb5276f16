"""The three products of a Linear or of the experts in FP8 (DeepSeek-V3 section 3.3), as functions of autograd.

    product   y = x W^T                 x cached in E4M3, or in E5M6 where attention's backward pass needs it as well
    gated     y = swiglu(h) W^T         h cached in E4M3, the output of SwiGLU computed again

for one weight, or for the weight of each row's expert. Weight gradients are FP32 and may be computed apart
(weight_gradients.py). A module computes so if it has `Products`; which do says parallel/precision.py.

Shapes: ... leading dimensions, R rows, K in, M out, F inner width of a SwiGLU, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dstrain.precision.backend import Backend, Kept, Operand
from dstrain.precision.formats import E4M3, Format
from dstrain.precision.quantize import Quantized
from dstrain.precision.rows import take_rows
from dstrain.precision.swiglu import swiglu
from dstrain.precision.tensor import Origin, QuantizedTensor
from dstrain.precision.watch import Watch
from dstrain.precision.weight_gradients import WeightGradients


@dataclass
class Products:
    """Of one weight, which the logical `name` says; `keeps`: the format in which the input is cached."""

    name: str
    backend: Backend
    watch: Watch
    keeps: Format = E4M3
    # Until the weight changes, its quantised form serves all micro-batches.
    caches: bool = False
    _weight: Operand = None

    def weight(self, weight: Tensor) -> Operand:
        if self._weight is not None:
            return self._weight
        self.look("weight", weight.detach())
        operand = self.backend.weight(weight.detach())
        if self.caches:
            self._weight = operand
        return operand

    def look(self, kind: str, x: Tensor | Quantized) -> None:
        self.watch.look(kind, self.name, x, self.backend.scheme)

    def forget(self, caches: bool) -> None:
        self.caches, self._weight = caches, None


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Inside, weights don't change: each is quantised once."""
    found = [p for module in model.modules() for p in (getattr(module, "products", None) or {}).values()]
    for products in found:
        products.forget(caches=True)
    try:
        yield
    finally:
        for products in found:
            products.forget(caches=False)


def product(
    x: Tensor, weight: Tensor, ends_E: Tensor | None, products: Products, gradients: WeightGradients | None
) -> Tensor:
    """x W^T: [..., K] -> [..., M]; with `ends_E` rows sorted by expert, [R, K], and their weights [E, M, K]."""
    return _Product.apply(x, weight, ends_E, products, gradients)


def gated(
    gate_up: Tensor,
    weight_R: Tensor | None,
    weight: Tensor,
    ends_E: Tensor | None,
    products: Products,
    gradients: WeightGradients | None,
) -> Tensor:
    """swiglu(gate_up, weight_R) W^T: [..., 2F] -> [..., M]."""
    return _Gated.apply(gate_up, weight_R, weight, ends_E, products, gradients)


def quantized(x: Tensor, products: Products) -> Tensor:
    """`x` as several products will take it, quantised once; gradients pass as they are."""
    return _Quantized.apply(x, products)


def _matrix(x: Tensor, tile: int) -> Tensor | Quantized:
    """[R, K]; as it arrived, if it is quantised in such tiles."""
    if isinstance(x, QuantizedTensor):
        if x.held.tile == tile:
            return x.matrix
        x = x.dequantize()
    return x.reshape(-1, x.shape[-1])


def _as_rows_of(x: Tensor, matrix: Tensor) -> Tensor:
    """With the leading dimensions of `x`."""
    return matrix.view(*x.shape[:-1], matrix.shape[-1])


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Products) -> Tensor:
        products.look("activation", x)
        matrix = x.detach().reshape(-1, x.shape[-1])
        kept = products.backend.keep(matrix, E4M3)
        return QuantizedTensor(
            kept.values.view(x.shape), _as_rows_of(x, kept.scale), x.dtype, products.backend.scheme.tile
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Kept:
    """An activation between forward and backward pass; its tensors go the way that autograd's hooks can see."""

    def __init__(self, ctx: Any, kept: Kept, *others: Tensor | None, origin: Origin | None = None):
        row_N = None
        if origin is not None:
            kept, row_N = origin.rows, origin.row_N
        self.like: Kept = replace(kept, values=None, scale=None)  # type: ignore[arg-type]
        ctx.save_for_backward(kept.values, kept.scale, row_N, *others)

    def load(self, ctx: Any) -> tuple[Callable[[], Kept], Any]:
        """How to get the activation, all of whose rows are there only then; and the others."""
        values, scale, row_N, *others = ctx.saved_tensors
        kept = replace(self.like, values=values, scale=scale)

        def rows() -> Kept:
            return take_rows(kept, row_N) if isinstance(kept, Quantized) and row_N is not None else kept

        return rows, others


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ends_E: Tensor | None, products: Products, gradients: Any
    ) -> Tensor:
        backend, matrix = products.backend, _matrix(x.detach(), products.backend.scheme.tile)
        if not isinstance(x, QuantizedTensor) or products.watch.broken is not None:
            products.look("activation", matrix)
        kept: Kept
        operand, kept = backend.activation(matrix)
        if products.keeps is not E4M3 and isinstance(matrix, Tensor):
            products.look("attention", matrix)
            kept = backend.keep(matrix, products.keeps)
        # As it is: recomputation would give back another tensor for a saved one.
        ctx.weight, ctx.products, ctx.gradients, ctx.shape = weight, products, gradients, x.shape
        origin = x.origin if kept is matrix and isinstance(x, QuantizedTensor) else None
        ctx.kept = _Kept(ctx, kept, ends_E, origin=origin)
        return _as_rows_of(x, backend.forward(operand, products.weight(weight), ends_E))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        products, (kept, (ends_E,)) = ctx.products, ctx.kept.load(ctx)
        backend = products.backend
        rows, columns = _gradient(grad, products, ends_E)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = backend.input_gradient(rows, products.weight(ctx.weight), ends_E).view(ctx.shape)
        grad_weight = _weight_gradient(
            ctx, 1, lambda: backend.weight_gradient(columns, backend.columns(kept(), ends_E), ends_E)
        )
        return grad_x, grad_weight, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        weight_R: Tensor | None,
        weight: Tensor,
        ends_E: Tensor | None,
        products: Products,
        gradients: Any,
    ) -> Tensor:
        backend, matrix = products.backend, gate_up.detach().reshape(-1, gate_up.shape[-1])
        products.look("swiglu", matrix)
        ctx.weight, ctx.products, ctx.gradients, ctx.shape = weight, products, gradients, gate_up.shape
        ctx.kept = _Kept(ctx, backend.keep(matrix, E4M3), weight_R, ends_E)
        if products.watch.is_on:
            # What a fused kernel quantises, nobody else sees; outliers are largest there.
            products.look("activation", swiglu(matrix, weight_R))
        operand = backend.gated(matrix, weight_R)
        return _as_rows_of(gate_up, backend.forward(operand, products.weight(weight), ends_E))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        products, (kept, (weight_R, ends_E)) = ctx.products, ctx.kept.load(ctx)
        backend = products.backend
        rows, columns = _gradient(grad, products, ends_E)
        grad_inner = backend.input_gradient(rows, products.weight(ctx.weight), ends_E)
        grad_gate_up, grad_weight_R, inner = backend.gated_back(kept(), weight_R, grad_inner, ends_E)
        grad_weight = _weight_gradient(ctx, 2, lambda: backend.weight_gradient(columns, inner, ends_E))
        return grad_gate_up.view(ctx.shape), grad_weight_R, grad_weight, None, None, None


def _gradient(grad: Tensor, products: Products, ends_E: Tensor | None) -> tuple[Operand, Operand]:
    matrix = _matrix(grad, products.backend.scheme.tile)
    products.look("gradient", matrix)
    return products.backend.gradient(matrix, ends_E)


def _weight_gradient(ctx: Any, place: int, compute: Callable[[], Tensor]) -> Tensor | None:
    """Now, or when whoever takes the gradients of a micro-batch has time."""
    if ctx.gradients is not None:
        return ctx.gradients.take(ctx.weight, compute)
    return compute() if ctx.needs_input_grad[place] else None
