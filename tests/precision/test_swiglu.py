"""The fused activation against its plain meaning."""

import torch

from dstrain.precision.swiglu import swiglu, swiglu_reference


def test_value_and_gradient_are_those_of_the_reference() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 24, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, 12).double()
    torch.testing.assert_close(swiglu(x), swiglu_reference(x), rtol=0, atol=0)
    (ours,) = torch.autograd.grad((swiglu(x) * weight).sum(), x)
    (plain,) = torch.autograd.grad((swiglu_reference(x) * weight).sum(), x)
    torch.testing.assert_close(ours, plain)


def test_only_the_input_is_kept() -> None:
    x, kept = torch.randn(4, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(x)
    assert kept == [x.data_ptr()]


def test_no_rows_at_all() -> None:
    x = torch.randn(0, 16, requires_grad=True)
    swiglu(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 16)
