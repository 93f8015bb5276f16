"""FP8 without FP8 tensor cores: A100, RTX 3090. Operands, caches and what travels are FP8, products are BF16.

Whatever is quantised is quantised by the kernels of every other GPU. Operands are dequantised just before a product,
into memory that is free again behind it. Scales must be powers of two: then every dequantised value is exact in BF16,
and products are what FP8 hardware makes of the same operands, up to the order of sums. Plain scales would round each
operand once more, and a run would depend on the GPU it began on.

torch multiplies by single weights; by experts our own kernels do, because torch's wait for the host below capability
9.0. Weight gradients are FP32, of experts too. **It has not been run on a GPU.**

Shapes: R rows, K in, M out, P padded rows, E experts.
"""

import torch
from torch import Tensor

from dstrain.precision.backend import Operand
from dstrain.precision.backends.triton import TritonBackend
from dstrain.precision.kernels.gemm_bf16 import multiply_columns, multiply_rows
from dstrain.precision.kernels.quantize import dequantize_rows
from dstrain.precision.quantize import Quantized, spread


class Bf16Backend(TritonBackend):
    name = "bf16"

    def weight_gradient(self, grad: Operand, x: Operand, ends_E: Tensor | None) -> Tensor:
        grad_MP, x_KP = dequantize_rows(grad), dequantize_rows(x)
        if ends_E is None:
            return torch.mm(grad_MP, x_KP.t(), out_dtype=torch.float32)
        return multiply_columns(grad_MP, x_KP, ends_E)

    def _multiply(self, rows: Quantized, blocks: Quantized, ends_E: Tensor | None) -> Tensor:
        x_RK, weight = dequantize_rows(rows), dequantize_blocks(blocks)
        if ends_E is None:
            return torch.mm(x_RK, weight.t(), out_dtype=self.dtype)
        return multiply_rows(x_RK, weight, ends_E, self.dtype)


def dequantize_blocks(blocks: Quantized) -> Tensor:
    """BF16 [..., M, K]: as rows, whose scales are those of their blocks."""
    scale = spread(blocks.scale.mT, blocks.values.shape[-2]).mT.contiguous()
    return dequantize_rows(Quantized(blocks.values, scale))
