"""Matrix products of many experts at once: rows sorted by expert, each run of rows times its own weight.

Shapes: R rows, K in, M out, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def grouped_linear_reference(x_RK: Tensor, weight_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """One expert after the other; the plain meaning of `grouped_linear`."""
    parts = [F.linear(x, weight) for x, weight in zip(x_RK.split(counts_E.tolist()), weight_EMK.unbind(), strict=True)]
    return torch.cat(parts)


class _GroupedLinear(torch.autograd.Function):
    """The three products by hand: torch's own backward makes a transposed weight gradient and copies it to turn it."""

    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RK, weight_EMK, ends_E)
        return F.grouped_mm(x_RK, weight_EMK.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RM: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RK, weight_EMK, ends_E = ctx.saved_tensors
        grad_RM = grad_RM.contiguous()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = F.grouped_mm(grad_RM, weight_EMK, offs=ends_E) if needs_x else None
        grad_weight = F.grouped_mm(grad_RM.t(), x_RK, offs=ends_E) if needs_weight else None
        return grad_x, grad_weight, None


def grouped_linear(x_RK: Tensor, weight_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """y[r] = weight[expert of r] @ x[r], [R, M]; the first counts_E[0] rows belong to expert 0, and so on.
    `counts_E` lies on the device of x.

    Experts without rows get zero gradients, never None: a reduction over ranks waits for every one of them.
    """
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    return _GroupedLinear.apply(x_RK.contiguous(), weight_EMK, ends_E)
