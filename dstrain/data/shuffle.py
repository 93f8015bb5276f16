"""Randomness without state: everything is a function of a key and a number.

A permutation of [0, n) is an alternating Feistel network on the smallest power of two that holds n, walked along its
cycle until it lands below n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). A blend gives the first
corpus every position p where floor(p * share) rises, and splits the other positions in the same way among the rest, so
that counts never drift from the weights.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Hash = TypeVar("Hash", int, np.ndarray)

MASK = 2**64 - 1
# Fractions of a blend are rounded to multiples of 1 / BLEND_UNIT.
BLEND_UNIT = 2**40
ROUNDS = 6


def mix(x: Hash) -> Hash:
    """SplitMix64's output function (Steele et al. 2014) of a Python integer below 2**64, or of a uint64 array."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def derive_key(*parts: int) -> int:
    """A 64-bit key from a tuple of integers, as different as the tuples are."""
    key = 0
    for part in parts:
        key = mix(key ^ (part & MASK))
    return key


def permute(index: int, size: int, key: int) -> int:
    """Where `index` goes under the permutation of [0, size) that `key` stands for."""
    # Halves of one or two bits would favour some orders of a tiny corpus.
    bits = max(6, (size - 1).bit_length())
    low_bits, high_bits = bits // 2, bits - bits // 2
    while True:
        index = _feistel(index, low_bits, high_bits, key)
        if index < size:
            return index


def _feistel(index: int, low_bits: int, high_bits: int, key: int) -> int:
    """ROUNDS is even, so the two halves have their first widths at the end."""
    high, low = index >> low_bits, index & ((1 << low_bits) - 1)
    for turn in range(ROUNDS):
        high, low = low, high ^ (mix(key ^ (low << 8) ^ turn) & ((1 << high_bits) - 1))
        low_bits, high_bits = high_bits, low_bits
    return high << low_bits | low


def blend_shares(weights: Sequence[float]) -> list[int]:
    """Each weight's share of itself and those after it, in units of 1 / BLEND_UNIT."""
    return [round(weight / sum(weights[number:]) * BLEND_UNIT) for number, weight in enumerate(weights)]


def blend(position: int, shares: Sequence[int]) -> tuple[int, int]:
    """(corpus, position within it): of the first p positions, a corpus of weight w has p * w within len(shares)."""
    for number, share in enumerate(shares):
        count = position * share // BLEND_UNIT
        if (position + 1) * share // BLEND_UNIT > count:
            return number, count
        position -= count
    raise ValueError(f"the last of the shares {shares} must be {BLEND_UNIT}")
