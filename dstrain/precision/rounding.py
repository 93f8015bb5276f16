"""Quantising and dequantising at once, quick on a CPU: what FP8 would keep of a tensor, as numbers to compute with.

Values equal those of precision/quantize.py bit by bit. FP32 copies are made of a few rows at a time, so that every pass
over them finds them in the cache. Rounding adds a number whose last place is that of the result, and takes it away.

Shapes: R rows, K columns, S tiles of a row, V values of a tile.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dstrain.precision.formats import E4M3, TILE, Scaling
from dstrain.precision.quantize import Quantized

WIDE_ELEMENTS = 1 << 17


def round_rows(x_RK: Tensor, scaling: Scaling, dtype: torch.dtype, tile: int = TILE) -> Tensor:
    """The dequantised values of `quantize_rows`, [R, K] in `dtype`."""

    def rounds(wide: Tensor) -> None:
        for tiles, _ in _tiles(wide, tile):
            _round(tiles, (-1,), scaling)

    return _by_parts(x_RK, dtype, rounds)


def round_columns(
    x_RK: Tensor, scaling: Scaling, dtype: torch.dtype, counts: Sequence[int] | None = None, tile: int = TILE
) -> Tensor:
    """The dequantised values of `quantize_columns` in their places, [R, K] in `dtype`."""
    rounded_RK = torch.empty_like(x_RK, dtype=dtype, memory_format=torch.contiguous_format)
    for x, rounded in zip(*(t.split(counts or [len(x_RK)]) for t in (x_RK, rounded_RK)), strict=True):
        step = max(tile, WIDE_ELEMENTS // max(1, x.shape[1]) // tile * tile)
        for part, out in zip(x.split(step), rounded.split(step), strict=True):
            wide, whole = _wide(part), len(part) // tile * tile
            _round(wide[:whole].unflatten(0, (-1, tile)), (1,), scaling)
            if whole < len(part):
                _round(wide[whole:], (0,), scaling)
            out.copy_(wide)
    return rounded_RK


def round_blocks(weight: Tensor, scaling: Scaling, dtype: torch.dtype) -> Tensor:
    """The dequantised values of `quantize_blocks`, [..., M, K] in `dtype`."""

    def rounds(wide: Tensor) -> None:
        for tiles, _ in _tiles(wide, TILE):
            _round(tiles, (0, 2), scaling)

    matrices = weight.flatten(0, -3) if weight.dim() > 2 else weight[None]
    parts = [part for matrix in matrices for part in matrix.split(TILE)]
    return torch.cat([_by_parts(part, dtype, rounds, len(part)) for part in parts]).view(weight.shape)


def encode_rows(x_RK: Tensor, scaling: Scaling, dtype: torch.dtype, tile: int = TILE) -> tuple[Quantized, Tensor]:
    """What `quantize_rows` gives, and its dequantised values, [R, K] in `dtype`."""
    rows, width = x_RK.shape
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_RK.device)
    q = Quantized(values, torch.empty(rows, -(-width // tile), device=x_RK.device), tile)
    for x, part, scale in zip(*(t.split(_rows(x_RK)) for t in (x_RK, q.values, q.scale)), strict=True):
        wide = _wide(x)
        for tiles, columns in _tiles(wide, tile):
            scale[:, columns] = _divide(tiles, (-1,), scaling).squeeze(-1)
            bad = scale[:, columns].isnan()
            if bad.any():
                tiles.masked_fill_(bad[..., None], 0.0)
        part.copy_(wide)
    return q, decode_rows(q, dtype)


def decode_rows(q: Quantized, dtype: torch.dtype) -> Tensor:
    """`dequantize_rows` in `dtype`."""
    wide_RK = torch.empty_like(q.values, dtype=dtype)
    parts = (t.split(_rows(q.values)) for t in (q.values, q.scale, wide_RK))
    for values, scale, out in zip(*parts, strict=True):
        wide = e4m3_values(values)
        for tiles, columns in _tiles(wide, q.tile):
            tiles.mul_(scale[:, columns, None])
        out.copy_(wide)
    return wide_RK


def e4m3_values(values: Tensor) -> Tensor:
    """E4M3 as FP32.

    torch's own cast goes byte by byte on a CPU, so there the bits are moved to where FP16 has sign, exponent and
    fraction: the same number times 2^-8, subnormal ones included. The NaN becomes 480; where one could stand, the scale
    of its tile is NaN.
    """
    if values.device.type != "cpu":
        return values.view(torch.float8_e4m3fn).float()
    bits = values.view(torch.int8).to(torch.int16)  # the sign in bits 7 to 15
    return bits.mul_(128).bitwise_and_(~(1 << 14)).view(torch.float16).float().mul_(256.0)


def _divide(tiles: Tensor, dims: tuple[int, ...], scaling: Scaling) -> Tensor:
    """By their scales, in place; those of one scale lie along `dims`. The scales."""
    largest = torch.maximum(tiles.amax(dims, keepdim=True), tiles.amin(dims, keepdim=True).neg_())
    scale = scaling.scales(largest)
    tiles.div_(scale)
    return scale


def _round(tiles: Tensor, dims: tuple[int, ...], scaling: Scaling) -> None:
    """FP32 tiles, in place."""
    if not tiles.numel():
        return
    scale = _divide(tiles, dims, scaling)
    power = (tiles.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=E4M3.smallest_normal)
    magic = power.mul_(E4M3.magic)
    tiles.add_(magic).sub_(magic).mul_(scale)


def _tiles(wide_RK: Tensor, tile: int) -> Iterator[tuple[Tensor, slice]]:
    """Whole tiles of the columns as [R, S, V], then a narrower last one; with their numbers."""
    whole = wide_RK.shape[1] // tile
    if whole:
        yield wide_RK[:, : whole * tile].unflatten(1, (whole, tile)), slice(whole)
    if whole * tile < wide_RK.shape[1]:
        yield wide_RK[:, whole * tile :].unsqueeze(1), slice(whole, whole + 1)


def _by_parts(x_RK: Tensor, dtype: torch.dtype, rounds: Callable[[Tensor], None], rows: int = 0) -> Tensor:
    rounded_RK = torch.empty_like(x_RK, dtype=dtype, memory_format=torch.contiguous_format)
    for part, out in zip(*(t.split(rows or _rows(x_RK)) for t in (x_RK, rounded_RK)), strict=True):
        wide = _wide(part)
        rounds(wide)
        out.copy_(wide)
    return rounded_RK


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _rows(x_RK: Tensor) -> int:
    return max(1, WIDE_ELEMENTS // max(1, x_RK.shape[-1]))
