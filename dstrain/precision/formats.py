"""Narrow numbers and the scales that bring tensors into their range.

    E4M3   1 sign, 4 exponent, 3 fraction bits; largest 448, smallest 2^-9; one NaN, no infinity
    E5M6   1, 5, 6; largest 65024 as DeepSeek's kernels scale it, smallest 2^-20: for the input of attention's output
           projection
    UE8M0  a power of two, as the scale of a tile

DeepSeek-V3 (arXiv:2412.19437, section 3.3) uses E4M3 throughout, and a scale for each tile: 1x128 of activations, 128x1
where a product runs over tokens, 128x128 of weights. A scale is found in the tile itself, when it is quantised.
"""

from dataclasses import dataclass
from math import frexp

import torch
from torch import Tensor

TILE = 128
# The least largest magnitude of a tile of activations or weights: that of DeepSeek's kernels.
FLOOR = 1e-4
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Format:
    """A floating-point format as it is used here: subnormal numbers, no infinity."""

    name: str
    exponent_bits: int
    fraction_bits: int
    largest: float

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (2 - 2 ** (self.exponent_bits - 1))

    @property
    def magic(self) -> float:
        """Added to a number and taken away again, times the number's power of two, it rounds to the fraction."""
        return 1.5 * 2.0 ** (23 - self.fraction_bits)


E4M3 = Format("e4m3", 4, 3, 448.0)
E5M6 = Format("e5m6", 5, 6, 65024.0)


@dataclass(frozen=True)
class Scaling:
    """How the scale of a tile follows from its largest magnitude, which counts as at least `floor`."""

    power_of_two: bool = True
    floor: float = 0.0

    def scales(self, largest: Tensor, number: Format = E4M3) -> Tensor:
        """FP32 scales, at least 2^-126; NaN where the tile holds NaN or infinity, or numbers too large for a scale.

        power of two: the smallest that brings the tile into the range of the format, so nothing saturates, and
        quantising a second time changes nothing. Otherwise largest / format.largest, and 1 for a tile of zeros.
        """
        largest = largest.clamp_min(self.floor) if self.floor else largest
        if self.power_of_two:
            exponent = scale_exponents(largest, number.largest)
            return (exponent << 23).view(torch.float32).masked_fill_(exponent == 255, torch.nan)
        scale = (largest / number.largest).clamp_min_(SMALLEST_SCALE).masked_fill_(largest == 0, 1.0)
        return scale.masked_fill_(~largest.isfinite(), torch.nan)


def scale_exponents(largest: Tensor, limit: float) -> Tensor:
    """UE8M0 (int32) of the smallest power of two s >= 2^-126 with largest <= limit * s.

    Works on the bits of FP32: with limit = f * 2^e and 1 <= f < 2, the exponent of a magnitude is e too large, plus one
    if its own fraction exceeds f: what is missing to f carries over into the exponent. 255, which infinity and NaN have
    and the largest numbers reach, stays 255.
    """
    fraction, exponent = frexp(limit)  # fraction is f / 2, exponent e + 1
    carry, shift = int((2 - 2 * fraction) * 2**23) - 1, exponent - 1
    # A NaN may have a sign, or all bits set, to which nothing can be added.
    own = ((largest.view(torch.int32) & 0x7FFFFFFF).clamp_(max=0x7F800000) + carry) >> 23
    return (own - shift).clamp_(min=1).masked_fill_(own == 255, 255)
