"""Quantising on a GPU, bit by bit as in dstrain/precision/quantize.py, in one pass over memory.

A gradient is needed as rows and as columns: `quantize_both` reads it once for both. What is cached or arrives as
quantised rows becomes columns by `requantize_columns`: dequantised, turned and quantised anew without a stop in memory.

Shapes: R rows, K columns, M rows of a weight, E experts, P rows of all experts, each filled up to a multiple of 128;
L rows of a program, V columns of a tile, T rows of a tile.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from dstrain.precision.formats import TILE, Scaling
from dstrain.precision.kernels.build import Build
from dstrain.precision.kernels.e4m3 import e4m3_codes, e4m3_numbers, largest_bits, scale_of
from dstrain.precision.kernels.groups import expert_of_tile
from dstrain.precision.quantize import Quantized, padded_rows

# Rows of a program, where tiles are of one row each.
LINES = 32
ROWS_LAUNCH = {"LINES": LINES, "num_warps": 4}
TILE_LAUNCH = {"num_warps": 8}


def quantize_rows(x: Tensor, scaling: Scaling) -> Quantized:
    """BF16 or FP32 [..., K]: values [..., K], scale [..., ceil(K / 128)]."""
    x_RK = _lines(x)
    rows, columns = x_RK.shape
    values, scale = _empty(x_RK, x.shape), _scales(x_RK, *x.shape[:-1], triton.cdiv(columns, TILE))
    if x.numel():
        rows_kernel[triton.cdiv(rows, LINES), scale.shape[-1]](
            x_RK, values, scale, rows, columns, x_RK.stride(0), scaling.floor,
            POWER_OF_TWO=scaling.power_of_two, **ROWS_LAUNCH,
        )  # fmt: skip
    return Quantized(values.view(torch.float8_e4m3fn), scale)


def quantize_columns(x_RK: Tensor, scaling: Scaling, ends_E: Tensor | None = None) -> Quantized:
    """BF16 or FP32 [R, K] in the order of experts, who end at `ends_E` (int32, on the device; None: of one expert):
    values [K, P], scale [K, P / 128]."""
    return _columns(_lines(x_RK), None, scaling, ends_E, with_rows=False)[0]


def quantize_both(x_RK: Tensor, scaling: Scaling, ends_E: Tensor | None = None) -> tuple[Quantized, Quantized]:
    """`quantize_rows` and `quantize_columns`."""
    columns, rows = _columns(_lines(x_RK), None, scaling, ends_E, with_rows=True)
    return rows, columns


def requantize_columns(rows: Quantized, scaling: Scaling, ends_E: Tensor | None = None) -> Quantized:
    """`quantize_columns` of what quantised rows stand for, in FP32."""
    return _columns(rows.values.view(torch.uint8), rows.scale, scaling, ends_E, with_rows=False)[0]


def quantize_blocks(weight: Tensor, scaling: Scaling) -> Quantized:
    """BF16 or FP32 [M, K] or [E, M, K]: values of this shape, scale [..., ceil(M / 128), ceil(K / 128)]."""
    weight_EMK = weight.contiguous().view(-1, *weight.shape[-2:])
    experts, rows, columns = weight_EMK.shape
    blocks = (*weight.shape[:-2], triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    values, scale = _empty(weight, weight.shape), _scales(weight, *blocks)
    if weight.numel():
        blocks_kernel[blocks[-2], blocks[-1], experts](
            weight_EMK, values, scale, rows, columns, scaling.floor,
            POWER_OF_TWO=scaling.power_of_two, **TILE_LAUNCH,
        )  # fmt: skip
    return Quantized(values.view(torch.float8_e4m3fn), scale)


def dequantize_rows(rows: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What quantised rows stand for, [..., K] in BF16 or FP32."""
    codes_RK = _lines(rows.values.view(torch.uint8))
    lines, columns = codes_RK.shape
    x = _empty(rows.values, rows.values.shape, dtype)
    if x.numel():
        dequantize_kernel[triton.cdiv(lines, LINES), rows.scale.shape[-1]](
            codes_RK, rows.scale, x, lines, columns, codes_RK.stride(0), **ROWS_LAUNCH
        )
    return x


def whole(x_RK: Tensor) -> Tensor:
    """The ends of one expert who has all rows: int32 [1], made on the device."""
    return torch.full((1,), len(x_RK), dtype=torch.int32, device=x_RK.device)


def _columns(
    x_RK: Tensor, scale_RS: Tensor | None, scaling: Scaling, ends_E: Tensor | None, *, with_rows: bool
) -> tuple[Quantized, Quantized]:
    """Columns, and rows where they are asked for."""
    ends_E = whole(x_RK) if ends_E is None else ends_E
    (rows, columns), experts = x_RK.shape, len(ends_E)
    padded, tiles = padded_rows(rows, experts), triton.cdiv(columns, TILE)
    values, scale = _empty(x_RK, (columns, padded)), _scales(x_RK, columns, padded // TILE)
    row_values, row_scale = (_empty(x_RK, x_RK.shape), _scales(x_RK, rows, tiles)) if with_rows else (values, scale)
    if values.numel():
        columns_kernel[padded // TILE, tiles](
            x_RK, scale_RS, ends_E, values, scale, row_values, row_scale,
            columns, x_RK.stride(0), padded, scaling.floor, EXPERTS=experts, LANES=triton.next_power_of_2(experts),
            POWER_OF_TWO=scaling.power_of_two, IS_QUANTIZED=scale_RS is not None, WITH_ROWS=with_rows, **TILE_LAUNCH,
        )  # fmt: skip
    fp8 = torch.float8_e4m3fn
    return Quantized(values.view(fp8), scale), Quantized(row_values.view(fp8), row_scale)


def _lines(x: Tensor) -> Tensor:
    """[R, K] of any strides but the last, which is 1."""
    lines = x.reshape(-1, x.shape[-1])
    return lines if lines.stride(1) == 1 else lines.contiguous()


def _empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _scales(x: Tensor, *shape: int) -> Tensor:
    return _empty(x, shape, torch.float32)


@triton.jit
def rows_kernel(
    x, values, scale, rows, columns, x_r, floor, POWER_OF_TWO: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """A program quantises LINES rows of one tile each."""
    row_L, column_V = _lines_of_program(LINES)
    inside = (row_L[:, None] < rows) & (column_V[None, :] < columns)
    x_LV = tl.load(x + row_L[:, None] * x_r + column_V[None, :], mask=inside, other=0.0).to(tl.float32)
    scale_L = scale_of(largest_bits(x_LV, 1), floor, POWER_OF_TWO)
    tl.store(scale + row_L * tl.num_programs(1) + tl.program_id(1), scale_L, mask=row_L < rows)
    codes_LV = e4m3_codes(x_LV, tl.broadcast_to(scale_L[:, None], x_LV.shape), POWER_OF_TWO)
    tl.store(values + row_L[:, None] * columns + column_V[None, :], codes_LV, mask=inside)


@triton.jit
def dequantize_kernel(values, scale, x, rows, columns, values_r, LINES: tl.constexpr):
    row_L, column_V = _lines_of_program(LINES)
    inside = (row_L[:, None] < rows) & (column_V[None, :] < columns)
    codes_LV = tl.load(values + row_L[:, None] * values_r + column_V[None, :], mask=inside, other=0)
    scale_L = tl.load(scale + row_L * tl.num_programs(1) + tl.program_id(1), mask=row_L < rows, other=1.0)
    x_LV = (e4m3_numbers(codes_LV) * scale_L[:, None]).to(x.dtype.element_ty)
    tl.store(x + row_L[:, None] * columns + column_V[None, :], x_LV, mask=inside)


@triton.jit
def _lines_of_program(LINES: tl.constexpr):
    """Rows in int64, as a tensor may have more than 2^31 values, and the columns of a tile."""
    return tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES), tl.program_id(1) * 128 + tl.arange(0, 128)


@triton.jit
def columns_kernel(
    x, x_scale, ends_E, values, scale, row_values, row_scale, columns, x_r, padded, floor,
    EXPERTS: tl.constexpr, LANES: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, IS_QUANTIZED: tl.constexpr, WITH_ROWS: tl.constexpr,
):  # fmt: skip
    """A program has a tile of 128 rows of one expert, and 128 columns of it."""
    tile, lane = tl.program_id(0), tl.arange(0, 128)
    _, first, end = expert_of_tile(ends_E, tile, EXPERTS, LANES)
    row_T, column_V = (first + lane).to(tl.int64), tl.program_id(1).to(tl.int64) * 128 + lane
    inside = (row_T[:, None] < end) & (column_V[None, :] < columns)
    x_TV = tl.load(x + row_T[:, None] * x_r + column_V[None, :], mask=inside, other=0)
    scale_T = row_T * tl.num_programs(1) + tl.program_id(1)
    if IS_QUANTIZED:
        x_TV = e4m3_numbers(x_TV) * tl.load(x_scale + scale_T, mask=row_T < end, other=1.0)[:, None]
    x_TV = x_TV.to(tl.float32)
    if WITH_ROWS:
        store_rows(x_TV, row_values, row_scale, row_T, end, column_V, columns, scale_T, floor, POWER_OF_TWO)
    store_columns(x_TV, values, scale, column_V, columns, tile, padded, floor, POWER_OF_TWO)


@triton.jit
def store_rows(x_TV, values, scale, row_T, end, column_V, columns, scale_T, floor, POWER_OF_TWO: tl.constexpr):
    """Quantises a tile by rows; `scale_T` says where the scales belong."""
    tile_T = scale_of(largest_bits(x_TV, 1), floor, POWER_OF_TWO)
    tl.store(scale + scale_T, tile_T, mask=row_T < end)
    codes_TV = e4m3_codes(x_TV, tl.broadcast_to(tile_T[:, None], x_TV.shape), POWER_OF_TWO)
    inside = (row_T[:, None] < end) & (column_V[None, :] < columns)
    tl.store(values + row_T[:, None] * columns + column_V[None, :], codes_TV, mask=inside)


@triton.jit
def store_columns(x_TV, values, scale, column_V, columns, tile, padded, floor, POWER_OF_TWO: tl.constexpr):
    """Quantises a tile by columns and turns it; `tile` is its place among those of all experts."""
    tile_V = scale_of(largest_bits(x_TV, 0), floor, POWER_OF_TWO)
    tl.store(scale + column_V * (padded // 128) + tile, tile_V, mask=column_V < columns)
    codes_TV = e4m3_codes(x_TV, tl.broadcast_to(tile_V[None, :], x_TV.shape), POWER_OF_TWO)
    place_VT = column_V[:, None] * padded + tile * 128 + tl.arange(0, 128)[None, :]
    tl.store(values + place_VT, tl.trans(codes_TV), mask=column_V[:, None] < columns)


@triton.jit
def blocks_kernel(weight, values, scale, rows, columns, floor, POWER_OF_TWO: tl.constexpr):
    """A program has a block of 128 rows and columns of one expert."""
    lane, expert = tl.arange(0, 128), tl.program_id(2).to(tl.int64)
    row_T, column_V = tl.program_id(0) * 128 + lane, tl.program_id(1) * 128 + lane
    inside = (row_T[:, None] < rows) & (column_V[None, :] < columns)
    place_TV = (expert * rows + row_T)[:, None] * columns + column_V[None, :]
    x_TV = tl.load(weight + place_TV, mask=inside, other=0.0).to(tl.float32)
    block = scale_of(tl.max(largest_bits(x_TV, 1), 0), floor, POWER_OF_TWO)
    place = (expert * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scale + place, block)
    codes_TV = e4m3_codes(x_TV, tl.broadcast_to(block, x_TV.shape), POWER_OF_TWO)
    tl.store(values + place_TV, codes_TV, mask=inside)


_LINES = {
    "x": "*bf16", "values": "*u8", "scale": "*fp32", "rows": "i32", "columns": "i32:16", "x_r": "i32:16",
    "floor": "fp32", "POWER_OF_TWO": True, "LINES": LINES,
}  # fmt: skip
_BACK = {
    "values": "*u8", "scale": "*fp32", "x": "*bf16", "rows": "i32", "columns": "i32:16", "values_r": "i32:16",
    "LINES": LINES,
}  # fmt: skip
_COLUMNS = {
    "x": "*bf16", "x_scale": None, "ends_E": "*i32", "values": "*u8", "scale": "*fp32", "row_values": "*u8",
    "row_scale": "*fp32", "columns": "i32:16", "x_r": "i32:16", "padded": "i32:16", "floor": "fp32",
    "EXPERTS": 64, "LANES": 64, "POWER_OF_TWO": True, "IS_QUANTIZED": False, "WITH_ROWS": False,
}  # fmt: skip
_QUANTIZED = {"x": "*u8", "x_scale": "*fp32", "IS_QUANTIZED": True}
_BLOCKS = {
    "weight": "*bf16", "values": "*u8", "scale": "*fp32", "rows": "i32:16", "columns": "i32:16", "floor": "fp32",
    "POWER_OF_TWO": True,
}  # fmt: skip
_PLAIN = {"POWER_OF_TWO": False}
_LINES_WARPS, _TILE_WARPS = ROWS_LAUNCH["num_warps"], TILE_LAUNCH["num_warps"]
BUILDS = (
    Build("quantize rows", rows_kernel, _LINES, _LINES_WARPS),
    Build("quantize rows, plain scales", rows_kernel, _LINES | _PLAIN, _LINES_WARPS),
    Build("dequantize rows", dequantize_kernel, _BACK, _LINES_WARPS),
    Build("quantize columns", columns_kernel, _COLUMNS, _TILE_WARPS),
    Build("quantize columns, plain scales", columns_kernel, _COLUMNS | _PLAIN, _TILE_WARPS),
    Build("quantize rows and columns", columns_kernel, _COLUMNS | {"WITH_ROWS": True}, _TILE_WARPS),
    Build("requantize rows as columns", columns_kernel, _COLUMNS | _QUANTIZED, _TILE_WARPS),
    Build("quantize blocks", blocks_kernel, _BLOCKS, _TILE_WARPS),
    Build("quantize blocks, FP32", blocks_kernel, _BLOCKS | {"weight": "*fp32"}, _TILE_WARPS),
)
