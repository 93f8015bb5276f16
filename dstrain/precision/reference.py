"""The backend for any device: operands are rounded to what FP8 keeps and multiplied in a wider dtype.

With power-of-two scales the dequantised values are exact in BF16, so products in BF16 with FP32 sums compute what FP8
hardware computes with full promotion. Plain scales need FP32. Weight gradients are FP32 products throughout.

Shapes: R rows, K in, M out, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.precision import e5m6
from dstrain.precision.backend import Backend, Kept, Sides
from dstrain.precision.e5m6 import Packed
from dstrain.precision.formats import E5M6, Format
from dstrain.precision.quantize import Quantized
from dstrain.precision.rounding import decode_rows, encode_rows, round_blocks, round_columns, round_rows

# Rounded: the same tensor where both sides have the same tiles.
Weight = Sides[Tensor]


class Reference(Backend):
    name = "reference"

    @property
    def operand_dtype(self) -> torch.dtype:
        """In which every dequantised value is exact."""
        return self.dtype if self.scheme.power_of_two else torch.float32

    def weight(self, weight: Tensor) -> Weight:
        scaling, dtype = self.scheme.activations, self.operand_dtype
        if self.scheme.blocks:
            rounded = round_blocks(weight, scaling, dtype)
            return Weight(rounded, rounded)
        matrix, tile = weight.flatten(0, -2), self.scheme.tile
        over_in = round_rows(matrix, scaling, dtype, tile).view(weight.shape)
        # The rows of an expert begin a tile of their own.
        counts = [weight.shape[-2]] * (len(weight) if weight.dim() == 3 else 1)
        return Weight(over_in, round_columns(matrix, scaling, dtype, counts, tile).view(weight.shape))

    def activation(self, x_RK: Tensor | Quantized) -> tuple[Tensor, Quantized]:
        if isinstance(x_RK, Quantized):
            return decode_rows(x_RK, self.operand_dtype), x_RK
        kept, operand = encode_rows(x_RK, self.scheme.activations, self.operand_dtype, self.scheme.tile)
        return operand, kept

    def keep(self, x_RK: Tensor, number: Format) -> Kept:
        return e5m6.pack(x_RK) if number is E5M6 else self.activation(x_RK)[1]

    def restore(self, kept: Kept) -> Tensor:
        return e5m6.unpack(kept, self.dtype) if isinstance(kept, Packed) else decode_rows(kept, self.dtype)

    def columns(self, x_RK: Tensor | Kept, ends_E: Tensor | None) -> Tensor:
        if isinstance(x_RK, Packed):
            x_RK = e5m6.unpack(x_RK, self.operand_dtype)
        elif isinstance(x_RK, Quantized):
            x_RK = decode_rows(x_RK, self.operand_dtype)
        scheme = self.scheme
        return round_columns(x_RK, scheme.activations, self.operand_dtype, _counts(ends_E), scheme.tile)

    def gradient(self, grad_RM: Tensor | Quantized, ends_E: Tensor | None) -> tuple[Tensor, Tensor]:
        scheme, dtype = self.scheme, self.operand_dtype
        if isinstance(grad_RM, Quantized):
            grad_RM = rows_RM = decode_rows(grad_RM, dtype)
        elif scheme.gradient_blocks:
            rounded = round_blocks(grad_RM, scheme.gradients, dtype)
            return rounded, rounded
        else:
            rows_RM = round_rows(grad_RM, scheme.gradients, dtype, scheme.tile)
        return rows_RM, round_columns(grad_RM, scheme.gradients, dtype, _counts(ends_E), scheme.tile)

    def forward(self, x: Tensor, weight: Weight, ends_E: Tensor | None) -> Tensor:
        weight_MK = weight.over_in
        if ends_E is None:
            return F.linear(x, weight_MK).to(self.dtype)
        return F.grouped_mm(x, weight_MK.transpose(1, 2), offs=ends_E).to(self.dtype)

    def input_gradient(self, grad: Tensor, weight: Weight, ends_E: Tensor | None) -> Tensor:
        product = grad @ weight.over_out if ends_E is None else F.grouped_mm(grad, weight.over_out, offs=ends_E)
        return product.to(self.dtype)

    def weight_gradient(self, grad: Tensor, x: Tensor, ends_E: Tensor | None) -> Tensor:
        grad_MR, x_RK = grad.float().t(), x.float()
        return grad_MR @ x_RK if ends_E is None else F.grouped_mm(grad_MR, x_RK, offs=ends_E)


def _counts(ends_E: Tensor | None) -> Sequence[int] | None:
    """Rows of each expert; the host waits for the device, which is why this backend is not quick on a GPU."""
    return None if ends_E is None else ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
