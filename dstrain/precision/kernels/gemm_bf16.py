"""Products of experts in BF16, for GPUs on which torch's own wait for the host.

Below capability 9.0, and on 12.x, torch's `grouped_mm` brings the ends of the experts to the host and multiplies one
expert after the other (aten/src/ATen/native/GroupedMMUtils.h). Here one launch does all of it, as in gemm.py; but
operands have their scales already, so that sums stay in the tensor cores, whose FP32 is whole for BF16.

Shapes: R rows, K in, M out, E experts, P rows of all experts, each filled up to a multiple of 128; T rows of a tile, C
its columns, V values of a step.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from dstrain.precision.formats import TILE
from dstrain.precision.kernels.build import Build
from dstrain.precision.kernels.gemm import tile_of_program
from dstrain.precision.kernels.groups import expert_of_tile, tiles_of_expert

# Up to three steps of both sides lie in shared memory, 96 KiB: what capability 8.6 and 8.9 have.
LAUNCH = {"STEP": 64, "num_warps": 8, "num_stages": 3}


def multiply_rows(x_RK: Tensor, weight_EMK: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T of each row's expert, [R, M] in BF16 or FP32; both are BF16 and contiguous.

    Expert e has the rows from ends_E[e - 1] to ends_E[e], int32 on the device; what is behind the last of them is left
    as it is in memory.
    """
    (rows, depth), (experts, columns, _) = x_RK.shape, weight_EMK.shape
    y_RM = x_RK.new_empty((rows, columns), dtype=dtype)
    # Enough for any split of the rows.
    row_tiles = (rows + (TILE - 1) * experts) // TILE
    if y_RM.numel():
        rows_kernel[(row_tiles * triton.cdiv(columns, TILE),)](
            x_RK, weight_EMK, y_RM, ends_E, row_tiles, columns, depth,
            EXPERTS=experts, LANES=triton.next_power_of_2(experts), **LAUNCH,
        )  # fmt: skip
    return y_RM


def multiply_columns(grad_MP: Tensor, x_KP: Tensor, ends_E: Tensor) -> Tensor:
    """grad @ x.T over the rows of each expert: FP32 [E, M, K], zeros for an expert without rows. Both sides are BF16,
    contiguous, with zeros where they are filled up."""
    (out, padded), depth, experts = grad_MP.shape, len(x_KP), len(ends_E)
    weight_EMK = grad_MP.new_empty((experts, out, depth), dtype=torch.float32)
    columns_kernel[triton.cdiv(out, TILE) * triton.cdiv(depth, TILE), experts](
        grad_MP, x_KP, weight_EMK, ends_E, out, depth, padded,
        EXPERTS=experts, LANES=triton.next_power_of_2(experts), **LAUNCH,
    )  # fmt: skip
    return weight_EMK


@triton.jit
def rows_kernel(
    x, weight, y, ends_E, row_tiles, columns, depth,
    EXPERTS: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of_program(row_tiles, tl.cdiv(columns, 128))
    expert, first, end = expert_of_tile(ends_E, row_tile, EXPERTS, LANES)
    if expert >= EXPERTS:
        return
    # In int64, as all of a tensor may be more than 2^31 values; what is added to it in a tile is not.
    first, expert, column = first.to(tl.int64), expert.to(tl.int64), column_tile.to(tl.int64) * 128
    weight += (expert * columns + column) * depth
    sum_TC = _sums(x + first * depth, weight, end - first, columns - column, depth, depth, STEP)
    _store_sums(y + first * columns + column, sum_TC, end - first, columns - column, columns)


@triton.jit
def columns_kernel(
    grad, x, weight, ends_E, out, depth, padded, EXPERTS: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr
):
    row_tile, column_tile = tile_of_program(tl.cdiv(out, 128), tl.cdiv(depth, 128))
    expert = tl.program_id(1)
    first, tiles = tiles_of_expert(ends_E, expert, EXPERTS, LANES)
    row, column, expert = row_tile.to(tl.int64) * 128, column_tile.to(tl.int64) * 128, expert.to(tl.int64)
    grad += row * padded + first * 128
    x += column * padded + first * 128
    sum_TC = _sums(grad, x, out - row, depth - column, tiles * 128, padded, STEP)
    _store_sums(weight + (expert * out + row) * depth + column, sum_TC, out - row, depth - column, depth)


@triton.jit
def _sums(left, right, rows, columns, depth, stride, STEP: tl.constexpr):
    """left[t, v] times right[c, v], summed over v below `depth`, for the 128 rows and columns of a tile; the first
    dimension of both has this stride."""
    lane, value_V = tl.arange(0, 128), tl.arange(0, STEP)
    # Beyond the edges the last row and column are read again: fewer masks, and so fewer registers.
    row_T, column_C = tl.minimum(lane, rows - 1).to(tl.int32), tl.minimum(lane, columns - 1).to(tl.int32)
    sum_TC = tl.zeros((128, 128), tl.float32)
    for step in range(tl.cdiv(depth, STEP)):
        begin = step * STEP
        is_value_V = value_V < depth - begin
        left_TV = left + begin + row_T[:, None] * stride + value_V[None, :]
        right_VC = right + begin + column_C[None, :] * stride + value_V[:, None]
        part_TV = tl.load(left_TV, mask=is_value_V[None, :], other=0.0)
        part_VC = tl.load(right_VC, mask=is_value_V[:, None], other=0.0)
        sum_TC = tl.dot(part_TV, part_VC, sum_TC)
    return sum_TC


@triton.jit
def _store_sums(y, sum_TC, rows, columns, y_t):
    lane = tl.arange(0, 128)
    is_there_TC = (lane < rows)[:, None] & (lane < columns)[None, :]
    tl.store(y + lane[:, None] * y_t + lane[None, :], sum_TC.to(y.dtype.element_ty), mask=is_there_TC)


_ROWS = {
    "x": "*bf16", "weight": "*bf16", "y": "*bf16", "ends_E": "*i32", "row_tiles": "i32", "columns": "i32:16",
    "depth": "i32:16", "EXPERTS": 8, "LANES": 8, "STEP": LAUNCH["STEP"],
}  # fmt: skip
_COLUMNS = {
    "grad": "*bf16", "x": "*bf16", "weight": "*fp32", "ends_E": "*i32", "out": "i32:16", "depth": "i32:16",
    "padded": "i32:16", "EXPERTS": 8, "LANES": 8, "STEP": LAUNCH["STEP"],
}  # fmt: skip
_WARPS, _STAGES = LAUNCH["num_warps"], LAUNCH["num_stages"]
BUILDS = (
    Build("gemm rows of BF16, grouped", rows_kernel, _ROWS, _WARPS, _STAGES),
    Build("gemm columns of BF16, grouped", columns_kernel, _COLUMNS, _WARPS, _STAGES),
)
