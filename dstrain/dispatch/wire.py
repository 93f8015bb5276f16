"""Formats of a row on the wire: rows to bytes and back.

    float32, bfloat16   the values
    fp8                 E4M3, one power-of-two scale per 128 values, as DeepSeek-V3 dispatches (arXiv:2412.19437, 3.3)
    mxfp8               E4M3, one power-of-two scale per 32 (OCP Microscaling), as Blackwell's products take it
    fp4                 E2M1, two values a byte, one power-of-two scale per 32 (OCP Microscaling, MXFP4); an experiment
    logfmt8, logfmt10   evenly spaced logarithms per 128 values (arXiv:2505.09343, 3.2); an experiment

A quantised row is its values, then its scales (E8M0: one exponent byte, 2^(byte - 127), 255 is NaN), then zeros up to a
multiple of 8 bytes, so that rows can be gathered as int64. A scale is the smallest power of two, at least 2^-126, that
brings the largest magnitude of its tile to 448 (E4M3) or 6 (E2M1) or below: nothing saturates, zeros stay zeros, and
quantising a second time changes nothing. There is no floor of 1e-4 under that magnitude, as DeepSeek's kernel has:
gradients travel, too, and may be far smaller. A tile with NaN, infinity, or a magnitude above 2.97e38 (E4M3) or
2.55e38 (E2M1) arrives as NaN throughout; the other tiles of the row are as ever. `LogFmt` says what is its own.

Shapes: R rows, D hidden, B bytes of a row, S tiles of a row, V values of a tile.
"""

from abc import ABC, abstractmethod
from functools import cache
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.errors import ConfigError
from dstrain.plan.traffic import ROW_ALIGNMENT, row_bytes
from dstrain.precision.formats import E4M3, TILE, scale_exponents
from dstrain.precision.rounding import e4m3_values

NAMES = ("float32", "bfloat16", "fp8", "mxfp8", "fp4", "logfmt8", "logfmt10")
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
    made: tuple[WireFormat, ...] = (Fp8(), MxFp8(), Fp4(), LogFmt(8), LogFmt(10))
    return {wire.name: wire for wire in made}.get(name) or Plain(getattr(torch, name))


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
    tile = TILE
    largest = E4M3.largest

    def encode(self, rows_RD: Tensor, out: Tensor | None = None) -> Tensor:
        hidden = rows_RD.shape[1]
        scaled_RSV, scale8_RS = _scaled(rows_RD, self.tile, self.largest)
        used = hidden + scale8_RS.shape[1]
        out = _bytes(self, rows_RD, out, used)
        out[:, :hidden].view(torch.float8_e4m3fn).copy_(scaled_RSV.flatten(1)[:, :hidden])
        out[:, hidden:used] = scale8_RS
        return out

    def unpack(self, bytes_RB: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
        """Values, float8_e4m3fn [R, hidden], and scales, float8_e8m0fnu [R, S]: views."""
        tiles = -(-hidden // self.tile)
        values_RD, scale_RS = bytes_RB[:, :hidden], bytes_RB[:, hidden : hidden + tiles]
        return values_RD.view(torch.float8_e4m3fn), scale_RS.view(torch.float8_e8m0fnu)

    def _values(self, bytes_RB: Tensor, hidden: int) -> Tensor:
        values_RD, scale_RS = self.unpack(bytes_RB, hidden)
        return _unscaled(e4m3_values(values_RD), scale_RS, self.tile)


class MxFp8(Fp8):
    """E4M3 with a scale per 32 values: 1 + 1/32 bytes a value."""

    name = "mxfp8"
    tile = 32


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
        scale_RS = bytes_RB[:, values : values + tiles].view(torch.float8_e8m0fnu)
        return _unscaled(values_RD, scale_RS, self.tile)[:, :hidden]


class LogFmt(_Quantised):
    """A sign, and a number k of `bits` - 1 bits: 0 for zero, otherwise largest * 2^(-span * (L - k) / (L - 1)) with the
    last number L, so that 1 is the smallest magnitude of the tile and L the largest.

    Largest magnitude and span travel with each tile, as BF16 rounded up. The span is at most 32, a range of 2^32:
    smaller magnitudes become the smallest one or zero. Which of two numbers is nearer is decided between the values and
    not between their logarithms, which would bring about values that are too large on average. 8 bits are k's low 7 and
    the sign; of 10 bits, the low 8 bits of k come first, then a byte for each four values, of k's last bits and signs.
    A tile with NaN, infinity or a magnitude above BF16's largest arrives as NaN throughout. 1 + 4/128 bytes a value, or
    1.25 + 4/128.
    """

    tile = TILE
    widest_span = 32.0

    def __init__(self, bits: int):
        self.name, self.bits, self.last = f"logfmt{bits}", bits, 2 ** (bits - 1) - 1

    def encode(self, rows_RD: Tensor, out: Tensor | None = None) -> Tensor:
        hidden = rows_RD.shape[1]
        tiles_RSV = _tiles(rows_RD, self.tile)
        ratio_RSV, scale_RS2 = self._ratios(tiles_RSV.abs())
        number_RSV = self._numbers(ratio_RSV, self._steps(scale_RS2))
        code_RD = (number_RSV | tiles_RSV.signbit().int() << self.bits - 1).flatten(1)[:, :hidden]
        parts = [(code_RD & 255).byte()]
        if self.bits > 8:
            high_RQ4 = F.pad(code_RD >> 8, (0, -hidden % 4)).unflatten(1, (-1, 4))
            parts.append((high_RQ4 << _quarters(high_RQ4)).sum(2).byte())
        parts.append(scale_RS2.flatten(1).bfloat16().view(torch.uint8))
        used = sum(part.shape[1] for part in parts)
        out = _bytes(self, rows_RD, out, used)
        out[:, :used] = torch.cat(parts, 1)
        return out

    def _ratios(self, size_RSV: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitudes over the largest one of their tile, and [..., 2] that with the span: NaN where a tile has none."""
        largest_RS1 = size_RSV.amax(2, keepdim=True)
        # A NaN may have all bits set, to which nothing can be added.
        largest_RS1 = _rounded_up(largest_RS1.masked_fill_(largest_RS1.isnan(), torch.inf))
        largest_RS1 = largest_RS1.masked_fill_(largest_RS1.isinf(), torch.nan)
        # Of a tile of zeros, whose numbers are all zero.
        ratio_RSV = torch.where(largest_RS1 == 0, 0.0, size_RSV / largest_RS1)
        smallest_RS1 = torch.where(ratio_RSV > 0, ratio_RSV, 1.0).amin(2, keepdim=True)
        span_RS1 = _rounded_up(smallest_RS1.log2().neg().clamp_(0.0, self.widest_span))
        return ratio_RSV, torch.cat((largest_RS1, span_RS1), 2)

    def _steps(self, scale_RS2: Tensor) -> Tensor:
        """Between neighbouring logarithms; a little where all magnitudes of a tile are one."""
        return (scale_RS2[..., 1:] / (self.last - 1)).clamp_min(1e-12)

    def _numbers(self, ratio_RSV: Tensor, step_RS1: Tensor) -> Tensor:
        """The k of each magnitude, int32; 0 where there is none.

        A magnitude between two neighbours takes the upper one above their mean, whose logarithm is `middle` steps above
        the lower one's.
        """
        middle_RS1 = torch.log1p(torch.expm1(step_RS1 * log(2)) / 2) / (step_RS1 * log(2))
        place_RSV = ratio_RSV.log2() / step_RS1 + self.last
        number_RSV = (place_RSV + (1 - middle_RS1)).floor().clamp(1, self.last)
        # Half of the smallest magnitude is as near to it as to zero.
        is_zero = (ratio_RSV == 0) | (place_RSV < 1 - 1 / step_RS1) | ratio_RSV.isnan()
        return number_RSV.masked_fill_(is_zero, 0.0).int()

    def _values(self, bytes_RB: Tensor, hidden: int) -> Tensor:
        tiles, code_RD, at = -(-hidden // self.tile), bytes_RB[:, :hidden].int(), hidden
        if self.bits > 8:
            at += -(-hidden // 4)
            high_RQ1 = bytes_RB[:, hidden:at].int().unsqueeze(2)
            code_RD |= (high_RQ1 >> _quarters(high_RQ1) & 3).flatten(1)[:, :hidden] << 8
        scale_RS2 = bytes_RB[:, at : at + 4 * tiles].contiguous().view(torch.bfloat16).float().view(-1, tiles, 2)
        code_RSV = _tiles(code_RD, self.tile)
        number_RSV = code_RSV & self.last
        sign_RSV = 1 - 2 * (code_RSV >> self.bits - 1)
        size_RSV = torch.exp2((number_RSV - self.last) * self._steps(scale_RS2)) * scale_RS2[..., :1]
        return (size_RSV * sign_RSV * (number_RSV > 0)).flatten(1)[:, :hidden]


def _bytes(wire: WireFormat, rows_RD: Tensor, out: Tensor | None, used: int) -> Tensor:
    """Where encoded rows go: `out` or new memory; the bytes behind the `used` ones are zeroed."""
    rows, hidden = rows_RD.shape
    if out is None:
        out = rows_RD.new_empty((rows, wire.row_bytes(hidden)), dtype=torch.uint8)
    if used < out.shape[1]:
        out[:, used:] = 0
    return out


def _tiles(rows_RD: Tensor, tile: int) -> Tensor:
    """[R, S, V] in FP32, integers as they are; zeros fill the last tile."""
    missing = -rows_RD.shape[1] % tile
    padded = F.pad(rows_RD, (0, missing)) if missing else rows_RD
    return (padded.float() if padded.is_floating_point() else padded).unflatten(1, (-1, tile))


def _quarters(like: Tensor) -> Tensor:
    """Where the four pairs of bits of a byte begin."""
    return torch.arange(0, 8, 2, dtype=like.dtype, device=like.device)


def _rounded_up(x: Tensor) -> Tensor:
    """FP32 numbers, none negative, up to the next BF16."""
    return (x.view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)


def _scaled(rows_RD: Tensor, tile: int, largest: float) -> tuple[Tensor, Tensor]:
    """The tiles over their scales, FP32 [R, S, V] (zeros fill the last one), and the scales as int32 E8M0 [R, S]."""
    tiles_RSV = _tiles(rows_RD, tile)
    largest_RS = torch.maximum(tiles_RSV.amax(2), tiles_RSV.amin(2).neg())
    scale8_RS = scale_exponents(largest_RS, largest)
    # 2^(127 - byte), put together from its bits.
    inverse_RS = (254 - scale8_RS << 23).view(torch.float32)
    out = None if tiles_RSV.data_ptr() == rows_RD.data_ptr() else tiles_RSV
    return torch.mul(tiles_RSV, inverse_RS[:, :, None], out=out), scale8_RS


def _unscaled(values_RD: Tensor, scale_RS: Tensor, tile: int) -> Tensor:
    """FP32 values, in place, times their scales (float8_e8m0fnu)."""
    scale_RS = scale_RS.float()
    hidden = values_RD.shape[1]
    whole = hidden // tile
    values_RD[:, : whole * tile].unflatten(1, (whole, tile)).mul_(scale_RS[:, :whole, None])
    if whole * tile < hidden:
        values_RD[:, whole * tile :].mul_(scale_RS[:, whole:])
    return values_RD


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
