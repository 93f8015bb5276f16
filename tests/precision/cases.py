"""Matrices that quantisers must get right: odd sides, and rows with every edge value."""

import torch
from torch import Tensor

from dstrain.precision.formats import FLOOR, Scaling

SCALINGS = [Scaling(power_of_two, floor) for power_of_two in (True, False) for floor in (0.0, FLOOR)]
SHAPES = [(7, 300), (300, 7), (256, 256), (131, 129), (0, 128), (1, 1)]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of very different sizes; if there is room, one of zeros, one of denormals, one outlier, infinity, NaN."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(8 * torch.randn(rows, 1, generator=generator))
    x = (torch.randn(rows, columns, generator=generator) * size).to(dtype)
    if rows >= 7:
        x[1, columns // 2] = float("inf")
        x[2, -1] = float("nan")
        x[3] = 0
        x[4] = 2e38
        x[5] = 1e-40
        x[6, 0] = 3e4
    return x


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit by bit, whatever NaN looks like and whatever sign a zero has."""
    alike = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and bool(alike.all())
