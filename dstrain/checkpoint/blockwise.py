"""The FP8 format of DeepSeek-V3's published weights: E4M3 values with one FP32 scale for each block of 128 x 128.

    w = w8 * scale_inv[row // 128, column // 128]

Blocks at the right and the lower edge may be smaller. The scale maps the largest magnitude of a block to 448, the
largest E4M3 value; that magnitude counts as at least 1e-4, as in DeepGEMM's cast, so that a block of zeros stays one.

Shapes: O rows, I columns, P = ceil(O / 128), Q = ceil(I / 128).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_AMAX = 1e-4


def _spread(scale_PQ: Tensor, rows: int, columns: int) -> Tensor:
    """Every element's scale, [O, I]."""
    return scale_PQ.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values [O, I] and FP32 scales [P, Q] of a matrix."""
    rows, columns = weight_OI.shape
    weight_OI = weight_OI.float()
    padded = F.pad(weight_OI, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale_PQ = blocks.abs().amax((1, 3)).clamp_min(SMALLEST_AMAX) / LARGEST
    return (weight_OI / _spread(scale_PQ, rows, columns)).to(torch.float8_e4m3fn), scale_PQ


def dequantize(weight8_OI: Tensor, scale_PQ: Tensor) -> Tensor:
    """The matrix in FP32. Raises ValueError where the scales do not fit it."""
    rows, columns = weight8_OI.shape
    expected = (-(-rows // BLOCK), -(-columns // BLOCK))
    if tuple(scale_PQ.shape) != expected:
        raise ValueError(f"scales of shape {tuple(scale_PQ.shape)} for a matrix of {rows} x {columns}, not {expected}")
    return weight8_OI.float() * _spread(scale_PQ.float(), rows, columns)
