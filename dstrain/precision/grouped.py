"""Matrix products of many experts at once: rows sorted by expert, each run of rows times its own weight.

Shapes: R rows, K in, M out, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dstrain.precision.weight_gradients import WeightGradients, used


def grouped_linear_reference(x_RK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
    """One expert after the other; the plain meaning of `grouped_linear`."""
    parts = x_RK.tensor_split(ends_E.long().cpu()[:-1])
    return torch.cat([F.linear(x, weight) for x, weight in zip(parts, weight_EMK.unbind(), strict=True)])


class _GroupedLinear(torch.autograd.Function):
    """The three products by hand: torch's own backward makes a transposed weight gradient and copies it to turn it."""

    @staticmethod
    def forward(
        ctx: Any, x_RK: Tensor, weight_EMK: Tensor, ends_E: Tensor, gradients: WeightGradients | None
    ) -> Tensor:
        ctx.save_for_backward(x_RK, ends_E)
        # As it is: recomputation would give back another tensor for a saved one.
        ctx.weight_EMK, ctx.gradients = weight_EMK, gradients
        return F.grouped_mm(x_RK, weight_EMK.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RM: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x_RK, ends_E), weight_EMK = ctx.saved_tensors, ctx.weight_EMK
        grad_RM, x_RK = grad_RM.contiguous(), x_RK.detach()
        needs_x, needs_weight, *_ = ctx.needs_input_grad

        def grad_weight() -> Tensor:
            return F.grouped_mm(grad_RM.t(), x_RK, offs=ends_E)

        grad_x = F.grouped_mm(grad_RM, weight_EMK, offs=ends_E) if needs_x else None
        if ctx.gradients is not None:
            return grad_x, ctx.gradients.take(weight_EMK, grad_weight), None, None
        return grad_x, grad_weight() if needs_weight else None, None, None


def grouped_linear(x_RK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
    """y[r] = weight[expert of r] @ x[r], [R, M]; the first ends_E[0] rows belong to expert 0, those up to ends_E[1] to
    expert 1, and so on. `ends_E`, int32, lies on the device of x.

    Experts without rows get zero gradients, never None: a reduction over ranks waits for every one of them.
    """
    return _GroupedLinear.apply(x_RK.contiguous(), weight_EMK, ends_E, used(weight_EMK))
