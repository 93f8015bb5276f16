"""No CPU has these products; torch's own checks of sizes and layouts run on the meta device."""

import pytest
import torch
from torch import Tensor

from dstrain.precision.backend import Scheme
from dstrain.precision.backends.mxfp8 import Mxfp8Backend, Side, Weight, columns_side, rows_side
from dstrain.precision.quantize import Quantized, padded_rows, quantize_columns, quantize_rows
from tests.precision.backends.agreement import Case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_fp8.py runs these on the GPU")
BACKEND = Mxfp8Backend(Scheme(tile=32, blocks=False), torch.bfloat16)
OUT, DEPTH = 64, 160


def meta(q: Quantized | Side) -> Quantized | Side:
    return type(q)(q.values.to("meta"), q.scale.to("meta"))


def on_meta(weight: Weight) -> Weight:
    return Weight(meta(weight.over_in), meta(weight.over_out))


@pytest.mark.parametrize("rows", [1, 96, 130])
def test_torch_takes_the_sides_of_single_weights(rows: int):
    case = Case((rows, OUT, DEPTH))
    x, grad = (case.random(rows, width, dtype=torch.bfloat16) for width in (DEPTH, OUT))
    weight = on_meta(BACKEND.weight(case.random(OUT, DEPTH, dtype=torch.bfloat16)))
    grad_rows, grad_columns = map(meta, BACKEND.gradient(grad, None))
    y = BACKEND.forward(meta(BACKEND.activation(x)[0]), weight, None)
    dx = BACKEND.input_gradient(grad_rows, weight, None)
    dw = BACKEND.weight_gradient(grad_columns, meta(BACKEND.columns(x, None)), None)
    assert (y.shape, dx.shape, dw.shape) == ((rows, OUT), (rows, DEPTH), (OUT, DEPTH))
    assert dw.dtype is torch.float32


def test_torch_refuses_scales_of_another_size():
    side = BACKEND.weight(torch.ones(OUT, DEPTH)).over_in
    weight = Weight(meta(Side(side.values, side.scale[:512])), meta(side))
    with pytest.raises(RuntimeError, match="scale_b must have 1024"):
        BACKEND.forward(meta(quantize_rows(torch.ones(3, DEPTH), BACKEND.scheme.activations, 32)), weight, None)


@pytest.mark.parametrize("counts", [(3, 130, 0), (128, 0, 5)], ids=str)
def test_torch_takes_the_sides_of_experts(counts: tuple[int, ...]):
    """By the checks of the op's older name, for the newer one has none on the meta device."""
    case = Case((133, OUT, DEPTH), counts)
    x, grad = (case.random(133, width, dtype=torch.bfloat16) for width in (DEPTH, OUT))
    weight = BACKEND.weight(case.random(3, OUT, DEPTH, dtype=torch.bfloat16))
    left = rows_side(BACKEND.activation(x)[0], case.ends)
    assert grouped(left, weight.over_in, case.ends).shape == (133, OUT)
    assert left.scale.shape == (padded_rows(133, 3), 8)
    columns = (
        columns_side(q, case.ends) for q in (BACKEND.gradient(grad, case.ends)[1], BACKEND.columns(x, case.ends))
    )
    assert grouped(*columns, case.ends).shape == (3, OUT, DEPTH)


def grouped(left: Side, right: Side, ends_E: Tensor) -> Tensor:
    sides = meta(left), meta(right)
    values, scales = (side.values for side in sides), (side.scale for side in sides)
    a, b = values
    return torch._scaled_grouped_mm(a, b.mT, *scales, ends_E.to("meta"), out_dtype=torch.bfloat16)


def test_operands_are_those_of_the_plain_quantisers():
    """Tiles of 32, turned weights along their own rows, and what is cached turned without its old scales."""
    case = Case((133, OUT, DEPTH), (3, 130, 0))
    x = case.random(133, DEPTH, dtype=torch.bfloat16)
    weight = case.random(3, OUT, DEPTH, dtype=torch.bfloat16)
    scaling = BACKEND.scheme.activations
    turned = quantize_rows(weight.mT, scaling, 32).values
    assert torch.equal(BACKEND.weight(weight).over_out.values.view(torch.uint8), turned.view(torch.uint8))
    kept = BACKEND.activation(x)[1]
    plain = quantize_columns(BACKEND.restore(kept), scaling, case.counts, 32)
    columns = BACKEND.columns(kept, case.ends)
    assert torch.equal(columns.values.view(torch.uint8), plain.values.view(torch.uint8))
    assert torch.equal(columns.scale, plain.scale)


def test_experts_without_rows_get_zeros():
    ends = torch.zeros(2, dtype=torch.int32)
    none = BACKEND.gradient(torch.ones(0, OUT), ends)[1], BACKEND.columns(torch.ones(0, DEPTH), ends)
    weight = BACKEND.weight(torch.ones(2, OUT, DEPTH))
    assert BACKEND.forward(BACKEND.activation(torch.ones(0, DEPTH))[0], weight, ends).shape == (0, OUT)
    ends = torch.zeros(1, dtype=torch.int32)
    none = BACKEND.gradient(torch.ones(0, OUT), ends)[1], BACKEND.columns(torch.ones(0, DEPTH), ends)
    assert torch.equal(BACKEND.weight_gradient(*none, ends), torch.zeros(1, OUT, DEPTH))
