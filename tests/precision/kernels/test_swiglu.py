import pytest
import torch
from torch import Tensor

from dstrain.precision import quantize as plain
from dstrain.precision.formats import FLOOR, Scaling
from dstrain.precision.kernels.swiglu import swiglu_rows, swiglu_rows_back
from dstrain.precision.quantize import Quantized
from dstrain.precision.swiglu import swiglu, swiglu_backward
from tests.precision.kernels.cases import COUNTS, DEVICE, ends

SCALINGS = [Scaling(True, FLOOR), Scaling(False, FLOOR)]


def sample(rows: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up, weights of rows, gradient of the output; a row of zeros, a large and a tiny one."""
    generator = torch.Generator().manual_seed(0)
    gate_up, grad = (torch.randn(rows, width, generator=generator) for width in (2 * inner, inner))
    gate_up[0], gate_up[1], gate_up[2] = 0, gate_up[1] * 200, gate_up[2] * 1e-6
    weight = torch.rand(rows, generator=generator)
    return gate_up.to(DEVICE, dtype), weight.to(DEVICE), grad.to(DEVICE, dtype)


def assert_close(ours: Quantized, theirs: Quantized) -> None:
    """Values rounded from numbers that may differ in the last digit: a few are one step of E4M3 apart."""
    assert torch.equal(ours.scale.isnan(), theirs.scale.isnan())
    assert (ours.scale / theirs.scale - 1).nan_to_num(0).abs().max() < 0.01
    codes, expected = (q.values.view(torch.int8).int() for q in (ours, theirs))
    # The codes of one sign are in the order of their magnitudes.
    apart = (codes - expected).abs()
    assert codes.shape == expected.shape
    assert apart.max() <= 1
    assert apart.sum() <= 2e-3 * apart.numel()


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("inner", [128, 200], ids=str)
def test_output_as_rows(inner: int, dtype: torch.dtype, scaling: Scaling):
    gate_up, weight, _ = sample(37, inner, dtype)
    for weights in (None, weight):
        assert_close(swiglu_rows(gate_up, weights, scaling), plain.quantize_rows(swiglu(gate_up, weights), scaling))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_from_a_quantised_input(dtype: torch.dtype, scaling: Scaling):
    """An inner width that is no multiple of 128, so that tiles of scales lie across gate and up."""
    gate_up, weight, grad = sample(sum(COUNTS), 72, dtype)
    kept = plain.quantize_rows(gate_up, scaling)
    restored = plain.dequantize_rows(kept).to(dtype)
    near = {"rtol": 2**-7 if dtype is torch.bfloat16 else 1e-5, "atol": 1e-6}
    for weights in (None, weight):
        ours, ours_weight, columns = swiglu_rows_back(kept, weights, grad, scaling, ends(COUNTS))
        theirs, theirs_weight = swiglu_backward(restored, weights, grad)
        assert ours.dtype is dtype
        torch.testing.assert_close(ours, theirs, **near)
        if weights is None:
            assert ours_weight is None
        else:
            torch.testing.assert_close(ours_weight, theirs_weight, rtol=1e-4, atol=1e-4)
        assert_close(columns, plain.quantize_columns(swiglu(restored, weights), scaling, COUNTS))


def test_a_tile_of_nan_is_told_by_its_scales():
    gate_up, weight, grad = sample(130, 128, torch.bfloat16)
    gate_up[129, 3] = torch.nan
    rows = swiglu_rows(gate_up, weight, SCALINGS[0])
    assert rows.scale.isnan().nonzero().tolist() == [[129, 0]]
    kept = plain.quantize_rows(gate_up, SCALINGS[0])
    grad_gate_up, _, columns = swiglu_rows_back(kept, weight, grad, SCALINGS[0])
    # All of the tile is lost, and no other.
    assert grad_gate_up[129].isnan().all()
    assert grad_gate_up[:129].isfinite().all()
    assert columns.scale[:, 1].isnan().all()
    assert columns.scale[:, 0].isfinite().all()
