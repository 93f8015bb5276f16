"""The fused activation against its plain meaning."""

import pytest
import torch
from torch import Tensor

from dstrain.precision import swiglu as module
from dstrain.precision.swiglu import swiglu, swiglu_reference


def grads(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * factors).sum(), inputs)


def test_value_and_gradient_are_those_of_the_reference() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 24, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, 12).double()
    torch.testing.assert_close(swiglu(x), swiglu_reference(x), rtol=0, atol=0)
    (ours,) = torch.autograd.grad((swiglu(x) * weight).sum(), x)
    (plain,) = torch.autograd.grad((swiglu_reference(x) * weight).sum(), x)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("block", [1, 48, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_rows_and_their_gradient(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.WIDE_ELEMENTS, "cpu", block)
    torch.manual_seed(0)
    inputs = [torch.randn(7, 24).to(dtype).requires_grad_(), torch.randn(7, requires_grad=True)]
    ours, plain = swiglu(*inputs), swiglu_reference(*inputs)
    assert ours.dtype == dtype
    assert torch.equal(ours, plain)
    for found, expected, given in zip(grads(ours, inputs), grads(plain, inputs), inputs, strict=True):
        assert found.dtype == given.dtype
        # Both compute in FP32; BF16 gradients are rounded once.
        torch.testing.assert_close(found, expected, rtol=2**-8 if found.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_narrow_inputs_are_rounded_once_at_the_end() -> None:
    """silu(1) is 0.73106, in BF16 0.73047: the product with 3 differs if both are rounded."""
    x = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    weight = torch.tensor([1 + 2**-10])
    exact = torch.tensor(1.0).sigmoid() * 3 * weight
    assert swiglu(x, weight).item() == exact.bfloat16().item()
    assert swiglu(x).item() == (torch.tensor(1.0).sigmoid() * 3).bfloat16().item()


def test_weights_are_not_rounded_to_narrow_rows() -> None:
    """1 and 1.0029 are one number in BF16; 26.25 times them are two: the next one is 26.375."""
    x, weight = torch.tensor([[20.0, 1.3125]] * 2, dtype=torch.bfloat16), torch.tensor([1.0, 1.0029])
    assert weight.bfloat16().unique().numel() == 1
    assert swiglu(x, weight).unique().numel() == 2


def test_only_the_input_is_kept() -> None:
    x, kept = torch.randn(4, 16, requires_grad=True), []
    weight = torch.rand(4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(x)
        swiglu(x, weight)
    assert kept == [x.data_ptr(), x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows_at_all(weighted: bool) -> None:
    x, weight = torch.randn(0, 16, requires_grad=True), torch.randn(0, requires_grad=True)
    swiglu(x, weight if weighted else None).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 16)
    assert (weight.grad is not None) is weighted
