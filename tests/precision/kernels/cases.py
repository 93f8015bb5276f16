"""Hard matrices for quantisers, and what it means that two quantised ones are equal."""

import torch
from torch import Tensor

from dstrain.precision.quantize import Quantized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Empty experts first, in the middle and last; whole tiles, and one row more.
COUNTS = [0, 3, 128, 0, 129, 1, 0]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Every hard case in a tile of its own, as far as there are tiles; random numbers around them."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator)
    x *= 10.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
    hard = [
        lambda tile: tile.zero_(),
        lambda tile: tile.mul_(1e-5).view(-1)[:1].fill_(3e38),
        lambda tile: tile.mul_(1e-5).view(-1)[:1].fill_(-2e38),
        lambda tile: tile.mul_(1e-39),
        lambda tile: tile.view(-1)[:1].fill_(torch.inf),
        lambda tile: tile.view(-1)[-1:].fill_(torch.nan),
        lambda tile: tile.fill_(-0.0),
        lambda tile: tile.copy_(torch.linspace(-448, 448, tile.numel()).view_as(tile)),
    ]
    for row, spoil in zip(range(0, rows, 2), hard, strict=False):
        spoil(x[row : row + 1, :128])
    return x.to(dtype).to(DEVICE)


def assert_equal(ours: Quantized, theirs: Quantized) -> None:
    """Bit by bit, but that all NaN are alike."""
    assert ours.values.dtype is torch.float8_e4m3fn
    assert torch.equal(ours.values.cpu().view(torch.uint8), theirs.values.cpu().view(torch.uint8))
    assert ours.scale.shape == theirs.scale.shape
    assert torch.equal(ours.scale.cpu().nan_to_num(-1), theirs.scale.cpu().nan_to_num(-1))


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0, dtype=torch.int32)
