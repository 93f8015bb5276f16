"""Quantising on a GPU, bit by bit as in dstrain/precision/quantize.py, in one pass over memory.

A gradient is needed as rows and as columns: `quantize_both` reads it once for both. So is a weight, in blocks for the
product over its columns and turned for that over its rows: `quantize_blocks_both`. What is cached or arrives as
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
TILE_LAUNCH = {"num_warps": 16}


def quantize_rows(x: Tensor, scaling: Scaling, tile: int = TILE) -> Quantized:
    """BF16 or FP32 [..., K], tiles of 128 or of a power of two below: values [..., K], scale [..., ceil(K / tile)]."""
    x_RK = _lines(x)
    rows, columns = x_RK.shape
    values, scale = _empty(x_RK, x.shape), _scales(x_RK, *x.shape[:-1], triton.cdiv(columns, tile))
    if x.numel():
        rows_kernel[triton.cdiv(rows, LINES), triton.cdiv(columns, TILE)](
            x_RK, values, scale, rows, columns, x_RK.stride(0), scaling.floor,
            POWER_OF_TWO=scaling.power_of_two, SCALES=TILE // tile, **ROWS_LAUNCH,
        )  # fmt: skip
    return _quantized(values, scale, tile)


def quantize_columns(x_RK: Tensor, scaling: Scaling, ends_E: Tensor | None = None, tile: int = TILE) -> Quantized:
    """BF16 or FP32 [R, K] in the order of experts, who end at `ends_E` (int32, on the device; None: of one expert):
    values [K, P], scale [K, P / tile]."""
    return _columns(_lines(x_RK), None, scaling, ends_E, tile, with_rows=False)[0]


def quantize_both(
    x_RK: Tensor, scaling: Scaling, ends_E: Tensor | None = None, tile: int = TILE
) -> tuple[Quantized, Quantized]:
    """`quantize_rows` and `quantize_columns`."""
    columns, rows = _columns(_lines(x_RK), None, scaling, ends_E, tile, with_rows=True)
    return rows, columns


def requantize_columns(rows: Quantized, scaling: Scaling, ends_E: Tensor | None = None) -> Quantized:
    """`quantize_columns` of what quantised rows stand for, in FP32, in tiles as wide as theirs."""
    return _columns(rows.values.view(torch.uint8), rows.scale, scaling, ends_E, rows.tile, with_rows=False)[0]


def quantize_blocks_both(weight: Tensor, scaling: Scaling) -> tuple[Quantized, Quantized]:
    """BF16 or FP32 [M, K] or [E, M, K]: values of this shape, scale [..., ceil(M / 128), ceil(K / 128)]; and their
    transposes, for the product over M, in memory of their own."""
    weight_EMK = weight.contiguous().view(-1, *weight.shape[-2:])
    experts, rows, columns = weight_EMK.shape
    row_blocks, column_blocks, lead = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE), weight.shape[:-2]
    blocks = _empty(weight, weight.shape), _scales(weight, *lead, row_blocks, column_blocks)
    turned = _empty(weight, (*lead, columns, rows)), _scales(weight, *lead, column_blocks, row_blocks)
    if weight.numel():
        blocks_kernel[row_blocks, column_blocks, experts](
            weight_EMK, *blocks, *turned, rows, columns, scaling.floor, POWER_OF_TWO=scaling.power_of_two, **TILE_LAUNCH
        )
    return _quantized(*blocks, TILE), _quantized(*turned, TILE)


def dequantize_rows(rows: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What quantised rows stand for, [..., K] in BF16 or FP32."""
    codes_RK = _lines(rows.values.view(torch.uint8))
    lines, columns = codes_RK.shape
    x = _empty(rows.values, rows.values.shape, dtype)
    if x.numel():
        dequantize_kernel[triton.cdiv(lines, LINES), triton.cdiv(columns, TILE)](
            codes_RK, rows.scale, x, lines, columns, codes_RK.stride(0), SCALES=TILE // rows.tile, **ROWS_LAUNCH
        )
    return x


def _columns(
    x_RK: Tensor, scale_RS: Tensor | None, scaling: Scaling, ends_E: Tensor | None, tile: int, *, with_rows: bool
) -> tuple[Quantized, Quantized]:
    """Columns, and rows where they are asked for."""
    (rows, width), experts = x_RK.shape, 1 if ends_E is None else len(ends_E)
    padded = padded_rows(rows, experts)
    columns = _empty(x_RK, (width, padded)), _scales(x_RK, width, padded // tile)
    kept = (_empty(x_RK, x_RK.shape), _scales(x_RK, rows, triton.cdiv(width, tile))) if with_rows else columns
    if padded and width:
        columns_kernel[padded // TILE, triton.cdiv(width, TILE)](
            x_RK, scale_RS, ends_E, *columns, *kept, rows, width, x_RK.stride(0), padded, scaling.floor,
            EXPERTS=experts, LANES=triton.next_power_of_2(experts), POWER_OF_TWO=scaling.power_of_two,
            SCALES=TILE // tile, IS_QUANTIZED=scale_RS is not None, WITH_ROWS=with_rows, **TILE_LAUNCH,
        )  # fmt: skip
    return _quantized(*columns, tile), _quantized(*kept, tile)


def _quantized(codes: Tensor, scale: Tensor, tile: int) -> Quantized:
    return Quantized(codes.view(torch.float8_e4m3fn), scale, tile)


def _lines(x: Tensor) -> Tensor:
    """[R, K] of any strides but the last, which is 1."""
    lines = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return lines if lines.stride(1) == 1 else lines.contiguous()


def _empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _scales(x: Tensor, *shape: int) -> Tensor:
    return _empty(x, shape, torch.float32)


@triton.jit
def rows_kernel(x, values, scale, rows, columns, x_r, floor, POWER_OF_TWO: tl.constexpr, SCALES: tl.constexpr,
                LINES: tl.constexpr):  # fmt: skip
    """A program quantises 128 columns of LINES rows, which have SCALES scales each."""
    first, column = tl.program_id(0) * LINES, tl.program_id(1) * 128
    x_LV = load_tile(x, first, rows, column, columns, x_r, LINES, 128).to(tl.float32)
    store_rows(x_LV, values, scale, first, rows, column, columns, floor, POWER_OF_TWO, SCALES)


@triton.jit
def dequantize_kernel(values, scale, x, rows, columns, values_r, SCALES: tl.constexpr, LINES: tl.constexpr):
    first, column = tl.program_id(0) * LINES, tl.program_id(1) * 128
    x_LV = _load_quantized(values, scale, first, rows, column, columns, values_r, SCALES, LINES)
    store_tile(x, x_LV.to(x.dtype.element_ty), first, rows, column, columns, columns)


@triton.jit
def columns_kernel(
    x, x_scale, ends_E, values, scale, row_values, row_scale, rows, columns, x_r, padded, floor,
    EXPERTS: tl.constexpr, LANES: tl.constexpr, POWER_OF_TWO: tl.constexpr, SCALES: tl.constexpr,
    IS_QUANTIZED: tl.constexpr, WITH_ROWS: tl.constexpr,
):  # fmt: skip
    """A program has a tile of 128 rows of one expert, and 128 columns of it. `ends_E` may be None."""
    tile, column = tl.program_id(0), tl.program_id(1) * 128
    first, end = rows_of_tile(ends_E, tile, rows, EXPERTS, LANES)
    if IS_QUANTIZED:
        x_TV = _load_quantized(x, x_scale, first, end, column, columns, x_r, SCALES, 128)
    else:
        x_TV = load_tile(x, first, end, column, columns, x_r, 128, 128).to(tl.float32)
    if WITH_ROWS:
        store_rows(x_TV, row_values, row_scale, first, end, column, columns, floor, POWER_OF_TWO, SCALES)
    store_columns(x_TV, values, scale, tile, padded, column, columns, floor, POWER_OF_TWO, SCALES)


@triton.jit
def blocks_kernel(weight, values, scale, turned, turned_scale, rows, columns, floor, POWER_OF_TWO: tl.constexpr):
    """A program has a block of 128 rows and columns of one expert."""
    row_block, column_block, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, column, before = row_block * 128, column_block * 128, expert * rows * columns
    x_TV = load_tile(weight + before, first, rows, column, columns, columns, 128, 128).to(tl.float32)
    block = scale_of(tl.max(largest_bits(x_TV, 1), 0), floor, POWER_OF_TWO)
    scale += expert * tl.num_programs(0) * tl.num_programs(1)
    tl.store(scale + row_block * tl.num_programs(1) + column_block, block)
    codes_TV = e4m3_codes(x_TV, tl.broadcast_to(block, x_TV.shape), POWER_OF_TWO)
    store_tile(values + before, codes_TV, first, rows, column, columns, columns)
    turned_scale += expert * tl.num_programs(0) * tl.num_programs(1)
    tl.store(turned_scale + column_block * tl.num_programs(0) + row_block, block)
    store_tile(turned + before, tl.trans(codes_TV), column, columns, first, rows, rows)


@triton.jit
def rows_of_tile(ends_E, tile, rows, EXPERTS: tl.constexpr, LANES: tl.constexpr):
    """The first row of a tile, and where its expert's rows end; `ends_E` is None where all rows are one expert's."""
    if ends_E is None:
        first, end = tile * 128, rows
    else:
        _, first, end = expert_of_tile(ends_E, tile, EXPERTS, LANES)
    return first, end


@triton.jit
def load_tile(x, first, end, column, columns, x_r, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """LINES rows from `first` on and WIDTH columns from `column` on; zeros for what lies behind the end of either.

    The place of a tile is counted in int64, as a tensor may have more than 2^31 values; places in it are not.
    """
    row_L, column_V = tl.arange(0, LINES), tl.arange(0, WIDTH)
    inside = (row_L[:, None] < end - first) & (column_V[None, :] < columns - column)
    x += tl.cast(first, tl.int64) * x_r + column
    return tl.load(x + row_L[:, None] * x_r + column_V[None, :], mask=inside, other=0)


@triton.jit
def store_tile(x, tile_LV, first, end, column, columns, x_r):
    """The opposite of `load_tile`."""
    row_L, column_V = tl.arange(0, tile_LV.shape[0]), tl.arange(0, tile_LV.shape[1])
    inside = (row_L[:, None] < end - first) & (column_V[None, :] < columns - column)
    x += tl.cast(first, tl.int64) * x_r + column
    tl.store(x + row_L[:, None] * x_r + column_V[None, :], tile_LV, mask=inside)


@triton.jit
def _load_quantized(x, scale, first, end, column, columns, x_r, SCALES: tl.constexpr, LINES: tl.constexpr):
    """`load_tile` of 128 columns of quantised rows, which have SCALES scales each, in FP32."""
    scales = tl.cdiv(columns, 128 // SCALES)
    scale_LS = load_tile(scale, first, end, column // 128 * SCALES, scales, scales, LINES, SCALES)
    codes_LV = load_tile(x, first, end, column, columns, x_r, LINES, 128)
    numbers_LSV = tl.reshape(e4m3_numbers(codes_LV), (LINES, SCALES, 128 // SCALES))
    return tl.reshape(numbers_LSV * scale_LS[:, :, None], codes_LV.shape)


@triton.jit
def store_rows(x_LV, values, scale, first, end, column, columns, floor, POWER_OF_TWO: tl.constexpr,
               SCALES: tl.constexpr):  # fmt: skip
    """Quantises 128 columns of some rows, of which those before `end` are stored."""
    x_LSV = tl.reshape(x_LV, (x_LV.shape[0], SCALES, 128 // SCALES))
    scale_LS = scale_of(largest_bits(x_LSV, 2), floor, POWER_OF_TWO)
    scales = tl.cdiv(columns, 128 // SCALES)
    store_tile(scale, scale_LS, first, end, column // 128 * SCALES, scales, scales)
    codes_LSV = e4m3_codes(x_LSV, tl.broadcast_to(scale_LS[:, :, None], x_LSV.shape), POWER_OF_TWO)
    store_tile(values, tl.reshape(codes_LSV, x_LV.shape), first, end, column, columns, columns)


@triton.jit
def store_columns(x_TV, values, scale, tile, padded, column, columns, floor, POWER_OF_TWO: tl.constexpr,
                  SCALES: tl.constexpr):  # fmt: skip
    """Quantises 128 rows by columns and turns them; `tile` is their place among those of all experts."""
    x_STV = tl.reshape(x_TV, (SCALES, 128 // SCALES, x_TV.shape[1]))
    scale_SV = scale_of(largest_bits(x_STV, 1), floor, POWER_OF_TWO)
    scales = padded // 128 * SCALES
    store_tile(scale, tl.trans(scale_SV), column, columns, tile * SCALES, scales, scales)
    codes_STV = e4m3_codes(x_STV, tl.broadcast_to(scale_SV[:, None, :], x_STV.shape), POWER_OF_TWO)
    store_tile(values, tl.trans(tl.reshape(codes_STV, x_TV.shape)), column, columns, tile * 128, padded, padded)


_LINES = {
    "x": "*bf16", "values": "*u8", "scale": "*fp32", "rows": "i32", "columns": "i32:16", "x_r": "i32:16",
    "floor": "fp32", "POWER_OF_TWO": True, "SCALES": 1, "LINES": LINES,
}  # fmt: skip
_BACK = {
    "values": "*u8", "scale": "*fp32", "x": "*bf16", "rows": "i32", "columns": "i32:16", "values_r": "i32:16",
    "SCALES": 1, "LINES": LINES,
}  # fmt: skip
_COLUMNS = {
    "x": "*bf16", "x_scale": None, "ends_E": "*i32", "values": "*u8", "scale": "*fp32", "row_values": "*u8",
    "row_scale": "*fp32", "rows": "i32", "columns": "i32:16", "x_r": "i32:16", "padded": "i32:16", "floor": "fp32",
    "EXPERTS": 64, "LANES": 64, "POWER_OF_TWO": True, "SCALES": 1, "IS_QUANTIZED": False, "WITH_ROWS": False,
}  # fmt: skip
_QUANTIZED = {"x": "*u8", "x_scale": "*fp32", "IS_QUANTIZED": True}
_BOTH = {"WITH_ROWS": True}
_DENSE = {"ends_E": None, "EXPERTS": 1, "LANES": 1}
_BLOCKS = {
    "weight": "*bf16", "values": "*u8", "scale": "*fp32", "turned": "*u8", "turned_scale": "*fp32",
    "rows": "i32:16", "columns": "i32:16", "floor": "fp32", "POWER_OF_TWO": True,
}  # fmt: skip
_PLAIN = {"POWER_OF_TWO": False}
_LINES_WARPS, _TILE_WARPS = ROWS_LAUNCH["num_warps"], TILE_LAUNCH["num_warps"]
BUILDS = (
    Build("quantize rows", rows_kernel, _LINES, _LINES_WARPS),
    Build("quantize rows, plain scales", rows_kernel, _LINES | _PLAIN, _LINES_WARPS),
    Build("quantize rows, tiles of 32", rows_kernel, _LINES | {"SCALES": 4}, _LINES_WARPS),
    Build("dequantize rows", dequantize_kernel, _BACK, _LINES_WARPS),
    Build("quantize columns", columns_kernel, _COLUMNS, _TILE_WARPS),
    Build("quantize columns, plain scales", columns_kernel, _COLUMNS | _PLAIN, _TILE_WARPS),
    Build("quantize rows and columns", columns_kernel, _COLUMNS | _BOTH, _TILE_WARPS),
    Build("quantize rows and columns, dense", columns_kernel, _COLUMNS | _BOTH | _DENSE, _TILE_WARPS),
    Build(
        "quantize rows and columns, tiles of 32",
        columns_kernel,
        _COLUMNS | _BOTH | {"SCALES": 4},
        _TILE_WARPS,
    ),
    Build("requantize rows as columns", columns_kernel, _COLUMNS | _QUANTIZED, _TILE_WARPS),
    Build("quantize blocks", blocks_kernel, _BLOCKS, _TILE_WARPS),
)
