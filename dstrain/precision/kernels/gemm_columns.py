"""Weight gradients of quantised columns: dw[m, k] = sum over p of g[m, p] x[k, p], of each expert over its own rows.

Both sides lie transposed, with scales for 1x128 along p, and every expert's rows begin at a multiple of 128; so a step
of 128 along p belongs to one expert and has one scale for each row of the two sides. Sums are promoted as in gemm.py.

Shapes: M out, K in, P padded rows, E experts, S tiles of 128 along P; T rows of a tile, C its columns, V values of a
step.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from dstrain.precision.formats import TILE
from dstrain.precision.kernels.build import WITH_FP8, Build, Work
from dstrain.precision.kernels.gemm import LAUNCH, tile_of_program
from dstrain.precision.kernels.groups import tiles_of_expert
from dstrain.precision.quantize import Quantized


def multiply_columns(grad: Quantized, x: Quantized, ends_E: Tensor | None) -> Tensor:
    """grad @ x.T for columns with values [M, P] and [K, P]: FP32 [M, K], on a GPU of compute capability 8.9 or higher.

    With `ends_E`, int32 [E] on the device, [E, M, K]: expert e has ends_E[e] - ends_E[e - 1] rows, filled up with
    zeros to a multiple of 128. An expert without rows gets zeros.
    """
    (out, padded), depth, experts = grad.values.shape, len(x.values), 1 if ends_E is None else len(ends_E)
    weight_EMK = grad.values.new_empty((experts, out, depth), dtype=torch.float32)
    # A thread has many columns of a tile and few of its rows. Side by side, their scales need one address.
    scale_SC = F.pad(x.scale.t(), (0, -depth % TILE)).contiguous()
    columns_kernel[triton.cdiv(out, TILE) * triton.cdiv(depth, TILE), experts](
        grad.values, grad.scale, x.values, scale_SC, weight_EMK, ends_E, out, depth, padded // TILE,
        grad.values.stride(0), grad.scale.stride(0), x.values.stride(0), scale_SC.stride(0), out * depth, depth,
        EXPERTS=experts, LANES=triton.next_power_of_2(experts), **LAUNCH,
    )  # fmt: skip
    return weight_EMK[0] if ends_E is None else weight_EMK


@triton.jit
def columns_kernel(
    grad, grad_scale, x, x_scale, weight, ends_E, out, depth, all_steps,
    grad_m, grad_scale_m, x_k, x_scale_s, weight_e, weight_m, EXPERTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Strides are named after tensor and dimension; the last one's are 1. `x_scale` is [S, K], K filled up to a
    multiple of 128. Without `ends_E` expert 0 has all rows."""
    row_tile, column_tile = tile_of_program(tl.cdiv(out, 128), tl.cdiv(depth, 128))
    expert = tl.program_id(1)
    if ends_E is None:
        first, steps = 0, all_steps
    else:
        first, steps = tiles_of_expert(ends_E, expert, EXPERTS, LANES)
    lane = tl.arange(0, 128)
    # Beyond the edges the last row and column are read again: no masks, and so fewer registers.
    row_T, column_C = tl.minimum(lane, out - row_tile * 128 - 1), tl.minimum(lane, depth - column_tile * 128 - 1)
    # In int64, as all of a tensor may be more than 2^31 values; what is added to it in a tile is not.
    row, column, expert = row_tile.to(tl.int64) * 128, column_tile.to(tl.int64) * 128, expert.to(tl.int64)
    grad += row * grad_m + first * 128
    grad_scale += row * grad_scale_m + first
    x += column * x_k + first * 128
    x_scale += first * x_scale_s + column
    sum_TC = tl.zeros((128, 128), tl.float32)
    for step in range(steps):
        part_TV = tl.load(grad + step * 128 + row_T[:, None] * grad_m + lane[None, :])
        part_VC = tl.load(x + step * 128 + column_C[None, :] * x_k + lane[:, None])
        scale_T = tl.load(grad_scale + step + row_T * grad_scale_m)
        scale_C = tl.load(x_scale + step * x_scale_s + lane)
        sum_TC += tl.dot(part_TV, part_VC) * scale_T[:, None] * scale_C[None, :]
    weight += expert * weight_e + row * weight_m + column
    is_there_TC = (row_T == lane)[:, None] & (column_C == lane)[None, :]
    tl.store(weight + lane[:, None] * weight_m + lane[None, :], sum_TC, mask=is_there_TC)


def _build(name: str, out: int, depth: int, rows: int, experts: int, ends: str | None) -> Build:
    arguments = {
        "grad": "*fp8e4nv", "grad_scale": "*fp32", "x": "*fp8e4nv", "x_scale": "*fp32", "weight": "*fp32",
        "ends_E": ends, "out": "i32:16", "depth": "i32:16", "all_steps": "i32", "grad_m": "i32:16",
        "grad_scale_m": "i32", "x_k": "i32:16", "x_scale_s": "i32:16", "weight_e": "i32:16", "weight_m": "i32:16",
        "EXPERTS": experts, "LANES": triton.next_power_of_2(experts),
    }  # fmt: skip
    work = Work(
        f"{out} x {depth} x {rows}" + f", {experts} experts" * (experts > 1),
        flops=2 * rows * out * depth,
        bytes=rows * (out + depth) + 4 * experts * out * depth,
        fp32_flops=3 * rows * out * depth // TILE,
    )
    return Build(name, columns_kernel, arguments, capabilities=WITH_FP8, work=work, **LAUNCH)


# Of DeepSeek-V3: the output projection of attention, and the first product of eight experts.
BUILDS = (
    _build("gemm columns", 7168, 16384, 4096, 1, None),
    _build("gemm columns, grouped", 4096, 7168, 32768, 8, "*i32"),
)
