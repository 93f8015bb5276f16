"""The grouped product against one product after the other."""

import pytest
import torch
from torch import Tensor

from dstrain.precision.grouped import grouped_linear, grouped_linear_reference

COUNTS = {
    "even": [3, 3, 3],
    "uneven": [1, 7, 2],
    "first empty": [0, 4, 5],
    "last empty": [4, 5, 0],
    "one takes all": [0, 9, 0],
    "no rows": [0, 0, 0],
}


def product(function, dtype: torch.dtype, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients."""
    generator = torch.Generator().manual_seed(3)
    x_RK = torch.randn(sum(counts), 16, generator=generator).to(dtype).requires_grad_()
    weight_EMK = torch.randn(3, 8, 16, generator=generator).to(dtype).requires_grad_()
    y_RM = function(x_RK, weight_EMK, torch.tensor(counts).cumsum(0, dtype=torch.int32))
    (y_RM.float() * torch.randn(y_RM.shape, generator=generator)).sum().backward()
    assert x_RK.grad is not None
    assert weight_EMK.grad is not None
    return y_RM.detach(), x_RK.grad, weight_EMK.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", COUNTS)
def test_equals_one_expert_after_the_other(case: str, dtype: torch.dtype):
    found, expected = (product(f, dtype, COUNTS[case]) for f in (grouped_linear, grouped_linear_reference))
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("case", COUNTS)
def test_an_expert_without_rows_gets_a_zero_gradient(case: str):
    _, _, grad_EMK = product(grouped_linear, torch.float32, COUNTS[case])
    assert [bool(grad_MK.any()) for grad_MK in grad_EMK] == [count > 0 for count in COUNTS[case]]
