"""The quick forms on a CPU against the plain ones, bit by bit."""

import pytest
import torch

from dstrain.precision.formats import Scaling
from dstrain.precision.quantize import (
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)
from dstrain.precision.rounding import (
    WIDE_ELEMENTS,
    decode_rows,
    e4m3_values,
    encode_rows,
    round_blocks,
    round_columns,
    round_rows,
)
from tests.precision.cases import SCALINGS, SHAPES, matrix, same

LONG = (2 * WIDE_ELEMENTS // 96, 96)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rows_and_blocks(scaling: Scaling, dtype: torch.dtype):
    for shape in (*SHAPES, LONG):
        x = matrix(*shape, dtype)
        for tile in (128, 32):
            q = quantize_rows(x, scaling, tile)
            assert same(round_rows(x, scaling, torch.float32, tile), dequantize_rows(q))
            kept, wide = encode_rows(x, scaling, dtype, tile)
            assert torch.equal(kept.values.view(torch.uint8), q.values.view(torch.uint8))
            assert same(kept.scale, q.scale)
            assert same(wide, dequantize_rows(q).to(dtype))
            assert same(decode_rows(q, torch.float32), dequantize_rows(q))
        stack = torch.stack((x, x.flip(0)))
        assert same(round_blocks(stack, scaling, torch.float32), dequantize_blocks(quantize_blocks(stack, scaling)))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("counts", [[300], [100, 0, 200], [0, 300], [128, 128, 44], [1] * 300], ids=str)
def test_columns_of_experts(counts: list[int], scaling: Scaling):
    for width in (7, 130):
        x = matrix(300, width)
        rounded = round_columns(x, scaling, torch.float32, counts)
        expected = dequantize_rows(quantize_columns(x, scaling, counts)).t()
        begin = 0
        for part in rounded.split(counts):
            assert same(part, expected[begin : begin + len(part)])
            begin += -(-len(part) // 128) * 128


def test_every_code_is_decoded():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = ~codes.float().isnan()
    assert torch.equal(e4m3_values(codes)[finite], codes.float()[finite])
