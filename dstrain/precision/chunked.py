"""The routed experts in chunks of rows, whose insides are computed again in the backward pass.

Where one expert takes all tokens, what lies between its two products is the largest thing of a step: three times the
expert's width for every row. In chunks it is that of one chunk. The rows that arrive, the rows that leave and their
gradients stay whole: two times two hidden states for every row.

Chunks are cut by rows and not by experts, so the host needs no counts: the part of each expert in a chunk is computed
on the device. Products of a row don't depend on the chunk it is in; weight gradients are sums over chunks, in FP32.

Shapes: R rows, C rows of a chunk, D hidden, I expert width, E experts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dstrain.precision.swiglu import swiglu, swiglu_backward
from dstrain.precision.weight_gradients import WeightGradients, used


def chunked_experts(
    rows_RD: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    counts_E: Tensor,
    chunk_rows: int,
    weights_R: Tensor | None = None,
) -> Tensor:
    """grouped_linear, SwiGLU times the weights of the rows (FP32; None: all one), grouped_linear for `chunk_rows` rows
    at a time, [R, D]."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    gradients = (used(gate_up_E2ID), used(down_EDI))
    return _ChunkedExperts.apply(rows_RD.contiguous(), weights_R, gate_up_E2ID, down_EDI, ends_E, chunk_rows, gradients)


def _chunks(rows: int, ends_E: Tensor, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and where each expert's part of it ends."""
    for begin in range(0, rows, chunk_rows):
        end = min(rows, begin + chunk_rows)
        yield slice(begin, end), ends_E.clamp(begin, end) - begin


class _ChunkedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weights_R: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        ends_E: Tensor,
        chunk_rows: int,
        gradients: tuple[WeightGradients | None, WeightGradients | None],
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_R, ends_E)
        # As they are: recomputation would give back other tensors for saved ones.
        ctx.weights, ctx.chunk_rows, ctx.gradients = (gate_up, down), chunk_rows, gradients
        result_RD = torch.empty_like(rows_RD)
        for chunk, ends in _chunks(len(rows_RD), ends_E, chunk_rows):
            before = F.grouped_mm(rows_RD[chunk], gate_up.transpose(1, 2), offs=ends)
            inner = swiglu(before, None if weights_R is None else weights_R[chunk])
            result_RD[chunk] = F.grouped_mm(inner, down.transpose(1, 2), offs=ends)
        return result_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (rows_RD, weights_R, ends_E), (gate_up, down) = ctx.saved_tensors, ctx.weights
        grad_rows_RD, grad_RD = torch.empty_like(rows_RD), grad_RD.contiguous()
        grad_weights_R = None if weights_R is None else torch.empty_like(weights_R)
        # Added in FP32: in BF16, the sum of each chunk has been rounded once, and the whole is again.
        grad_gate_up, grad_down = (torch.zeros_like(weight, dtype=torch.float32) for weight in (gate_up, down))
        for chunk, ends in _chunks(len(rows_RD), ends_E, ctx.chunk_rows):
            before = F.grouped_mm(rows_RD[chunk], gate_up.transpose(1, 2), offs=ends)
            weights = None if weights_R is None else weights_R[chunk]
            grad_inner = F.grouped_mm(grad_RD[chunk], down, offs=ends)
            grad_down += F.grouped_mm(grad_RD[chunk].t(), swiglu(before, weights), offs=ends).float()
            grad_before, grad_weights = swiglu_backward(before, weights, grad_inner)
            if grad_weights_R is not None and grad_weights is not None:
                grad_weights_R[chunk] = grad_weights
            grad_gate_up += F.grouped_mm(grad_before.t(), rows_RD[chunk], offs=ends).float()
            grad_rows_RD[chunk] = F.grouped_mm(grad_before, gate_up, offs=ends)
        weights = ((gate_up, grad_gate_up), (down, grad_down))
        return grad_rows_RD, grad_weights_R, *map(_hand_over, ctx.gradients, weights), None, None, None


def _hand_over(gradients: WeightGradients | None, weight_and_grad: tuple[Tensor, Tensor]) -> Tensor | None:
    """A gradient that is already there goes to autograd, or to whoever hands it over later."""
    weight, grad = weight_and_grad
    narrow = grad.to(weight.dtype)
    return narrow if gradients is None else gradients.take(weight, lambda: narrow)
