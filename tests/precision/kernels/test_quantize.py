from math import prod

import pytest
import torch

from dstrain.precision import quantize as plain
from dstrain.precision.formats import FLOOR, Scaling
from dstrain.precision.kernels import quantize
from dstrain.precision.quantize import Quantized
from tests.precision.kernels.cases import COUNTS, DEVICE, assert_equal, ends, matrix

SCALINGS = [Scaling(True, FLOOR), Scaling(True), Scaling(False, FLOOR), Scaling(False)]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(19, 300), (1, 7), (40, 128)], ids=str)
def test_rows(shape: tuple[int, int], dtype: torch.dtype, scaling: Scaling):
    x = matrix(*shape, dtype)
    assert_equal(quantize.quantize_rows(x, scaling), plain.quantize_rows(x, scaling))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_columns_of_experts(scaling: Scaling):
    x = matrix(sum(COUNTS), 150)
    ours = quantize.quantize_columns(x, scaling, ends(COUNTS))
    assert_equal(ours, plain.quantize_columns(x, scaling, COUNTS))


def test_columns_where_rows_do_not_reach_the_bound():
    counts = [128, 256]
    x = matrix(384, 40)
    ours = quantize.quantize_columns(x, SCALINGS[0], ends(counts))
    assert ours.values.shape[1] > 384
    assert not ours.values.view(torch.uint8)[:, 384:].any()
    assert_equal(ours, plain.quantize_columns(x, SCALINGS[0], counts))


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["dense", "experts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_and_columns_at_once(dtype: torch.dtype, counts: list[int] | None):
    x = matrix(sum(COUNTS), 200, dtype)
    rows, columns = quantize.quantize_both(x, SCALINGS[1], None if counts is None else ends(counts))
    assert_equal(rows, plain.quantize_rows(x, SCALINGS[1]))
    assert_equal(columns, plain.quantize_columns(x, SCALINGS[1], counts))


def test_narrow_tiles():
    x = matrix(sum(COUNTS), 200)
    rows, columns = quantize.quantize_both(x, SCALINGS[1], ends(COUNTS), tile=32)
    assert_equal(rows, plain.quantize_rows(x, SCALINGS[1], 32))
    assert_equal(quantize.quantize_rows(x, SCALINGS[1], 32), rows)
    assert_equal(columns, plain.quantize_columns(x, SCALINGS[1], COUNTS, 32))
    back = plain.dequantize_rows(rows)
    assert torch.equal(quantize.dequantize_rows(rows, torch.float32).nan_to_num(7.0), back.nan_to_num(7.0))
    ours = quantize.requantize_columns(rows, SCALINGS[1], ends(COUNTS))
    assert_equal(ours, plain.quantize_columns(back, SCALINGS[1], COUNTS, 32))


@pytest.mark.parametrize("scaling", SCALINGS[::3], ids=str)
def test_quantised_rows_as_columns(scaling: Scaling):
    rows = plain.quantize_rows(matrix(sum(COUNTS), 200), scaling)
    ours = quantize.requantize_columns(rows, scaling, ends(COUNTS))
    assert_equal(ours, plain.quantize_columns(plain.dequantize_rows(rows), scaling, COUNTS))


@pytest.mark.parametrize("scaling", SCALINGS[::3], ids=str)
@pytest.mark.parametrize("shape", [(200, 150), (3, 130, 7), (2, 128, 256)], ids=str)
def test_blocks(shape: tuple[int, ...], scaling: Scaling):
    weight = matrix(prod(shape[:-1]), shape[-1]).view(shape)
    expected = plain.quantize_blocks(weight, scaling)
    blocks, turned = quantize.quantize_blocks_both(weight, scaling)
    assert_equal(blocks, expected)
    assert_equal(turned, Quantized(expected.values.mT.contiguous(), expected.scale.mT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dequantised_rows(dtype: torch.dtype):
    rows = plain.quantize_rows(matrix(40, 300), SCALINGS[2])
    ours, theirs = quantize.dequantize_rows(rows, dtype), plain.dequantize_rows(rows).to(dtype)
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_rows_of_any_stride_and_none_at_all():
    x = matrix(20, 300)
    for part in (x[:, 64:260], x[::2], x.t(), x[:0], x[None]):
        assert_equal(quantize.quantize_rows(part, SCALINGS[0]), plain.quantize_rows(part, SCALINGS[0]))
    for part in (x[:, 64:260], x.t(), x[:0]):
        assert_equal(quantize.quantize_columns(part, SCALINGS[0]), plain.quantize_columns(part, SCALINGS[0]))


def test_every_number_is_rounded_to_the_nearest_even():
    """All E4M3 numbers, the middles between them, and their neighbours on both sides."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat((numbers, middles, middles.nextafter(middles + 1), middles.nextafter(middles - 1)))
    tiles = torch.cat((torch.full((len(x), 1), 448.0), x[:, None].expand(-1, 7)), 1).to(DEVICE)
    rows = quantize.quantize_rows(tiles, SCALINGS[1])
    assert rows.scale.eq(1).all()
    assert torch.equal(rows.values[:, 3].cpu().view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
