"""Pairs in the order of experts, and sums back over the pairs of each row, with exact gradients."""

import pytest
import torch
from torch import Tensor

from dstrain.dispatch.permute import WIDE_ELEMENTS, Bags, Expansion, Pairs, count, invert, sort, starts

EXPERTS_TK = torch.tensor([[2, 0], [1, 2], [0, 3], [2, 1], [0, 2]])


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def expansion() -> Expansion:
    return Expansion.of(Pairs.of_tokens(EXPERTS_TK, torch.ones(5, 2)), 5)


def test_pairs_of_tokens():
    pairs = Pairs.of_tokens(EXPERTS_TK, wide(5, 2))
    assert pairs.rows == 5
    assert pairs.row_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert pairs.expert_N.tolist() == EXPERTS_TK.flatten().tolist()
    assert pairs.weight_N.dtype == torch.float32
    assert not pairs.weight_N.requires_grad


def test_rows_are_in_the_order_of_experts_then_tokens():
    weights_TK, expanded = wide(5, 2).detach(), expansion()
    assert expanded.row_N.tolist() == [0, 2, 4, 1, 3, 0, 1, 3, 4, 2]
    assert expanded.counts_E.tolist() == [3, 2, 4, 1, 0]
    by_expert = [
        weights_TK[t, EXPERTS_TK[t].tolist().index(e)] for e in range(4) for t in range(5) if e in EXPERTS_TK[t]
    ]
    weight_N = expanded.by_expert(weights_TK.flatten())
    assert torch.equal(weight_N, torch.stack(by_expert))
    assert torch.equal(expanded.by_pair(weight_N), weights_TK.flatten())


def test_orders():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order[invert(order)], torch.arange(20))
    keys = torch.tensor([2, 0, 2, 5, 0])
    assert sort(keys).tolist() == [1, 4, 0, 2, 3]
    assert count(keys, 7).tolist() == [2, 0, 2, 0, 0, 1, 0]
    assert starts(keys, 7).tolist() == [0, 2, 2, 4, 4, 4, 5]


def test_sums_by_target():
    rows_ND, target_N = wide(6, 3).detach(), torch.tensor([3, 1, 3, 0, 1, 3])
    expected = torch.zeros(5, 3, dtype=torch.float64).index_add_(0, target_N, rows_ND)
    torch.testing.assert_close(Bags.by_target(target_N, 5).sum(rows_ND), expected)


def test_expand_and_its_gradient():
    x_TD, grad_RD = wide(5, 3), wide(10, 3)
    expanded = expansion()
    rows_RD = expanded.expand(x_TD)
    assert torch.equal(rows_RD, x_TD[expanded.row_N])
    (expected,) = torch.autograd.grad(rows_RD, x_TD, grad_RD)
    torch.testing.assert_close(expanded.sum(grad_RD), expected)


@pytest.mark.parametrize(("first", "width"), [(0, 16), (8, 8), (0, 13), (3, 8), (16, 0)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_bytes_expand_as_any_row_does(dtype: torch.dtype, first: int, width: int):
    """A part of wider rows, as values and scales are parts of messages."""
    bytes_TB = torch.randint(256, (5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    rows_RD, expanded = bytes_TB[:, first : first + width].view(dtype), expansion()
    found_ND = expanded.expand(rows_RD)
    assert found_ND.dtype == dtype
    assert found_ND.is_contiguous()
    assert torch.equal(found_ND.view(torch.uint8), rows_RD.view(torch.uint8)[expanded.row_N])


def test_a_sum_and_its_gradient():
    rows_RD, grad_TD, expanded = wide(10, 3).detach().float().requires_grad_(), wide(5, 3).detach().float(), expansion()
    expected = rows_RD[expanded.bags.order_N].view(5, 2, 3).sum(1)
    torch.testing.assert_close(expanded.sum(rows_RD), expected)
    (grad_RD,) = torch.autograd.grad(expected, rows_RD, grad_TD)
    assert torch.equal(expanded.expand(grad_TD), grad_RD)


def test_blocks_compute_what_the_whole_does(monkeypatch: pytest.MonkeyPatch):
    rows_RD, expanded = wide(10, 8).detach().bfloat16(), expansion()
    expected = expanded.sum(rows_RD)
    monkeypatch.setitem(WIDE_ELEMENTS, "cpu", 24)
    assert torch.equal(expanded.sum(rows_RD), expected)


@pytest.mark.parametrize("experts_per_token", [1, 3])
def test_no_tokens(experts_per_token: int):
    nothing_TK = torch.empty(0, experts_per_token)
    expanded = Expansion.of(Pairs.of_tokens(nothing_TK.long(), nothing_TK), 4)
    assert expanded.expand(torch.empty(0, 4)).shape == expanded.sum(torch.empty(0, 4)).shape == (0, 4)
    assert expanded.counts_E.tolist() == [0, 0, 0, 0]


def test_narrow_rows_are_added_in_fp32():
    """256 + 15 ones: each partial sum in BF16 would round back to 256."""
    rows_RD = torch.ones(16, 64, dtype=torch.bfloat16)
    rows_RD[0] = 256
    expanded = Expansion.of(Pairs.of_tokens(torch.arange(16)[None], torch.ones(1, 16)), 16)
    summed = expanded.sum(rows_RD)
    assert summed.dtype == torch.bfloat16
    assert summed.tolist() == [[torch.tensor(271.0).bfloat16().item()] * 64]


def test_bfloat16_sums_round_ties_to_even():
    rows_ND = torch.randn(4000, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    bags = Bags.by_target(torch.arange(4000) // 2, 2000)
    assert torch.equal(bags.sum(rows_ND), rows_ND.float().view(2000, 2, 16).sum(1).bfloat16())
