"""E5M6, 12 bits a number: for an activation that E4M3 would round too much.

DeepSeek-V3 (section 3.3.3) keeps the input of attention's output projection in it, since the backward pass of attention
needs it as well. Scales are powers of two, so that numbers which become E4M3 in tiles of 128x1 are rounded once.
As in DeepSeek's kernels (github.com/deepseek-ai/TileKernels), a number over its scale becomes FP16 by dropping digits,
then its fraction is rounded to 6 bits, to even.

Number n of a row occupies the bits 12 n to 12 n + 11 of its int32 words, the lowest first: 8 numbers in 3 words.

Shapes: R rows, K columns, S = ceil(K / 128), W = 3 * ceil(K / 8) words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.precision.formats import E5M6, FLOOR, TILE, Scaling
from dstrain.precision.quantize import spread

BITS, GROUP, WORDS = 12, 8, 3
SCALING = Scaling(floor=FLOOR)


@dataclass(frozen=True)
class Packed:
    """`values`, int32 [R, W], and the FP32 `scale` [R, S] of a matrix with `width` columns."""

    values: Tensor
    scale: Tensor
    width: int


def pack(x_RK: Tensor) -> Packed:
    """Quantises; a tile that holds NaN or infinity has NaN as its scale, and zeros as its numbers."""
    width = x_RK.shape[1]
    tiles_RSV = F.pad(x_RK.float(), (0, -width % TILE)).unflatten(1, (-1, TILE))
    scale_RS = SCALING.scales(tiles_RSV.abs().amax(2), E5M6)
    scaled = (tiles_RSV / scale_RS[..., None]).masked_fill_(scale_RS[..., None].isnan(), 0.0)
    padded = -(-width // GROUP) * GROUP
    code = _codes(scaled.flatten(1)[:, :padded]).unflatten(1, (-1, GROUP))
    return Packed(torch.stack(_words(code), 2).flatten(1), scale_RS, width)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The numbers, [R, K] in `dtype`."""
    words = packed.values.unflatten(1, (-1, WORDS)).long() & 0xFFFFFFFF
    codes = []
    for number in range(GROUP):
        word, shift = divmod(BITS * number, 32)
        bits = words[..., word] >> shift
        if shift > 32 - BITS:
            bits |= words[..., word + 1] << (32 - shift)
        codes.append(bits & 0xFFF)
    code_RK = torch.stack(codes, 2).flatten(1)[:, : packed.width]
    # FP16 has sign and exponent where E5M6 has them, and four more fraction bits.
    numbers_RK = (code_RK << 4).to(torch.int16).view(torch.float16).float()
    return numbers_RK.mul_(spread(packed.scale, packed.width)).to(dtype)


def _codes(scaled: Tensor) -> Tensor:
    """FP32 numbers of E5M6's range as its codes, int64."""
    bits = scaled.view(torch.int32)
    # Normal numbers of FP16 drop 13 fraction bits; below, what is less than its last place, 2^-24.
    normal = (bits & ~0x1FFF).view(torch.float32)
    subnormal = (scaled * 2.0**24).trunc() * 2.0**-24
    half = torch.where(scaled.abs() < 2.0**-14, subnormal, normal).half().view(torch.int16).long() & 0xFFFF
    return (half + 0x7 + (half >> 4 & 1)) >> 4


def _words(code_RGN: Tensor) -> list[Tensor]:
    """The int32 words of groups of codes."""
    words = [torch.zeros_like(code_RGN[..., 0]) for _ in range(WORDS)]
    for number, code in enumerate(code_RGN.unbind(2)):
        word, shift = divmod(BITS * number, 32)
        words[word] |= code << shift
        if shift > 32 - BITS:
            words[word + 1] |= code >> (32 - shift)
    return [word.to(torch.int32) for word in words]
