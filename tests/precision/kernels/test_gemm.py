"""Sums have no one right order, so products are held against FP64 of the same quantised operands: what is left is the
rounding of FP32."""

import pytest
import torch
from torch import Tensor

from dstrain.precision.formats import Scaling
from dstrain.precision.kernels.gemm import multiply_rows
from dstrain.precision.kernels.gemm_columns import multiply_columns
from dstrain.precision.quantize import (
    Quantized,
    dequantize_blocks,
    dequantize_rows,
    padded_rows,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    CUDA and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no FP8 tensor cores"
)
# On Hopper the tensor cores cut off what they sum behind some 14 bits.
ERROR = 2e-4 if CUDA else 1e-6
SCALINGS = [Scaling(True), Scaling(False)]
COUNTS = {
    "one row more than tiles": [129, 0, 3],
    "empty first and last": [0, 40, 7, 0],
    "one has all": [0, 130, 0],
    "nobody has any": [0, 0],
}


def random(*shape: int) -> Tensor:
    """With outliers, and rows of very different size."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator)
    x *= 10.0 ** torch.randint(-3, 4, (shape[-2], 1), generator=generator)
    return torch.where(torch.rand(*shape, generator=generator) < 0.01, 50 * x, x).to(DEVICE)


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0, dtype=torch.int32)


def assert_near(ours: Tensor, left: Tensor, right: Tensor) -> None:
    """ours = left @ right.T to FP32's rounding, as a share of the sum of magnitudes: sums may cancel out."""
    left, right = left.double(), right.double()
    assert ours.shape == (len(left), len(right))
    bound = ERROR * left.abs() @ right.abs().T
    assert ((ours.double() - left @ right.T).abs() <= bound).all()


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (130, 200, 300), (5, 128, 256), (140, 17, 130)], ids=str)
def test_rows(shape: tuple[int, int, int], scaling: Scaling):
    rows, out, depth = shape
    x, weight = quantize_rows(random(rows, depth), scaling), quantize_blocks(random(out, depth), scaling)
    ours = multiply_rows(x, weight, None, torch.float32)
    assert_near(ours, dequantize_rows(x), dequantize_blocks(weight))


@pytest.mark.parametrize("case", COUNTS)
def test_rows_of_experts(case: str):
    counts = COUNTS[case]
    x = quantize_rows(random(sum(counts), 150), SCALINGS[1])
    weight = quantize_blocks(random(len(counts), 140, 150), SCALINGS[1])
    ours = multiply_rows(x, weight, ends(counts), torch.float32)
    plain_x, plain_weight = dequantize_rows(x), dequantize_blocks(weight)
    for own, left, right in zip(ours.split(counts), plain_x.split(counts), plain_weight, strict=True):
        assert_near(own, left, right)


def test_result_is_rounded_once():
    x, weight = (quantize(random(30, 256), SCALINGS[0]) for quantize in (quantize_rows, quantize_blocks))
    whole = multiply_rows(x, weight, None, torch.float32)
    assert torch.equal(multiply_rows(x, weight, None, torch.bfloat16), whole.bfloat16())


def test_rows_behind_the_last_expert_are_left_alone():
    """They may hold anything: the memory of a transport may be longer than what arrived."""
    x = quantize_rows(random(140, 128), SCALINGS[0])
    weight = quantize_blocks(random(2, 20, 128), SCALINGS[0])
    ours = multiply_rows(x, weight, ends([3, 4]), torch.float32)
    assert_near(ours[:3], dequantize_rows(x)[:3], dequantize_blocks(weight)[0])
    assert_near(ours[3:7], dequantize_rows(x)[3:7], dequantize_blocks(weight)[1])


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (200, 130, 140), (40, 260, 300)], ids=str)
def test_columns(shape: tuple[int, int, int], scaling: Scaling):
    out, depth, rows = shape
    grad, x = (quantize_columns(random(rows, width), scaling) for width in (out, depth))
    assert_near(multiply_columns(grad, x, None), dequantize_rows(grad), dequantize_rows(x))


@pytest.mark.parametrize("case", COUNTS)
def test_columns_of_experts(case: str):
    counts = COUNTS[case]
    grad, x = (quantize_columns(random(sum(counts), width), SCALINGS[1], counts) for width in (140, 20))
    ours = multiply_columns(grad, x, ends(counts))
    assert ours.shape == (len(counts), 140, 20)
    padded = [padded_rows(count) for count in counts]
    padded.append(grad.values.shape[1] - sum(padded))
    sides = (dequantize_rows(side).split(padded, 1) for side in (grad, x))
    for own, left, right in zip(ours, *(side[:-1] for side in sides), strict=True):
        assert_near(own, left, right)


def test_a_tile_of_nan_spoils_what_it_enters_and_nothing_else():
    x_RK = random(4, 256)
    x_RK[1, 200] = torch.nan
    x, weight = quantize_rows(x_RK, SCALINGS[0]), quantize_blocks(random(6, 256), SCALINGS[0])
    ours = multiply_rows(x, weight, None, torch.float32)
    assert ours.isnan().all(1).tolist() == [False, True, False, False]
    assert not ours[[0, 2, 3]].isnan().any()


def test_sums_are_promoted_every_128():
    """A small number after a large one: a sum of fewer than 24 bits would lose it."""
    values = torch.zeros(1, 256)
    values[0, 0], values[0, 128] = 448, 2**-9
    x = Quantized(values.to(DEVICE, torch.float8_e4m3fn), torch.tensor([[1.0, 1.0]], device=DEVICE))
    weight = Quantized(torch.ones(1, 256, device=DEVICE).to(torch.float8_e4m3fn), torch.ones(1, 2, device=DEVICE))
    assert multiply_rows(x, weight, None, torch.float32).item() == 448 + 2**-9
