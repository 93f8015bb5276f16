import pytest
import torch

from dstrain.dispatch.permute import Bags
from dstrain.precision.formats import Scaling
from dstrain.precision.kernels.permute import gather_rows, sum_rows
from dstrain.precision.quantize import quantize_rows
from tests.precision.kernels.cases import DEVICE, matrix


@pytest.mark.parametrize("tile", [128, 32], ids=str)
@pytest.mark.parametrize("hidden", [1200, 40], ids=str)
def test_rows_move_with_their_scales(hidden: int, tile: int):
    rows = quantize_rows(matrix(13, hidden), Scaling(), tile)
    row_N = torch.tensor([12, 0, 0, 5, 7, 7, 7, 1, 3, 12, 2], device=DEVICE)
    moved = gather_rows(rows, row_N)
    assert moved.tile == tile
    assert torch.equal(moved.values.view(torch.uint8), rows.values.view(torch.uint8)[row_N])
    assert torch.equal(moved.scale.nan_to_num(-1), rows.scale[row_N].nan_to_num(-1))
    assert gather_rows(rows, row_N[:0]).values.shape == (0, hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_are_those_of_bags(dtype: torch.dtype):
    """Rows with no pair, one, and several; the last one empty."""
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(23, 1100, generator=generator).to(dtype).to(DEVICE)
    target_N = torch.randint(0, 9, (23,), generator=generator)
    target_N[target_N == 4] = 5
    bags = Bags.by_target(target_N.to(DEVICE), 11)
    ours = sum_rows(rows_ND, bags.order_N, bags.start_R)
    assert torch.equal(ours, bags.sum(rows_ND))
    assert not ours[4].any()
    assert not ours[10].any()
