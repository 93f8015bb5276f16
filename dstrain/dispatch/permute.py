"""Sorting (token, expert) pairs by expert and summing them back.

Shapes: T tokens, K experts per token, R = T * K rows, D hidden, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Spread(torch.autograd.Function):
    """Copies each token to its K rows.

    The gradient of a token is the sum over its rows, gathered rather than scattered: deterministic on every device.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_of_row_R: Tensor, row_of_pair_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_pair_TK)
        return x_TD.index_select(0, token_of_row_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (row_of_pair_TK,) = ctx.saved_tensors
        return gather_rows(grad_RD, row_of_pair_TK).sum(1), None, None


class _Reorder(torch.autograd.Function):
    """rows[order], whose gradient is a gather with the inverse order."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return rows_RD.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R), None, None


def gather_rows(rows_RD: Tensor, row_of_pair_TK: Tensor) -> Tensor:
    """The rows of each token, [T, K, D]."""
    return rows_RD.index_select(0, row_of_pair_TK.flatten()).unflatten(0, row_of_pair_TK.shape)


def invert(order_R: Tensor) -> Tensor:
    """The inverse of a permutation."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


def count_by_expert(experts_TK: Tensor, num_experts: int) -> Tensor:
    """How many rows go to each expert, int64 [E]. The host would wait for the device in `bincount`."""
    pairs_R = experts_TK.flatten()
    return pairs_R.new_zeros(num_experts).scatter_add_(0, pairs_R, torch.ones_like(pairs_R))


def sort_by_expert(experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """token_of_row [R] and row_of_pair [T, K]: rows in the order of their experts, then of tokens."""
    order_R = experts_TK.flatten().argsort(stable=True)
    return order_R // experts_TK.shape[1], invert(order_R).view_as(experts_TK)


def spread(x_TD: Tensor, token_of_row_R: Tensor, row_of_pair_TK: Tensor) -> Tensor:
    """One row per (token, expert), [R, D]."""
    return _Spread.apply(x_TD, token_of_row_R, row_of_pair_TK)


def reorder(rows_RD: Tensor, order_R: Tensor) -> Tensor:
    """rows[order] for a permutation `order`."""
    return _Reorder.apply(rows_RD, order_R, invert(order_R))


def weighted_sum(rows_RD: Tensor, weights_TK: Tensor, row_of_pair_TK: Tensor) -> Tensor:
    """y[t] = sum over k of weights[t, k] * rows[row_of_pair[t, k]], [T, D].

    A matrix product in the dtype of the rows: weights are rounded to it, the kernel adds up in FP32.
    """
    rows_TKD = reorder(rows_RD, row_of_pair_TK.flatten()).unflatten(0, row_of_pair_TK.shape)
    return torch.bmm(weights_TK[:, None].to(rows_RD.dtype), rows_TKD).squeeze(1)
