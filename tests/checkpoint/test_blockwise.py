"""The block-scaled FP8 format against its definition, element by element."""

import pytest
import torch
from torch import Tensor

from dstrain.checkpoint.blockwise import dequantize, quantize

# The smallest, exact multiples of a block, and V3's kv_a (576 rows) cut to a narrow input.
SHAPES = [(1, 1), (128, 256), (129, 127), (192, 320), (576, 448)]


def random_matrix(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    # Magnitudes that differ between blocks, as outliers make them.
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp2()


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_and_values_follow_the_definition(shape: tuple[int, int]) -> None:
    weight = random_matrix(*shape)
    values, scales = quantize(weight)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, weight.shape)
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, (-(-shape[0] // 128), -(-shape[1] // 128)))
    for p, rows in enumerate(weight.split(128)):
        for q, block in enumerate(rows.split(128, dim=1)):
            assert scales[p, q] == block.abs().max() / 448
            stored = values[p * 128 : (p + 1) * 128, q * 128 : (q + 1) * 128]
            assert torch.equal(stored.float(), (block / scales[p, q]).to(torch.float8_e4m3fn).float())
            read = dequantize(values, scales)[p * 128 : (p + 1) * 128, q * 128 : (q + 1) * 128]
            assert torch.equal(read, stored.float() * scales[p, q])


def test_rounding_error_is_that_of_e4m3() -> None:
    weight = random_matrix(576, 448)
    values, scales = quantize(weight)
    error = (dequantize(values, scales) - weight).abs()
    # Three mantissa bits: half a unit in the last place is 1/16 of the value; below 2^-6 the steps are even.
    step = torch.maximum(weight.abs() / 16, scales.max() * 2**-10)
    assert (error <= step * 1.0001).all()
    assert error.max() > 0


def test_zeros_stay_zeros() -> None:
    weight = random_matrix(256, 200)
    weight[:128] = 0
    values, scales = quantize(weight)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    assert torch.equal(dequantize(values, scales)[:128], weight[:128])


def test_quantising_again_changes_no_value() -> None:
    values, scales = quantize(random_matrix(300, 300))
    again, scales_again = quantize(dequantize(values, scales))
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
    torch.testing.assert_close(scales_again, scales, rtol=1e-6, atol=0)


def test_scales_of_another_matrix_are_refused() -> None:
    values, scales = quantize(random_matrix(192, 320))
    with pytest.raises(ValueError, match=r"scales of shape \(2, 2\) for a matrix of 192 x 320, not \(2, 3\)"):
        dequantize(values, scales[:, :2])
