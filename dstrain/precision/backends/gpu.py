"""What every backend on a GPU has in common: operands are E4M3 values with FP32 scales, made by Triton kernels.

Rows and columns as in precision/quantize.py; what is cached turns from rows into columns without a stop in memory.

Shapes: R rows, K in, M out.
"""

import torch
from torch import Tensor

from dstrain.precision.backend import Backend, Kept, Operand
from dstrain.precision.e5m6 import Packed
from dstrain.precision.formats import E5M6, Format, Scaling
from dstrain.precision.kernels import e5m6
from dstrain.precision.kernels.quantize import (
    dequantize_rows,
    quantize_both,
    quantize_columns,
    quantize_rows,
    requantize_columns,
)
from dstrain.precision.quantize import Quantized


class GpuBackend(Backend):
    """Operands of activations and gradients are `Quantized`."""

    def activation(self, x_RK: Tensor | Quantized) -> tuple[Operand, Quantized]:
        rows = x_RK if isinstance(x_RK, Quantized) else self._rows(x_RK)
        return rows, rows

    def keep(self, x_RK: Tensor, number: Format) -> Kept:
        return e5m6.pack(x_RK) if number is E5M6 else self._rows(x_RK)

    def restore(self, kept: Kept) -> Tensor:
        return e5m6.unpack(kept, self.dtype) if isinstance(kept, Packed) else dequantize_rows(kept, self.dtype)

    def columns(self, x_RK: Tensor | Kept, ends_E: Tensor | None) -> Operand:
        scaling = self.scheme.activations
        if isinstance(x_RK, Packed):
            if ends_E is None:
                return e5m6.requantize_columns(x_RK, scaling, self.scheme.tile)
            x_RK = e5m6.unpack(x_RK, torch.float32)
        return self._columns(x_RK, scaling, ends_E)

    def gradient(self, grad_RM: Tensor | Quantized, ends_E: Tensor | None) -> tuple[Operand, Operand]:
        scaling = self.scheme.gradients
        if isinstance(grad_RM, Quantized):
            return grad_RM, self._columns(grad_RM, scaling, ends_E)
        return quantize_both(grad_RM, scaling, ends_E, self.scheme.tile)

    def _rows(self, x_RK: Tensor) -> Quantized:
        return quantize_rows(x_RK, self.scheme.activations, self.scheme.tile)

    def _columns(self, x_RK: Tensor | Quantized, scaling: Scaling, ends_E: Tensor | None) -> Quantized:
        if isinstance(x_RK, Quantized):
            return requantize_columns(x_RK, scaling, ends_E)
        return quantize_columns(x_RK, scaling, ends_E, self.scheme.tile)
