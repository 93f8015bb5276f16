"""Rows by their numbers: quantised ones taken, values and scales together; and whether kernels can do it.

Shapes: A rows, D of a row, S tiles of a row, N rows taken.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from dstrain.precision.quantize import Quantized


def has_kernels(x: Tensor) -> bool:
    """Whether Triton can work on `x`; its kernels are imported nowhere else."""
    return x.is_cuda and find_spec("triton") is not None


def take_rows(rows: Quantized, row_N: Tensor) -> Quantized:
    """Rows row_N (int64) of [A, D] and [A, S]: values [N, D], scale [N, S]."""
    if has_kernels(rows.values):
        from dstrain.precision.kernels.permute import gather_rows

        return gather_rows(rows, row_N)
    return Quantized(_take_bytes(rows.values, row_N), rows.scale.index_select(0, row_N), rows.tile)


def _take_bytes(values_AD: Tensor, row_N: Tensor) -> Tensor:
    """As bytes, eight at a time where they lie so: a CPU has no kernel for E4M3, and is slow with single bytes."""
    places = values_AD.shape[1], values_AD.stride(0), values_AD.storage_offset()
    wide = values_AD.view(torch.uint8 if any(place % 8 for place in places) else torch.int64)
    return wide.index_select(0, row_N).view(values_AD.dtype)
