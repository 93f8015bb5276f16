"""Quantised rows in the order of experts, and what experts return summed for each row, on a GPU.

Values and scales move in one launch. Sums are those of `Bags.sum` in dispatch/permute.py bit by bit: FP32, in the
order of a bag, rounded once.

Shapes: R rows, N pairs of a row and an expert, D hidden, S tiles of 128 along it; L rows of a program, V its columns.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from dstrain.precision.kernels.build import Build
from dstrain.precision.quantize import Quantized

GATHER_LAUNCH = {"LINES": 8, "WIDTH": 1024, "num_warps": 4}
SUM_LAUNCH = {"WIDTH": 1024, "num_warps": 4}


def gather_rows(rows: Quantized, row_N: Tensor) -> Quantized:
    """Rows row_N (int64), with their scales: values [N, D], scale [N, S]."""
    pairs, hidden, tiles = len(row_N), rows.values.shape[1], rows.scale.shape[1]
    values_ND, scale_NS = rows.values.new_empty((pairs, hidden)), rows.scale.new_empty((pairs, tiles))
    if values_ND.numel():
        gather_kernel[triton.cdiv(pairs, GATHER_LAUNCH["LINES"]), triton.cdiv(hidden, GATHER_LAUNCH["WIDTH"])](
            rows.values.view(torch.uint8), rows.scale, row_N, values_ND.view(torch.uint8), scale_NS,
            pairs, hidden, tiles, rows.values.stride(0), rows.scale.stride(0), **GATHER_LAUNCH,
        )  # fmt: skip
    return Quantized(values_ND, scale_NS, rows.tile)


def sum_rows(rows_ND: Tensor, order_N: Tensor, start_R: Tensor) -> Tensor:
    """Row r is the sum of rows order_N[start_R[r] : start_R[r + 1]] (int64): [R, D], BF16 or FP32 as `rows_ND` is."""
    targets, hidden = len(start_R), rows_ND.shape[1]
    summed_RD = rows_ND.new_empty((targets, hidden))
    if summed_RD.numel():
        sum_kernel[targets, triton.cdiv(hidden, SUM_LAUNCH["WIDTH"])](
            rows_ND, order_N, start_R, summed_RD, targets, len(order_N), hidden, rows_ND.stride(0), **SUM_LAUNCH
        )
    return summed_RD


@triton.jit
def gather_kernel(values, scale, row, out, out_scale, pairs, hidden, tiles, values_r, scale_r, LINES: tl.constexpr,
                  WIDTH: tl.constexpr):  # fmt: skip
    """A program moves WIDTH columns of LINES rows, and their scales where these begin."""
    pair_L = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    row_L = tl.load(row + pair_L, mask=pair_L < pairs, other=0)
    column_V = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (pair_L[:, None] < pairs) & (column_V[None, :] < hidden)
    part_LV = tl.load(values + row_L[:, None] * values_r + column_V[None, :], mask=inside)
    tl.store(out + pair_L[:, None] * hidden + column_V[None, :], part_LV, mask=inside)
    # No tile is narrower than 32 columns.
    tile_V = tl.program_id(1) * (WIDTH // 32) + tl.arange(0, WIDTH // 32)
    inside = (pair_L[:, None] < pairs) & (tile_V[None, :] < tiles)
    scale_LV = tl.load(scale + row_L[:, None] * scale_r + tile_V[None, :], mask=inside)
    tl.store(out_scale + pair_L[:, None] * tiles + tile_V[None, :], scale_LV, mask=inside)


@triton.jit
def sum_kernel(rows, order, start, out, targets, elements, hidden, rows_n, WIDTH: tl.constexpr):
    """A program sums WIDTH columns of one row."""
    target = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(start + target), tl.load(start + target + 1, mask=target + 1 < targets, other=elements)
    column_V = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sum_V = tl.zeros((WIDTH,), tl.float32)
    for place in range(begin, end):
        row = tl.load(order + place) * rows_n
        sum_V += tl.load(rows + row + column_V, mask=column_V < hidden, other=0.0).to(tl.float32)
    tl.store(out + target * hidden + column_V, sum_V.to(out.dtype.element_ty), mask=column_V < hidden)


_GATHER = {
    "values": "*u8", "scale": "*fp32", "row": "*i64", "out": "*u8", "out_scale": "*fp32", "pairs": "i32",
    "hidden": "i32:16", "tiles": "i32", "values_r": "i32:16", "scale_r": "i32",
    "LINES": GATHER_LAUNCH["LINES"], "WIDTH": GATHER_LAUNCH["WIDTH"],
}  # fmt: skip
_SUM = {
    "rows": "*bf16", "order": "*i64", "start": "*i64", "out": "*bf16", "targets": "i32", "elements": "i32",
    "hidden": "i32:16", "rows_n": "i32:16", "WIDTH": SUM_LAUNCH["WIDTH"],
}  # fmt: skip
BUILDS = (
    Build("permute rows and scales", gather_kernel, _GATHER, GATHER_LAUNCH["num_warps"]),
    Build("un-permute, summing", sum_kernel, _SUM, SUM_LAUNCH["num_warps"]),
)
