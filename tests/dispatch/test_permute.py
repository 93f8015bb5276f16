"""Sorting by expert and summing back, with exact gradients."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from dstrain.dispatch.permute import gather_rows, invert, reorder, sort_by_expert, spread, weighted_sum

EXPERTS_TK = torch.tensor([[2, 0], [1, 2], [0, 3], [2, 1], [0, 2]])


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_rows_are_in_the_order_of_experts_then_tokens():
    token_of_row, row_of_pair = sort_by_expert(EXPERTS_TK)
    assert token_of_row.tolist() == [0, 2, 4, 1, 3, 0, 1, 3, 4, 2]
    assert EXPERTS_TK.flatten()[invert(row_of_pair.flatten())].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    rows = torch.arange(5.0)[:, None][token_of_row]
    assert torch.equal(gather_rows(rows, row_of_pair)[..., 0], torch.arange(5.0)[:, None].expand(5, 2))


def test_invert():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order[invert(order)], torch.arange(20))


def test_spread():
    token_of_row, row_of_pair = sort_by_expert(EXPERTS_TK)
    x_TD = wide(5, 3)
    assert torch.equal(spread(x_TD, token_of_row, row_of_pair), x_TD[token_of_row])
    assert gradcheck(lambda x: spread(x, token_of_row, row_of_pair), (x_TD,))


def test_reorder():
    order, rows_RD = torch.tensor([3, 1, 0, 4, 2]), wide(5, 3)
    assert torch.equal(reorder(rows_RD, order), rows_RD[order])
    assert gradcheck(lambda rows: reorder(rows, order), (rows_RD,))


def test_weighted_sum():
    _, row_of_pair = sort_by_expert(EXPERTS_TK)
    rows_RD, weights_TK = wide(10, 3), wide(5, 2)
    expected = (rows_RD[row_of_pair] * weights_TK[..., None]).sum(1)
    torch.testing.assert_close(weighted_sum(rows_RD, weights_TK, row_of_pair), expected)
    assert gradcheck(lambda rows, weights: weighted_sum(rows, weights, row_of_pair), (rows_RD, weights_TK))


@pytest.mark.parametrize("experts_per_token", [1, 3])
def test_no_tokens(experts_per_token: int):
    token_of_row, row_of_pair = sort_by_expert(torch.empty(0, experts_per_token, dtype=torch.int64))
    x_TD, weights_TK = wide(0, 4), wide(0, experts_per_token)
    y_TD = weighted_sum(spread(x_TD, token_of_row, row_of_pair), weights_TK, row_of_pair)
    y_TD.sum().backward()
    assert x_TD.grad is not None
    assert y_TD.shape == x_TD.grad.shape == (0, 4)


def test_narrow_rows_are_added_in_fp32():
    """256 + 15 ones: each partial sum in BF16 would round back to 256."""
    rows_RD = torch.ones(16, 8, dtype=torch.bfloat16)
    rows_RD[0] = 256
    summed = weighted_sum(rows_RD, torch.ones(1, 16), torch.arange(16)[None])
    assert summed.dtype == torch.bfloat16
    assert summed.tolist() == [[torch.tensor(271.0).bfloat16().item()] * 8]
