"""E5M6 on a GPU, bit by bit as dstrain/precision/e5m6.py packs it; and turned into E4M3 for a product over rows,
without a stop in memory.

Shapes: R rows, K columns, W = 3 * ceil(K / 8) words, S = ceil(K / 128), P rows filled up to a multiple of 128; L rows
of a program, V its 128 columns, G = 16 groups of them, N = 8 numbers of a group.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from dstrain.precision.e5m6 import GROUP, SCALING, WORDS, Packed
from dstrain.precision.formats import E5M6, TILE, Scaling
from dstrain.precision.kernels.build import Build
from dstrain.precision.kernels.e4m3 import carry_and_shift, largest_bits, power_of_two_scale
from dstrain.precision.kernels.quantize import ROWS_LAUNCH, TILE_LAUNCH, load_tile, store_columns, store_tile
from dstrain.precision.quantize import Quantized, padded_rows

_CARRY, _SHIFT = map(tl.constexpr, carry_and_shift(E5M6))


def pack(x_RK: Tensor) -> Packed:
    """BF16 or FP32 [R, K], its last dimension contiguous."""
    rows, width = x_RK.shape
    tiles = triton.cdiv(width, TILE)
    words_RW = x_RK.new_empty((rows, triton.cdiv(width, GROUP) * WORDS), dtype=torch.int32)
    scale_RS = x_RK.new_empty((rows, tiles), dtype=torch.float32)
    if x_RK.numel():
        pack_kernel[triton.cdiv(rows, ROWS_LAUNCH["LINES"]), tiles](
            x_RK, words_RW, scale_RS, rows, width, x_RK.stride(0), SCALING.floor, **ROWS_LAUNCH
        )
    return Packed(words_RW, scale_RS, width)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The numbers, [R, K] in BF16 or FP32."""
    rows, tiles = packed.scale.shape
    x_RK = packed.scale.new_empty((rows, packed.width), dtype=dtype)
    if x_RK.numel():
        unpack_kernel[triton.cdiv(rows, ROWS_LAUNCH["LINES"]), tiles](
            packed.values, packed.scale, x_RK, rows, packed.width, **ROWS_LAUNCH
        )
    return x_RK


def requantize_columns(packed: Packed, scaling: Scaling, tile: int = TILE) -> Quantized:
    """`quantize_columns` of the numbers, in FP32: E4M3 values [K, P], scale [K, P / tile]."""
    (rows, tiles), width, padded = packed.scale.shape, packed.width, padded_rows(len(packed.scale))
    values_KP = packed.scale.new_empty((width, padded), dtype=torch.float8_e4m3fn)
    scale_KS = packed.scale.new_empty((width, padded // tile))
    if values_KP.numel():
        columns_kernel[padded // TILE, tiles](
            packed.values, packed.scale, values_KP.view(torch.uint8), scale_KS, rows, width, padded, scaling.floor,
            POWER_OF_TWO=scaling.power_of_two, SCALES=TILE // tile, **TILE_LAUNCH,
        )  # fmt: skip
    return Quantized(values_KP, scale_KS, tile)


@triton.jit
def pack_kernel(x, words, scale, rows, columns, x_r, floor, LINES: tl.constexpr):
    first, column = tl.program_id(0) * LINES, tl.program_id(1) * 128
    x_LV = load_tile(x, first, rows, column, columns, x_r, LINES, 128).to(tl.float32)
    scale_L = power_of_two_scale(largest_bits(x_LV, 1), floor, _CARRY, _SHIFT)
    store_tile(scale, scale_L[:, None], first, rows, tl.program_id(1), tl.num_programs(1), tl.num_programs(1))
    inverse_L = (0x7F000000 - scale_L.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    codes_LV = tl.where((scale_L == scale_L)[:, None], _codes(x_LV * inverse_L[:, None]), 0)
    codes_LGN = tl.reshape(codes_LV, (LINES, 16, 8))
    # Where a code begins in each word, of which it may hold a part.
    bit_N, width = tl.arange(0, 8) * 12, tl.cdiv(columns, 8) * 3
    for word in tl.static_range(3):
        shift_N = bit_N - 32 * word
        parts_LGN = tl.where(shift_N >= 0, codes_LGN << tl.maximum(shift_N, 0), codes_LGN >> tl.maximum(-shift_N, 0))
        parts_LGN = tl.where((shift_N > -12) & (shift_N < 32), parts_LGN, 0)
        words_LG = tl.sum(parts_LGN, 2)
        _store_words(words, words_LG, word, first, rows, width)


@triton.jit
def _store_words(words, words_LG, word, first, rows, width):
    """The `word`th of each group of a program's columns."""
    row_L, group_G = tl.arange(0, words_LG.shape[0]), tl.program_id(1) * 16 + tl.arange(0, 16)
    inside = (row_L[:, None] < rows - first) & (group_G[None, :] * 3 < width)
    words += tl.cast(first, tl.int64) * width + word
    tl.store(words + row_L[:, None] * width + group_G[None, :] * 3, words_LG, mask=inside)


@triton.jit
def unpack_kernel(words, scale, x, rows, columns, LINES: tl.constexpr):
    first, column = tl.program_id(0) * LINES, tl.program_id(1) * 128
    x_LV = _load_packed(words, scale, first, rows, column, columns, LINES)
    store_tile(x, x_LV.to(x.dtype.element_ty), first, rows, column, columns, columns)


@triton.jit
def columns_kernel(words, scale, values, values_scale, rows, columns, padded, floor, POWER_OF_TWO: tl.constexpr,
                   SCALES: tl.constexpr):  # fmt: skip
    """A program has 128 rows and 128 columns."""
    tile, column = tl.program_id(0), tl.program_id(1) * 128
    x_TV = _load_packed(words, scale, tile * 128, rows, column, columns, 128)
    store_columns(x_TV, values, values_scale, tile, padded, column, columns, floor, POWER_OF_TWO, SCALES)


@triton.jit
def _load_packed(words, scale, first, rows, column, columns, LINES: tl.constexpr):
    """128 columns of LINES rows in FP32; zeros beyond the edges."""
    row_L, column_V, width = tl.arange(0, LINES), column + tl.arange(0, 128), tl.cdiv(columns, 8) * 3
    inside = (row_L[:, None] < rows - first) & (column_V[None, :] < columns)
    bit_V = column_V % 8 * 12
    words += tl.cast(first, tl.int64) * width
    word_LV = words + row_L[:, None] * width + (column_V // 8 * 3 + bit_V // 32)[None, :]
    low_LV = tl.load(word_LV, mask=inside, other=0).to(tl.uint32, bitcast=True) >> (bit_V % 32)[None, :]
    # The third and the sixth code go on in the next word.
    rest_LV = tl.load(word_LV + 1, mask=inside & (bit_V % 32 > 20)[None, :], other=0).to(tl.uint32, bitcast=True)
    code_LV = (low_LV | rest_LV << ((32 - bit_V % 32) & 31)[None, :]) & 0xFFF
    tiles = tl.cdiv(columns, 128)
    scale_LS = load_tile(scale, first, rows, column // 128, tiles, tiles, LINES, 1)
    return _numbers(code_LV.to(tl.int32)) * scale_LS


@triton.jit
def _codes(x):
    """int32 codes of FP32 numbers: FP16 without the digits that it lacks, then rounded to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x477E0000)
    # Under 2^-14, FP16 counts in 2^-24.
    subnormal = (size.to(tl.float32, bitcast=True) * 16777216.0).to(tl.int32)
    half = tl.where(size < 0x38800000, subnormal, (size >> 13) - (112 << 10))
    return (half + 0x7 + ((half >> 4) & 1)) >> 4 | ((bits >> 20) & 0x800)


@triton.jit
def _numbers(codes):
    # Read with the exponent's bias of FP32, a number is too small by 2^112.
    return ((codes & 0x7FF) << 17 | (codes & 0x800) << 20).to(tl.float32, bitcast=True) * 5.192296858534828e33


_PACK = {
    "x": "*bf16", "words": "*i32", "scale": "*fp32", "rows": "i32", "columns": "i32:16", "x_r": "i32:16",
    "floor": "fp32", "LINES": ROWS_LAUNCH["LINES"],
}  # fmt: skip
_UNPACK = {
    "words": "*i32", "scale": "*fp32", "x": "*bf16", "rows": "i32", "columns": "i32:16", "LINES": ROWS_LAUNCH["LINES"]
}  # fmt: skip
_COLUMNS = {
    "words": "*i32", "scale": "*fp32", "values": "*u8", "values_scale": "*fp32", "rows": "i32", "columns": "i32:16",
    "padded": "i32:16", "floor": "fp32", "POWER_OF_TWO": True, "SCALES": 1,
}  # fmt: skip
BUILDS = (
    Build("pack E5M6", pack_kernel, _PACK, ROWS_LAUNCH["num_warps"]),
    Build("unpack E5M6", unpack_kernel, _UNPACK, ROWS_LAUNCH["num_warps"]),
    Build("requantize E5M6 as columns", columns_kernel, _COLUMNS, TILE_LAUNCH["num_warps"]),
)
