"""MXFP8 (OCP Microscaling): E4M3 with a power-of-two scale per 32 numbers of the sum's dimension, on both sides.

The tensor cores of compute capability 10.x apply the scales themselves; there is nothing to promote. torch calls them
`scaled_mm`, and `scaled_grouped_mm` for experts. **It has not been run on a GPU**; layouts are tested on a CPU against
torch's own checks. torch's product of experts gives BF16 only, so theirs is the one weight gradient that is rounded to
BF16 before micro-batches are summed in FP32.

Shapes: R rows, K in, M out, E experts, P padded rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType, SwizzleType

from dstrain.precision.backend import Operand, Sides
from dstrain.precision.backends.gpu import GpuBackend
from dstrain.precision.backends.layout import by_expert, padded_ends, padded_places, placed, swizzled
from dstrain.precision.formats import TILE
from dstrain.precision.kernels.quantize import quantize_rows
from dstrain.precision.quantize import Quantized

TILES, SWIZZLE = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4


@dataclass(frozen=True)
class Side:
    """Values, and their scales in the tensor cores' order."""

    values: Tensor
    scale: Tensor


# In tiles along K, [.., M, K], and along M, [.., K, M].
Weight = Sides[Side]


class Mxfp8Backend(GpuBackend):
    name = "mxfp8"

    def weight(self, weight: Tensor) -> Weight:
        return Weight(self._weight_side(weight), self._weight_side(weight.mT.contiguous()))

    def forward(self, x: Quantized, weight: Weight, ends_E: Tensor | None) -> Tensor:
        return self._multiply(x, weight.over_in, ends_E)

    def input_gradient(self, grad: Quantized, weight: Weight, ends_E: Tensor | None) -> Tensor:
        return self._multiply(grad, weight.over_out, ends_E)

    def weight_gradient(self, grad: Operand, x: Operand, ends_E: Tensor | None) -> Tensor:
        if not grad.values.numel():
            experts = () if ends_E is None else (len(ends_E),)
            return grad.values.new_zeros((*experts, len(grad.values), len(x.values)), dtype=torch.float32)
        left, right = columns_side(grad, ends_E), columns_side(x, ends_E)
        if ends_E is None:
            return _scaled_mm(left, right, torch.float32)
        # Of an expert without rows torch promises nothing.
        is_empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return _scaled_grouped_mm(left, right, padded_ends(ends_E)).float().masked_fill_(is_empty_E[:, None, None], 0.0)

    def _multiply(self, rows: Quantized, weight: Side, ends_E: Tensor | None) -> Tensor:
        if not rows.values.numel():
            return rows.values.new_empty((0, weight.values.shape[-2]), dtype=self.dtype)
        left = rows_side(rows, ends_E)
        if ends_E is None:
            return _scaled_mm(left, weight, self.dtype)
        return _scaled_grouped_mm(left, weight, ends_E)

    def _weight_side(self, weight: Tensor) -> Side:
        q = quantize_rows(weight, self.scheme.activations, self.scheme.tile)
        return Side(q.values, swizzled(q.scale).flatten(-3))


def rows_side(rows: Quantized, ends_E: Tensor | None) -> Side:
    """Rows of a product over channels; with `ends_E` the scales of every expert begin a block of 128 rows."""
    if ends_E is None:
        return Side(rows.values, swizzled(rows.scale).flatten())
    place_R, owner_P = padded_places(ends_E, len(rows.values))
    blocks = swizzled(placed(rows.scale, place_R, len(owner_P)))
    return Side(rows.values, blocks.view(len(owner_P), -1))


def columns_side(columns: Quantized, ends_E: Tensor | None) -> Side:
    """Columns of a product over rows; with `ends_E` the scales of every expert lie on their own."""
    blocks = swizzled(columns.scale)
    if ends_E is None:
        return Side(columns.values, blocks.flatten())
    return Side(columns.values, by_expert(blocks, ends_E).view(blocks.shape[0] * TILE, -1))


def _scaled_mm(left: Side, right: Side, dtype: torch.dtype) -> Tensor:
    scales = left.scale, TILES, right.scale, TILES, SWIZZLE, SWIZZLE
    return F.scaled_mm(left.values, right.values.mT, *scales, output_dtype=dtype)


def _scaled_grouped_mm(left: Side, right: Side, ends_E: Tensor) -> Tensor:
    scales = left.scale, TILES, right.scale, TILES, SWIZZLE, SWIZZLE
    return F.scaled_grouped_mm(  # type: ignore[attr-defined]
        left.values, right.values.mT, *scales, offs=ends_E, output_dtype=torch.bfloat16
    )
