"""Products of quantised rows with quantised weights: y[r, m] = sum over k of x[r, k] w[m, k], dense or by expert.

One program makes a tile of 128 rows and 128 columns. Along k it goes in steps of 128, the side of every tile of scales:
the tensor cores sum one step from zero, then the FP32 cores multiply the sum by its two scales and add it up. That is
the promotion of DeepSeek-V3 (arXiv:2412.19437, section 3.3.2), for the tensor cores of Hopper keep about 14 bits of a
sum.

Shapes: R rows, K in, M out, E experts, S tiles of 128 along K, B blocks of 128 along M; T rows of a tile, C its
columns, V values of a step.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from dstrain.precision.formats import TILE
from dstrain.precision.kernels.build import WITH_FP8, Build, Work
from dstrain.precision.kernels.groups import expert_of_tile
from dstrain.precision.quantize import Quantized

# A thread has 64 sums, and 64 of the step: with four warps, and twice as many, they spill.
LAUNCH = {"num_warps": 8, "num_stages": 3}


def multiply_rows(x: Quantized, weight: Quantized, ends_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x @ weight.T, [R, M] in BF16 or FP32, on a GPU of compute capability 8.9 or higher: x rows with values [R, K],
    weight blocks with values [M, K].

    Where K is no multiple of 16, rows can't be copied 16 bytes at a time, and most of the speed is gone.

    With `ends_E`, int32 [E] on the device, the weight is [E, M, K], and expert e has the rows from ends_E[e - 1] to
    ends_E[e]; what is behind the last of them is left as it is in memory.
    """
    weight_EMK, scale_EBS = weight.values, weight.scale
    if ends_E is None:
        weight_EMK, scale_EBS = weight_EMK[None], scale_EBS[None]
    (rows, depth), (experts, columns, _) = x.values.shape, weight_EMK.shape
    y_RM = x.values.new_empty((rows, columns), dtype=dtype)
    # Enough for any split of the rows.
    row_tiles = (rows + (TILE - 1) * experts) // TILE
    if y_RM.numel():
        rows_kernel[(row_tiles * triton.cdiv(columns, TILE),)](
            x.values, x.scale, weight_EMK, scale_EBS, y_RM, ends_E, rows, row_tiles, columns, depth,
            x.values.stride(0), x.scale.stride(0), *weight_EMK.stride()[:2], *scale_EBS.stride()[:2], columns,
            EXPERTS=experts, LANES=triton.next_power_of_2(experts), **LAUNCH,
        )  # fmt: skip
    return y_RM


@triton.jit
def tile_of_program(row_tiles, column_tiles):
    """Row and column of a program's tile: eight rows of tiles at a time, so that those that share their weights run
    side by side while these are in the L2 cache."""
    program = tl.program_id(0)
    band = program // (8 * column_tiles)
    height = tl.minimum(row_tiles - band * 8, 8)
    place = program % (8 * column_tiles)
    return band * 8 + place % height, place // height


@triton.jit
def rows_kernel(
    x, x_scale, weight, weight_scale, y, ends_E, rows, row_tiles, columns, depth,
    x_r, x_scale_r, weight_e, weight_m, weight_scale_e, weight_scale_b, y_r,
    EXPERTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Strides are named after tensor and dimension; the last one's are 1. Without `ends_E` expert 0 has all rows."""
    row_tile, column_tile = tile_of_program(row_tiles, tl.cdiv(columns, 128))
    if ends_E is None:
        expert, first, end = 0, row_tile * 128, rows
    else:
        expert, first, end = expert_of_tile(ends_E, row_tile, EXPERTS, LANES)
        if expert >= EXPERTS:
            return
    lane = tl.arange(0, 128)
    # Beyond the edges the last row and column are read again: fewer masks, and so fewer registers.
    row_T, column_C = tl.minimum(lane, end - first - 1), tl.minimum(lane, columns - column_tile * 128 - 1)
    # In int64, as all of a tensor may be more than 2^31 values; what is added to it in a tile is not.
    first, expert = tl.cast(first, tl.int64), tl.cast(expert, tl.int64)
    x += first * x_r
    x_scale += first * x_scale_r
    weight += expert * weight_e + column_tile.to(tl.int64) * 128 * weight_m
    weight_scale += expert * weight_scale_e + column_tile * weight_scale_b
    sum_TC = tl.zeros((128, 128), tl.float32)
    for step in range(tl.cdiv(depth, 128)):
        is_value_V = lane < depth - step * 128
        x_TV = x + step * 128 + row_T[:, None] * x_r + lane[None, :]
        weight_VC = weight + step * 128 + column_C[None, :] * weight_m + lane[:, None]
        part_TV = tl.load(x_TV, mask=is_value_V[None, :], other=0.0)
        part_VC = tl.load(weight_VC, mask=is_value_V[:, None], other=0.0)
        scale_T, scale = tl.load(x_scale + step + row_T * x_scale_r), tl.load(weight_scale + step)
        part_TC = tl.dot(part_TV, part_VC)
        # Not before: the tensor cores work while the scales are on their way.
        sum_TC += part_TC * (scale_T * scale)[:, None]
    y += first * y_r + column_tile * 128
    is_there_TC = (row_T == lane)[:, None] & (column_C == lane)[None, :]
    tl.store(y + lane[:, None] * y_r + lane[None, :], sum_TC.to(y.dtype.element_ty), mask=is_there_TC)


def _build(name: str, rows: int, columns: int, depth: int, experts: int, ends: str | None) -> Build:
    arguments = {
        "x": "*fp8e4nv", "x_scale": "*fp32", "weight": "*fp8e4nv", "weight_scale": "*fp32", "y": "*bf16",
        "ends_E": ends, "rows": "i32", "row_tiles": "i32", "columns": "i32:16", "depth": "i32:16",
        "x_r": "i32:16", "x_scale_r": "i32", "weight_e": "i32:16", "weight_m": "i32:16",
        "weight_scale_e": "i32", "weight_scale_b": "i32", "y_r": "i32:16",
        "EXPERTS": experts, "LANES": triton.next_power_of_2(experts),
    }  # fmt: skip
    work = Work(
        f"{rows} x {columns} x {depth}" + f", {experts} experts" * (experts > 1),
        flops=2 * rows * columns * depth,
        bytes=rows * depth + experts * columns * depth + 2 * rows * columns,
        fp32_flops=2 * rows * columns * depth // TILE,
    )
    return Build(name, rows_kernel, arguments, capabilities=WITH_FP8, work=work, **LAUNCH)


# Of DeepSeek-V3: the output projection of attention, and the first product of eight experts.
BUILDS = (
    _build("gemm rows", 4096, 7168, 16384, 1, None),
    _build("gemm rows, grouped", 32768, 4096, 7168, 8, "*i32"),
)
