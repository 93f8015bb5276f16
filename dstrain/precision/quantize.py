"""The plain meaning of quantising: E4M3 values with a scale for each tile. Every fast form must equal it bit by bit.

    rows      1x128     a token's channels: products over channels
    columns   128x1     a channel's tokens: products over tokens, hence stored transposed; the rows of each expert begin
                        a tile of their own
    blocks    128x128   weights

Sides need not be multiples of 128. A tile that holds NaN or infinity has NaN as its scale, and zeros as its values.

Shapes: R rows, K columns, E experts, P rows of all experts, each filled up to a multiple of 128.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.precision.formats import E4M3, TILE, Scaling


@dataclass(frozen=True)
class Quantized:
    """`values`, float8_e4m3fn, and the FP32 `scale` of each tile of `tile` numbers of the last dimension; of blocks, of
    as many rows as well."""

    values: Tensor
    scale: Tensor
    tile: int = TILE


def padded_rows(rows: int, experts: int = 1) -> int:
    """P: enough for any counts, so that the host needs none."""
    return (rows + (TILE - 1) * experts) // TILE * TILE


def quantize_rows(x: Tensor, scaling: Scaling, tile: int = TILE) -> Quantized:
    """[..., K]: values [..., K], scale [..., ceil(K / tile)]."""
    width = x.shape[-1]
    tiles = _pad(x.float(), -1, tile).unflatten(-1, (-1, tile))
    scale = scaling.scales(tiles.abs().amax(-1))
    return Quantized(_cast(tiles, scale[..., None]).flatten(-2)[..., :width].contiguous(), scale, tile)


def quantize_columns(
    x_RK: Tensor, scaling: Scaling, counts: Sequence[int] | None = None, tile: int = TILE
) -> Quantized:
    """[R, K], the first counts[0] rows those of the first expert: values [K, P], scale [K, P / tile].

    Zeros fill up the rows of each expert, and what is left of P behind the last one.
    """
    counts = [len(x_RK)] if counts is None else counts
    parts = [_pad(part.float(), 0, TILE) for part in x_RK.split(list(counts))]
    used = sum(map(len, parts))
    parts.append(x_RK.new_zeros(padded_rows(len(x_RK), len(counts)) - used, x_RK.shape[1], dtype=torch.float32))
    return quantize_rows(torch.cat(parts).t().contiguous(), scaling, tile)


def quantize_blocks(weight: Tensor, scaling: Scaling) -> Quantized:
    """[..., M, K]: values [..., M, K], scale [..., ceil(M / 128), ceil(K / 128)]."""
    rows, columns = weight.shape[-2:]
    padded = _pad(_pad(weight.float(), -1, TILE), -2, TILE)
    tiles = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE)).transpose(-3, -2)
    scale = scaling.scales(tiles.abs().amax((-2, -1)))
    values = _cast(tiles, scale[..., None, None]).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return Quantized(values[..., :rows, :columns].contiguous(), scale)


def dequantize_rows(q: Quantized) -> Tensor:
    """FP32, values times the scales of their tiles of the last dimension."""
    return q.values.float() * spread(q.scale, q.values.shape[-1], q.tile)


def dequantize_blocks(q: Quantized) -> Tensor:
    """FP32, values times the scales of their blocks."""
    rows, columns = q.values.shape[-2:]
    return q.values.float() * spread(spread(q.scale, columns).transpose(-2, -1), rows).transpose(-2, -1)


def spread(scale: Tensor, length: int, tile: int = TILE) -> Tensor:
    """A scale for each of the `length` numbers of the last dimension."""
    return scale.repeat_interleave(tile, -1)[..., :length]


def _pad(x: Tensor, dim: int, tile: int) -> Tensor:
    missing = -x.shape[dim] % tile
    if not missing:
        return x
    return F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing))


def _cast(tiles: Tensor, scale: Tensor) -> Tensor:
    scaled = (tiles / scale).masked_fill_(scale.isnan(), 0.0)
    return scaled.clamp_(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn)
