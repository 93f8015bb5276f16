"""SwiGLU between two FP8 products on a GPU: its output quantised at once, and its gradients from an input kept in FP8.

As precision/swiglu.py computes it: in FP32, rounded to the dtype of its surroundings, then quantised. Where the two
differ, it is by the last digit of an exponential.

Shapes: R rows, F inner width, E experts, P rows of all experts, each filled up to a multiple of 128; L rows of a
program, T rows of a tile, V columns of a tile.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from dstrain.precision.formats import TILE, Scaling
from dstrain.precision.kernels.build import Build
from dstrain.precision.kernels.e4m3 import e4m3_numbers
from dstrain.precision.kernels.quantize import (
    ROWS_LAUNCH,
    load_tile,
    rows_of_tile,
    store_columns,
    store_rows,
    store_tile,
)
from dstrain.precision.quantize import Quantized, padded_rows

# A tile of 128 x 128 would need more registers than there are: seven tiles are alive at once.
BACK_LAUNCH = {"WIDTH": 32, "num_warps": 16}


def swiglu_rows(gate_up_R2F: Tensor, weight_R: Tensor | None, scaling: Scaling) -> Quantized:
    """SwiGLU's output times the FP32 weight of each row, quantised: values [R, F], scale [R, ceil(F / 128)].

    The input is BF16 or FP32, contiguous.
    """
    rows, inner = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    tiles = triton.cdiv(inner, TILE)
    values_RF = gate_up_R2F.new_empty((rows, inner), dtype=torch.float8_e4m3fn)
    scale_RS = gate_up_R2F.new_empty((rows, tiles), dtype=torch.float32)
    if values_RF.numel():
        swiglu_kernel[triton.cdiv(rows, ROWS_LAUNCH["LINES"]), tiles](
            gate_up_R2F, weight_R, values_RF.view(torch.uint8), scale_RS, rows, inner, scaling.floor,
            HAS_WEIGHT=weight_R is not None, POWER_OF_TWO=scaling.power_of_two, **ROWS_LAUNCH,
        )  # fmt: skip
    return Quantized(values_RF, scale_RS)


def swiglu_rows_back(
    gate_up: Quantized, weight_R: Tensor | None, grad_RF: Tensor, scaling: Scaling, ends_E: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Quantized]:
    """Gradients of the input [R, 2F], in the dtype of `grad_RF`, and of the weights; and the output, computed again,
    in columns: values [F, P], scale [F, P / 128]. `gate_up`: the input as quantised rows."""
    grad_RF = grad_RF.contiguous()
    (rows, inner), experts = grad_RF.shape, 1 if ends_E is None else len(ends_E)
    padded, tiles = padded_rows(rows, experts), triton.cdiv(inner, BACK_LAUNCH["WIDTH"])
    grad_R2F = grad_RF.new_empty((rows, 2 * inner))
    # Summed over tiles in a fixed order, whoever is done first.
    weight_SR = grad_RF.new_empty((tiles, rows), dtype=torch.float32)
    values_FP = grad_RF.new_empty((inner, padded), dtype=torch.float8_e4m3fn)
    scale_FS = grad_RF.new_empty((inner, padded // TILE), dtype=torch.float32)
    if values_FP.numel():
        swiglu_back_kernel[padded // TILE, tiles](
            gate_up.values.view(torch.uint8), gate_up.scale, weight_R, grad_RF, ends_E,
            grad_R2F, weight_SR, values_FP.view(torch.uint8), scale_FS, rows, inner, padded, scaling.floor,
            EXPERTS=experts, LANES=triton.next_power_of_2(experts), HAS_WEIGHT=weight_R is not None,
            POWER_OF_TWO=scaling.power_of_two, **BACK_LAUNCH,
        )  # fmt: skip
    return grad_R2F, None if weight_R is None else weight_SR.sum(0), Quantized(values_FP, scale_FS)


@triton.jit
def swiglu_kernel(gate_up, weight, values, scale, rows, inner, floor, HAS_WEIGHT: tl.constexpr,
                  POWER_OF_TWO: tl.constexpr, LINES: tl.constexpr):  # fmt: skip
    """A program quantises 128 columns of the output."""
    first, column = tl.program_id(0) * LINES, tl.program_id(1) * 128
    gate_LV = load_tile(gate_up, first, rows, column, inner, 2 * inner, LINES, 128).to(tl.float32)
    up_LV = load_tile(gate_up + inner, first, rows, column, inner, 2 * inner, LINES, 128).to(tl.float32)
    inner_LV = gate_LV * _sigmoid(gate_LV) * up_LV
    if HAS_WEIGHT:
        inner_LV *= _weights(weight, first, rows, LINES)[:, None]
    inner_LV = inner_LV.to(gate_up.dtype.element_ty).to(tl.float32)
    store_rows(inner_LV, values, scale, first, rows, column, inner, floor, POWER_OF_TWO, 1)


@triton.jit
def swiglu_back_kernel(
    gate_up, gate_up_scale, weight, grad, ends_E, grad_gate_up, grad_weight, values, scale, rows, inner, padded, floor,
    EXPERTS: tl.constexpr, LANES: tl.constexpr, HAS_WEIGHT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A program has 128 rows of one expert, and WIDTH columns of the output."""
    tile, column = tl.program_id(0), tl.program_id(1) * WIDTH
    first, end = rows_of_tile(ends_E, tile, rows, EXPERTS, LANES)
    dtype: tl.constexpr = grad.dtype.element_ty
    grad_TV = load_tile(grad, first, end, column, inner, inner, 128, WIDTH).to(tl.float32)
    gate_TV = _load_half(gate_up, gate_up_scale, first, end, column, inner, 0, WIDTH).to(dtype).to(tl.float32)
    up_TV = _load_half(gate_up, gate_up_scale, first, end, column, inner, inner, WIDTH).to(dtype).to(tl.float32)
    sigmoid_TV = _sigmoid(gate_TV)
    silu_TV = gate_TV * sigmoid_TV
    inner_TV = silu_TV * up_TV
    if HAS_WEIGHT:
        row_T = tl.arange(0, 128)
        grad_weight += tl.program_id(1).to(tl.int64) * rows + first
        tl.store(grad_weight + row_T, tl.sum(inner_TV * grad_TV, 1), mask=row_T < end - first)
        weight_T = _weights(weight, first, end, 128)
        inner_TV *= weight_T[:, None]
        grad_TV *= weight_T[:, None]
    store_columns(inner_TV.to(dtype).to(tl.float32), values, scale, tile, padded, column, inner, floor, POWER_OF_TWO, 1)
    grad_up = grad_gate_up + inner
    store_tile(grad_up, (silu_TV * grad_TV).to(dtype), first, end, column, inner, 2 * inner)
    slope_TV = sigmoid_TV * (1.0 + gate_TV * (1.0 - sigmoid_TV))
    store_tile(grad_gate_up, (grad_TV * up_TV * slope_TV).to(dtype), first, end, column, inner, 2 * inner)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _weights(weight, first, end, LINES: tl.constexpr):
    row_L = tl.arange(0, LINES)
    return tl.load(weight + first + row_L, mask=row_L < end - first, other=0.0)


@triton.jit
def _load_half(x, scale, first, end, column, inner, offset, WIDTH: tl.constexpr):
    """Quantised columns of the half that begins at column `offset`. Scales belong to tiles of both halves together, so
    a row may have two."""
    row_T, column_V, begin, scales = tl.arange(0, 128), tl.arange(0, WIDTH), offset + column, tl.cdiv(2 * inner, 128)
    scale += tl.cast(first, tl.int64) * scales
    left_T = tl.load(scale + row_T * scales + begin // 128, mask=row_T < end - first, other=1.0)
    right = tl.minimum((begin + WIDTH - 1) // 128, scales - 1)
    right_T = tl.load(scale + row_T * scales + right, mask=row_T < end - first, other=1.0)
    scale_TV = tl.where(column_V[None, :] < 128 - begin % 128, left_T[:, None], right_T[:, None])
    return e4m3_numbers(load_tile(x + offset, first, end, column, inner, 2 * inner, 128, WIDTH)) * scale_TV


_ROWS = {
    "gate_up": "*bf16", "weight": "*fp32", "values": "*u8", "scale": "*fp32", "rows": "i32", "inner": "i32:16",
    "floor": "fp32", "HAS_WEIGHT": True, "POWER_OF_TWO": True, "LINES": ROWS_LAUNCH["LINES"],
}  # fmt: skip
_BACK = {
    "gate_up": "*u8", "gate_up_scale": "*fp32", "weight": "*fp32", "grad": "*bf16", "ends_E": "*i32",
    "grad_gate_up": "*bf16", "grad_weight": "*fp32", "values": "*u8", "scale": "*fp32", "rows": "i32",
    "inner": "i32:16", "padded": "i32:16", "floor": "fp32", "EXPERTS": 64, "LANES": 64, "HAS_WEIGHT": True,
    "POWER_OF_TWO": True, "WIDTH": BACK_LAUNCH["WIDTH"],
}  # fmt: skip
BUILDS = (
    Build("SwiGLU to rows", swiglu_kernel, _ROWS, ROWS_LAUNCH["num_warps"]),
    Build("SwiGLU backward, columns", swiglu_back_kernel, _BACK, BACK_LAUNCH["num_warps"]),
)
