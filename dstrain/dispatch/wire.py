"""Formats of a row on the wire: rows to bytes and back.

    float32, bfloat16   the values
    fp8                 E4M3, one power-of-two scale per 128 values, as DeepSeek-V3 dispatches (arXiv:2412.19437, 3.3)
    fp4                 E2M1, two values a byte, one power-of-two scale per 32 (OCP Microscaling, MXFP4); an experiment

A quantised row is its values, then its scales (E8M0: one exponent byte, 2^(byte - 127), 255 is NaN), then zeros up to a
multiple of 8 bytes, so that rows can be gathered as int64. A scale is the smallest power of two, at least 2^-126, that
brings the largest magnitude of its tile to 448 (E4M3) or 6 (E2M1) or below: nothing saturates, zeros stay zeros, and
quantising a second time changes nothing. There is no floor of 1e-4 under that magnitude, as DeepSeek's kernel has:
gradients travel, too, and may be far smaller. A tile with NaN, infinity, or a magnitude above 2.97e38 (E4M3) or
2.55e38 (E2M1) arrives as NaN throughout; the other tiles of the row are as ever.

Shapes: R rows, D hidden, B bytes of a row, S tiles of a row, V values of a tile.
"""

from abc import ABC, abstractmethod
from functools import cache
from math import frexp

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.errors import ConfigError
from dstrain.plan.traffic import ROW_ALIGNMENT, row_bytes

NAMES = ("float32", "bfloat16", "fp8", "fp4")
# Values decoded at a time; on a CPU a block stays in the cache, too.
WIDE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


class WireFormat(ABC):
    """Rows to bytes and back, on the device of the rows."""

    name: str

    def row_bytes(self, hidden: int) -> int:
        """Bytes of a row, a multiple of 8."""
        return row_bytes(self.name, hidden)

    @abstractmethod
    def encode(self, rows_RD: Tensor, out: Tensor | None = None) -> Tensor:
        """uint8 [R, row_bytes(D)]. Written into `out` if given, whose rows may be part of wider ones (of 8n bytes).

        Without `out` the result may share the memory of the rows.
        """

    @abstractmethod
    def decode(self, bytes_RB: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        """The rows, [R, hidden]. They may share the memory of the bytes, which may be part of wider rows."""


def wire_format(name: str, compute_dtype: torch.dtype) -> WireFormat:
    """The format that config.dispatch.wire names; auto is the compute dtype. ConfigError for an unknown name."""
    if name == "auto":
        name = str(compute_dtype).removeprefix("torch.")
    if name not in NAMES:
        raise ConfigError("dispatch.wire", name, "no such format", f"Choose one of {', '.join(NAMES)}.")
    quantised: dict[str, WireFormat] = {"fp8": Fp8(), "fp4": Fp4()}
    return quantised.get(name) or Plain(getattr(torch, name))


class Plain(WireFormat):
    """The values themselves, in a dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.name = dtype, str(dtype).removeprefix("torch.")

    def encode(self, rows_RD: Tensor, out: Tensor | None = None) -> Tensor:
        used = rows_RD.shape[1] * self.dtype.itemsize
        plain_RD = rows_RD.to(self.dtype).contiguous()
        is_aligned = used % ROW_ALIGNMENT == 0 and plain_RD.storage_offset() * plain_RD.itemsize % ROW_ALIGNMENT == 0
        if out is None and is_aligned and plain_RD.numel():
            return plain_RD.view(torch.uint8)
        out = _bytes(self, rows_RD, out, used)
        out[:, :used].view(self.dtype).copy_(plain_RD)
        return out

    def decode(self, bytes_RB: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        return bytes_RB[:, : hidden * self.dtype.itemsize].view(self.dtype).to(dtype)


class _Quantised(WireFormat):
    """Decoding in blocks of rows: where a rank gets the tokens of all ranks, FP32 copies of all would be large."""

    def decode(self, bytes_RB: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
        rows_RD = bytes_RB.new_empty((len(bytes_RB), hidden), dtype=dtype)
        block = max(1, WIDE_ELEMENTS[bytes_RB.device.type] // hidden)
        for part_RB, part_RD in zip(bytes_RB.split(block), rows_RD.split(block), strict=True):
            part_RD.copy_(self._values(part_RB, hidden))
        return rows_RD

    @abstractmethod
    def _values(self, bytes_RB: Tensor, hidden: int) -> Tensor:
        """FP32."""


class Fp8(_Quantised):
    """E4M3 with a scale per 128 values: 1 + 1/128 bytes a value."""

    name = "fp8"
    tile = 128
    largest = 448.0

    def encode(self, rows_RD: Tensor, out: Tensor | None = None) -> Tensor:
        hidden = rows_RD.shape[1]
        scaled_RSV, scale8_RS = _scaled(rows_RD, self.tile, self.largest)
        used = hidden + scale8_RS.shape[1]
        out = _bytes(self, rows_RD, out, used)
        out[:, :hidden].view(torch.float8_e4m3fn).copy_(scaled_RSV.flatten(1)[:, :hidden])
        out[:, hidden:used] = scale8_RS
        return out

    def _values(self, bytes_RB: Tensor, hidden: int) -> Tensor:
        tiles = -(-hidden // self.tile)
        values_RD = _e4m3_values(bytes_RB[:, :hidden])
        return _unscaled(values_RD, bytes_RB[:, hidden : hidden + tiles], self.tile)


class Fp4(_Quantised):
    """E2M1 with a scale per 32 values, whole tiles only: 17/32 bytes a value; of two, the first is the low half."""

    name = "fp4"
    tile = 32
    largest = 6.0

    def encode(self, rows_RD: Tensor, out: Tensor | None = None) -> Tensor:
        scaled_RSV, scale8_RS = _scaled(rows_RD, self.tile, self.largest)
        pairs = _e2m1_bytes(scaled_RSV.flatten(1))
        values = pairs.shape[1]
        used = values + scale8_RS.shape[1]
        out = _bytes(self, rows_RD, out, used)
        out[:, :values] = pairs
        out[:, values:used] = scale8_RS
        return out

    def _values(self, bytes_RB: Tensor, hidden: int) -> Tensor:
        tiles = -(-hidden // self.tile)
        values = tiles * self.tile // 2
        pairs = bytes_RB[:, :values].reshape(-1).int()
        values_RD = _e2m1_pairs(bytes_RB.device).index_select(0, pairs).view(torch.float32).view(-1, 2 * values)
        return _unscaled(values_RD, bytes_RB[:, values : values + tiles], self.tile)[:, :hidden]


def _bytes(wire: WireFormat, rows_RD: Tensor, out: Tensor | None, used: int) -> Tensor:
    """Where encoded rows go: `out` or new memory; the bytes behind the `used` ones are zeroed."""
    rows, hidden = rows_RD.shape
    if out is None:
        out = rows_RD.new_empty((rows, wire.row_bytes(hidden)), dtype=torch.uint8)
    if used < out.shape[1]:
        out[:, used:] = 0
    return out


def _scaled(rows_RD: Tensor, tile: int, largest: float) -> tuple[Tensor, Tensor]:
    """The tiles over their scales, FP32 [R, S, V] (zeros fill the last one), and the scales as int32 E8M0 [R, S]."""
    missing = -rows_RD.shape[1] % tile
    tiles_RSV = (F.pad(rows_RD, (0, missing)) if missing else rows_RD).float().unflatten(1, (-1, tile))
    largest_RS = torch.maximum(tiles_RSV.amax(2), tiles_RSV.amin(2).neg())
    scale8_RS = _scale_exponents(largest_RS, largest)
    # 2^(127 - byte), put together from its bits.
    inverse_RS = (254 - scale8_RS << 23).view(torch.float32)
    out = None if tiles_RSV.data_ptr() == rows_RD.data_ptr() else tiles_RSV
    return torch.mul(tiles_RSV, inverse_RS[:, :, None], out=out), scale8_RS


def _scale_exponents(largest_RS: Tensor, largest: float) -> Tensor:
    """E8M0 (int32) of the smallest power of two s with magnitude <= largest * s.

    Works on the bits of FP32: with largest = f * 2^e and 1 <= f < 2, the exponent of a magnitude is e too large, plus
    one if its own fraction exceeds f: what is missing to f carries over into the exponent. 255, which infinity and NaN
    have and the largest numbers reach, stays 255.
    """
    fraction, exponent = frexp(largest)  # fraction is f / 2, exponent e + 1
    carry, shift = int((2 - 2 * fraction) * 2**23) - 1, exponent - 1
    exponent_RS = (largest_RS.view(torch.int32) + carry) >> 23
    return (exponent_RS - shift).clamp_(min=1).masked_fill_(exponent_RS == 255, 255)


def _unscaled(values_RD: Tensor, scale8_RS: Tensor, tile: int) -> Tensor:
    """FP32 values, in place, times their scales."""
    scale_RS = scale8_RS.view(torch.float8_e8m0fnu).float()
    hidden = values_RD.shape[1]
    whole = hidden // tile
    values_RD[:, : whole * tile].unflatten(1, (whole, tile)).mul_(scale_RS[:, :whole, None])
    if whole * tile < hidden:
        values_RD[:, whole * tile :].mul_(scale_RS[:, whole:])
    return values_RD


def _e4m3_values(bytes_RD: Tensor) -> Tensor:
    """E4M3 bytes as FP32.

    torch's own cast goes byte by byte on CPU, so there the bits are moved to where FP16 has sign, exponent and
    fraction: the same number times 2^-8, subnormal ones included. Bytes that mean NaN become 480; the scale of their
    tile is NaN.
    """
    if bytes_RD.device.type != "cpu":
        return bytes_RD.view(torch.float8_e4m3fn).float()
    bits = bytes_RD.view(torch.int8).to(torch.int16)  # the sign in bits 7 to 15
    return bits.mul_(128).bitwise_and_(~(1 << 14)).view(torch.float16).float().mul_(256.0)


def _e2m1_bytes(scaled_RD: Tensor) -> Tensor:
    """Pairs of numbers from -6 to 6, rounded to even, as two codes in the low byte of an int32. [R, D / 2]

    Adding and taking away 1.5 * 2^22 times a number's power of two rounds it to one binary place, as E2M1 has; under 1
    the places are those of 1. FP16 holds the result times 2^-14 in the very bits that E2M1 has, further up.
    """
    power_RD = (scaled_RD.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0)
    magic_RD = power_RD.mul_(1.5 * 2**22)
    half_RD = (scaled_RD + magic_RD).sub_(magic_RD).mul_(2.0**-14).half()
    pairs = half_RD.view(torch.int32)
    return (pairs >> 9 & 0x07) | (pairs >> 12 & 0x08) | (pairs >> 21 & 0x70) | (pairs >> 24 & 0x80)


@cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """The two values of each byte, two FP32 in one int64: one look-up for both. [256]"""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    values = torch.cat((values, -values))
    low, high = values.repeat(16), values.repeat_interleave(16)
    return torch.stack((low, high), 1).view(torch.int64).flatten()
