"""Products through DeepSeek's kernels (github.com/deepseek-ai/DeepGEMM): compute capability 9.0 and 10.x.

Written after the signatures of DeepGEMM 2.8, which are those of 2.0 as far as they are used. **It has not been run on
a GPU**: what surrounds the kernels is tested on a CPU, their calls are not.

    forward, input gradient   fp8_gemm_nt; of experts m_grouped_fp8_gemm_nt_contiguous, whose rows begin at multiples of
                              128, so they are copied there, and the result back
    weight gradient           fp8_gemm_nt with recipe (1, 1, 128), adding to FP32 zeros; of experts Triton's, because
                              DeepGEMM's wants the counts on the host, which would wait for the device

Scales go in as FP32; on capability 10.x DeepGEMM packs their exponents, so they must be powers of two.

Shapes: R rows, K in, M out, E experts, P rows of all experts, each filled up to a multiple of 128.
"""

import importlib

import torch
from torch import Tensor

from dstrain.precision.backend import Operand, Scheme
from dstrain.precision.backends.layout import padded_places, placed
from dstrain.precision.backends.triton import TritonBackend
from dstrain.precision.quantize import Quantized

# Sides that DeepGEMM is tested with; others are Triton's.
SIDES = 64


class DeepGemmBackend(TritonBackend):
    name = "deepgemm"

    def __init__(self, scheme: Scheme, dtype: torch.dtype):
        super().__init__(scheme, dtype)
        self.library = importlib.import_module("deep_gemm")

    def weight_gradient(self, grad: Operand, x: Operand, ends_E: Tensor | None) -> Tensor:
        out, depth = len(grad.values), len(x.values)
        if ends_E is not None or out % SIDES or depth % SIDES or not grad.scale.numel():
            return super().weight_gradient(grad, x, ends_E)
        # On capability 9.0 the kernel only adds to what is there.
        weight_MK = grad.values.new_zeros((out, depth), dtype=torch.float32)
        pairs = (grad.values, grad.scale), (x.values, x.scale)
        self.library.fp8_gemm_nt(*pairs, weight_MK, c=weight_MK, recipe=(1, 1, 128))
        return weight_MK

    def _multiply(self, rows: Quantized, blocks: Quantized, ends_E: Tensor | None) -> Tensor:
        out, depth = blocks.values.shape[-2:]
        if out % SIDES or depth % SIDES or not rows.values.numel():
            return super()._multiply(rows, blocks, ends_E)
        if ends_E is not None:
            return self._multiply_grouped(rows, blocks, ends_E)
        y_RM = rows.values.new_empty((len(rows.values), out), dtype=self.dtype)
        self.library.fp8_gemm_nt((rows.values, rows.scale), (blocks.values, blocks.scale), y_RM)
        return y_RM

    def _multiply_grouped(self, rows: Quantized, blocks: Quantized, ends_E: Tensor) -> Tensor:
        place_R, owner_P = padded_places(ends_E, len(rows.values))
        x = tuple(placed(part, place_R, len(owner_P)) for part in (rows.values, rows.scale))
        y_PM = rows.values.new_empty((len(owner_P), blocks.values.shape[1]), dtype=self.dtype)
        self.library.m_grouped_fp8_gemm_nt_contiguous(x, (blocks.values, blocks.scale), y_PM, owner_P)
        return y_PM.index_select(0, place_R)
