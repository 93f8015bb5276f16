"""No CPU has these products; torch's own checks of sizes and layouts run on the meta device."""

import pytest
import torch

from dstrain.precision.backend import Scheme
from dstrain.precision.backends import scaled_mm
from dstrain.precision.backends.scaled_mm import ScaledMmBackend
from dstrain.precision.backends.triton import Weight
from dstrain.precision.quantize import Quantized
from tests.precision.backends.agreement import Case, assert_products_agree

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_fp8.py runs these on the GPU")
BACKEND = ScaledMmBackend(Scheme(), torch.bfloat16)


def meta(q: Quantized) -> Quantized:
    return Quantized(q.values.to("meta"), q.scale.to("meta"))


@pytest.mark.parametrize("shape", [(132, 384, 256), (4, 128, 128), (256, 256, 640)], ids=str)
def test_torch_takes_single_weights(shape: tuple[int, int, int]):
    (rows, out, depth), case = shape, Case(shape)
    x, grad = (case.random(rows, width, dtype=torch.bfloat16) for width in (depth, out))
    own = BACKEND.weight(case.random(out, depth, dtype=torch.bfloat16))
    weight = Weight(meta(own.over_in), meta(own.over_out))
    grad_rows, grad_columns = map(meta, BACKEND.gradient(grad, None))
    y = BACKEND.forward(meta(BACKEND.activation(x)[0]), weight, None)
    dx = BACKEND.input_gradient(grad_rows, weight, None)
    dw = BACKEND.weight_gradient(grad_columns, meta(BACKEND.columns(x, None)), None)
    assert (y.shape, dx.shape, dw.shape) == ((rows, out), (rows, depth), (out, depth))
    assert (y.dtype, dw.dtype) == (torch.bfloat16, torch.float32)


def test_torch_refuses_scales_in_another_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaled_mm, "by_tile", lambda scale_RS: scale_RS)
    x, weight = meta(BACKEND.activation(torch.ones(8, 256))[0]), BACKEND.weight(torch.ones(128, 256))
    with pytest.raises(RuntimeError, match="stride"):
        BACKEND.forward(x, Weight(meta(weight.over_in), meta(weight.over_out)), None)


@pytest.mark.parametrize("case", [Case((8, 136, 72)), Case((140, 128, 128), (12, 128))], ids=["sides", "experts"])
def test_what_torch_does_not_take_is_left_to_triton(case: Case):
    assert_products_agree(ScaledMmBackend(Scheme(), torch.float32), case)


def test_rows_in_no_multiple_of_four_are_left_to_triton():
    """So are no rows at all."""
    weight = BACKEND.weight(torch.eye(128))
    x = torch.arange(6 * 128.0).view(6, 128).bfloat16() % 7
    assert torch.equal(BACKEND.forward(BACKEND.activation(x)[0], weight, None), x)
    assert BACKEND.forward(BACKEND.activation(x[:0])[0], weight, None).shape == (0, 128)
