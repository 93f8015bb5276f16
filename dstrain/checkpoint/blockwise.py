"""The FP8 format of DeepSeek-V3's published weights: E4M3 values with one FP32 scale for each block of 128 x 128.

    w = w8 * scale_inv[row // 128, column // 128]

Blocks at the right and the lower edge may be smaller. The scale maps the largest magnitude of a block, which counts as
at least 1e-4, to 448, the largest E4M3 value; or it is the next larger power of two, as DeepSeek publishes since V3.1
("ue8m0"), and as FP8 training here rounds by default: then the file holds the very weights that were trained.

Shapes: O rows, I columns, P = ceil(O / 128), Q = ceil(I / 128).
"""

from torch import Tensor

from dstrain.precision.formats import FLOOR, TILE, Scaling
from dstrain.precision.quantize import Quantized, dequantize_blocks, quantize_blocks

BLOCK = TILE


def quantize(weight_OI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """E4M3 values [O, I] and FP32 scales [P, Q] of a matrix."""
    q = quantize_blocks(weight_OI, Scaling(power_of_two, FLOOR))
    return q.values, q.scale


def dequantize(weight8_OI: Tensor, scale_PQ: Tensor) -> Tensor:
    """The matrix in FP32. Raises ValueError where the scales do not fit it."""
    rows, columns = weight8_OI.shape
    expected = (-(-rows // BLOCK), -(-columns // BLOCK))
    if tuple(scale_PQ.shape) != expected:
        raise ValueError(f"scales of shape {tuple(scale_PQ.shape)} for a matrix of {rows} x {columns}, not {expected}")
    return dequantize_blocks(Quantized(weight8_OI, scale_PQ.float()))
