"""The routed experts in chunks of rows, whose insides are computed again in the backward pass.

Where one expert takes all tokens, what lies between its two products is the largest thing of a step: three times the
expert's width for every row. In chunks it is that of one chunk. The rows that arrive, the rows that leave and their
gradients stay whole: two times two hidden states for every row.

Chunks are cut by rows and not by experts, so the host needs no counts: the part of each expert in a chunk is computed
on the device. Products of a row don't depend on the chunk it is in; weight gradients are sums over chunks, in FP32.

Shapes: R rows, C rows of a chunk, D hidden, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.precision.weight_gradients import WeightGradients, undisturbed, used

# Rows [C, D], their weights [C] if they have any, and where each expert's end -> [C, D].
Compute = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def chunked(
    compute: Compute,
    parameters: Sequence[Tensor],
    rows_RD: Tensor,
    weights_R: Tensor | None,
    ends_E: Tensor,
    chunk_rows: int,
) -> Tensor:
    """`compute`, a function of the rows and of `parameters`, for `chunk_rows` rows at a time: [R, D]."""
    gradients = [used(parameter) for parameter in parameters]
    return _Chunked.apply(rows_RD, weights_R, ends_E, chunk_rows, compute, gradients, *parameters)


def _chunks(rows: int, ends_E: Tensor, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and where each expert's part of it ends."""
    for begin in range(0, rows, chunk_rows):
        end = min(rows, begin + chunk_rows)
        yield slice(begin, end), ends_E.clamp(begin, end) - begin


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weights_R: Tensor | None,
        ends_E: Tensor,
        chunk_rows: int,
        compute: Compute,
        gradients: Sequence[WeightGradients | None],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_R, ends_E)
        # As they are: recomputation would give back other tensors for saved ones.
        ctx.compute, ctx.parameters, ctx.gradients, ctx.chunk_rows = compute, parameters, gradients, chunk_rows
        result_RD = torch.empty(rows_RD.shape, dtype=rows_RD.dtype, device=rows_RD.device)
        for chunk, ends in _chunks(len(rows_RD), ends_E, chunk_rows):
            result_RD[chunk] = compute(rows_RD[chunk], None if weights_R is None else weights_R[chunk], ends)
        return result_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (rows_RD, weights_R, ends_E), parameters = ctx.saved_tensors, ctx.parameters
        grad_rows_RD = torch.empty(rows_RD.shape, dtype=rows_RD.dtype, device=rows_RD.device)
        grad_weights_R = None if weights_R is None else torch.empty_like(weights_R)
        # Added in FP32: in BF16, the sum of each chunk has been rounded once, and the whole is again.
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for chunk, ends in _chunks(len(rows_RD), ends_E, ctx.chunk_rows):
            inputs = [rows_RD[chunk].detach().requires_grad_(), *parameters]
            weights = None
            if grad_weights_R is not None and weights_R is not None:
                weights = weights_R[chunk].detach().requires_grad_()
                inputs.append(weights)
            with torch.enable_grad(), undisturbed():
                result = ctx.compute(inputs[0], weights, ends)
                grad_rows_RD[chunk], *grads = torch.autograd.grad(result, inputs, grad_RD[chunk])
            if grad_weights_R is not None:
                grad_weights_R[chunk] = grads.pop()
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        handed = [_hand_over(*each) for each in zip(ctx.gradients, parameters, sums, strict=True)]
        return grad_rows_RD, grad_weights_R, None, None, None, None, *handed


def _hand_over(gradients: WeightGradients | None, weight: Tensor, grad: Tensor) -> Tensor | None:
    """A gradient that is already there goes to autograd, or to whoever hands it over later."""
    return grad if gradients is None else gradients.take(weight, lambda: grad)
