import pytest
import torch
from torch import Tensor

from dstrain.precision.kernels.gemm_bf16 import multiply_columns, multiply_rows
from dstrain.precision.quantize import padded_rows
from tests.precision.kernels.cases import DEVICE, ends

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="this GPU has no BF16"
)
COUNTS = {"one row more than a tile": [129, 0, 3], "empty first and last": [0, 40, 0], "nobody has any": [0, 0]}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, torch.bfloat16)


def assert_near(ours: Tensor, left: Tensor, right: Tensor) -> None:
    """ours = left @ right.T to FP32's rounding of the sum of magnitudes."""
    left, right = left.double(), right.double()
    assert ours.shape == (len(left), len(right))
    assert ((ours.double() - left @ right.T).abs() <= 1e-6 * left.abs() @ right.abs().T).all()


@pytest.mark.parametrize("case", COUNTS)
def test_rows(case: str):
    counts = COUNTS[case]
    x, weight = random(sum(counts), 150), random(len(counts), 140, 150)
    ours = multiply_rows(x, weight, ends(counts), torch.float32)
    for own, left, right in zip(ours.split(counts), x.split(counts), weight, strict=True):
        assert_near(own, left, right)


def test_result_is_rounded_once():
    x, weight, all_ends = random(30, 128), random(1, 20, 128), ends([30])
    whole = multiply_rows(x, weight, all_ends, torch.float32)
    assert torch.equal(multiply_rows(x, weight, all_ends, torch.bfloat16), whole.bfloat16())


def test_rows_behind_the_last_expert_are_left_alone():
    """They may hold anything: the memory of a transport may be longer than what arrived."""
    x, weight = random(140, 64), random(2, 20, 64)
    x[7:] = torch.nan
    ours = multiply_rows(x, weight, ends([3, 4]), torch.float32)
    assert_near(ours[:3], x[:3], weight[0])
    assert_near(ours[3:7], x[3:7], weight[1])


@pytest.mark.parametrize("case", COUNTS)
def test_columns(case: str):
    """Columns of an expert that end another's are not summed: here these are not zeros."""
    counts = COUNTS[case]
    padded = padded_rows(sum(counts), len(counts))
    grad, x = random(140, padded), random(20, padded)
    ours = multiply_columns(grad, x, ends(counts))
    assert ours.shape == (len(counts), 140, 20)
    first = 0
    for own, count in zip(ours, counts, strict=True):
        mine = slice(first, first + padded_rows(count))
        assert_near(own, grad[:, mine], x[:, mine])
        first = mine.stop
