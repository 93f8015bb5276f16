"""Products through cuBLASLt, which torch calls `scaled_mm`: compute capability 9.0, CUDA 12.9 or later.

It takes one weight at a time, so products of experts are Triton's, and so are those whose sides it can't take.

Shapes: R rows, K in, M out, P padded rows, S tiles of 128 of the sum's dimension, B blocks of 128 along M.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from dstrain.precision.backend import Operand
from dstrain.precision.backends.triton import TritonBackend
from dstrain.precision.formats import TILE
from dstrain.precision.quantize import Quantized

# cuBLASLt wants addresses of rows of scales in multiples of 16 bytes, and sides of FP8 matrices in multiples of 16.
SCALES_TOGETHER = 4
SIDES = 16


class ScaledMmBackend(TritonBackend):
    name = "scaled_mm"

    def weight_gradient(self, grad: Operand, x: Operand, ends_E: Tensor | None) -> Tensor:
        if ends_E is not None or len(grad.values) % SIDES or len(x.values) % SIDES or not grad.scale.numel():
            return super().weight_gradient(grad, x, ends_E)
        tiles = ScalingType.BlockWise1x128
        scales = by_tile(grad.scale), tiles, by_tile(x.scale), tiles
        return F.scaled_mm(grad.values, x.values.t(), *scales, output_dtype=torch.float32)

    def _multiply(self, rows: Quantized, blocks: Quantized, ends_E: Tensor | None) -> Tensor:
        count = len(rows.values)
        if ends_E is not None or not count or count % SCALES_TOGETHER or any(n % TILE for n in blocks.values.shape):
            return super()._multiply(rows, blocks, ends_E)
        scale_BS = F.pad(blocks.scale, (0, -blocks.scale.shape[1] % SCALES_TOGETHER)).contiguous()
        scales = by_tile(rows.scale), ScalingType.BlockWise1x128, scale_BS.t(), ScalingType.BlockWise128x128
        return F.scaled_mm(rows.values, blocks.values.t(), *scales, output_dtype=self.dtype)


def by_tile(scale_RS: Tensor) -> Tensor:
    """The same scales, those of one tile of all rows side by side in memory."""
    return scale_RS.t().contiguous().t()
