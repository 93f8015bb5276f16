"""E4M3 numbers and scales of tiles in a kernel, in integers, bit by bit as formats.py and quantize.py have them.

Rounding by hand makes kernels legal on GPUs without FP8, keeps them exact where the chip's own conversion goes through
FP16 and so rounds twice (capability 8.9), and lets them run in Triton's interpreter, whose conversions are wrong.
"""

from math import frexp

import triton
from triton import language as tl

from dstrain.precision.formats import E4M3, SMALLEST_SCALE, Format


def carry_and_shift(number: Format) -> tuple[int, int]:
    """What formats.scale_exponents adds to a magnitude's bits, and takes away from the exponent."""
    fraction, exponent = frexp(number.largest)
    return int((2 - 2 * fraction) * 2**23) - 1, exponent - 1


_E4M3_LARGEST = tl.constexpr(E4M3.largest)
_E4M3_CARRY, _E4M3_SHIFT = map(tl.constexpr, carry_and_shift(E4M3))
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def largest_bits(x, axis: tl.constexpr):
    """The bits of the largest magnitude along an axis: as integers they are in the order of the numbers, then infinity,
    then NaN."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@triton.jit
def power_of_two_scale(bits, floor, CARRY: tl.constexpr, SHIFT: tl.constexpr):
    largest = tl.maximum(tl.minimum(bits, _INFINITE).to(tl.float32, bitcast=True), floor)
    own = (largest.to(tl.int32, bitcast=True) + CARRY) >> 23
    exponent = tl.where(own == 255, 255, tl.maximum(own - SHIFT, 1))
    # The bits of NaN, where those of infinity would be.
    return ((exponent << 23) | tl.where(own == 255, 0x400000, 0)).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(bits, floor, POWER_OF_TWO: tl.constexpr):
    """FP32 scales of tiles whose largest magnitudes have these bits; NaN where there is none."""
    if POWER_OF_TWO:
        return power_of_two_scale(bits, floor, _E4M3_CARRY, _E4M3_SHIFT)
    finite = tl.where(bits < _INFINITE, bits, 0).to(tl.float32, bitcast=True)
    largest = tl.maximum(finite, floor)
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, _E4M3_LARGEST, tl.float32)), _SMALLEST_SCALE)
    scale = tl.where(largest == 0, 1.0, scale)
    return tl.where(bits < _INFINITE, scale, float("nan"))


@triton.jit
def e4m3_codes(x, scale, POWER_OF_TWO: tl.constexpr):
    """uint8 codes of x / scale, both FP32 of one shape; zeros where the scale is NaN."""
    if POWER_OF_TWO:
        # 1 / scale is a power of two, too.
        scaled = x * (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        scaled = tl.div_rn(x, scale)
    return tl.where(scale == scale, _codes(scaled), 0).to(tl.uint8)


@triton.jit
def _codes(x):
    """int32 codes of FP32 numbers, rounded to even, no larger than 448."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Under 2^-6 numbers are multiples of 2^-9, the last place of 2^14.
    subnormal = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)


@triton.jit
def e4m3_numbers(codes):
    """FP32 numbers of uint8 codes; those that mean NaN, which no quantiser makes, become 480."""
    wide = codes.to(tl.int32)
    # Read with the exponent's bias of FP32, a number is too small by 2^120.
    return ((wide & 0x7F) << 20 | (wide & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36
