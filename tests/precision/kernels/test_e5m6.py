import pytest
import torch

from dstrain.precision import e5m6 as plain
from dstrain.precision.formats import FLOOR, Scaling
from dstrain.precision.kernels import e5m6
from dstrain.precision.quantize import quantize_columns
from tests.precision.kernels.cases import DEVICE, assert_equal, matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(40, 136), (19, 301), (3, 5)], ids=str)
def test_packed_and_unpacked(shape: tuple[int, int], dtype: torch.dtype):
    x = matrix(*shape, dtype)
    ours, theirs = e5m6.pack(x), plain.pack(x)
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.scale.nan_to_num(-1), theirs.scale.nan_to_num(-1))
    back, expected = e5m6.unpack(theirs, dtype), plain.unpack(theirs, dtype)
    assert torch.equal(back.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("tile", [128, 32], ids=str)
def test_turned_into_columns_of_e4m3(tile: int):
    packed = plain.pack(matrix(140, 136))
    numbers = plain.unpack(packed, torch.float32)
    ours = e5m6.requantize_columns(packed, Scaling(floor=FLOOR), tile)
    assert_equal(ours, quantize_columns(numbers, Scaling(floor=FLOOR), tile=tile))


def test_every_number_is_rounded_as_fp16_first():
    """All FP16 numbers, among them those halfway between two of E5M6, and a little more: than FP16 shows, and less."""
    halves = torch.arange(0, 0x7C00, 1, dtype=torch.int16).view(torch.float16).float()
    halves = halves[halves <= 65024]
    x = torch.cat((halves, halves * (1 + 2**-14), halves * (1 + 2**-23), -halves))
    tiles = torch.full((-(-len(x) // 127), 128), 65024.0)
    tiles[:, 1:] = torch.nn.functional.pad(x, (0, tiles[:, 1:].numel() - len(x))).view(-1, 127)
    assert torch.equal(e5m6.pack(tiles.to(DEVICE)).values.cpu(), plain.pack(tiles).values)
