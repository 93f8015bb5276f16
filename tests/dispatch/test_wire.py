"""Bytes and back, against quantising value by value in plain Python."""

import itertools
import math
import struct

import pytest
import torch
from torch import Tensor

from dstrain.dispatch.wire import NAMES, WIDE_ELEMENTS, wire_format
from dstrain.errors import ConfigError

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [mantissa * 2.0**-9 for mantissa in range(8)]
E4M3 += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
TILES = {"fp8": (128, E4M3), "mxfp8": (32, E4M3), "fp4": (32, E2M1)}
QUANTISED = pytest.mark.parametrize("name", TILES)
LOGARITHMIC = pytest.mark.parametrize("bits_a_value", [8, 10])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
HIDDEN = (8, 31, 32, 128, 200, 384, 7168)


def nearest(magnitude: float, values: list[float]) -> float:
    """The value next to a magnitude; of two equally near ones that of even number."""
    return min(values, key=lambda value: (abs(value - magnitude), values.index(value) % 2))


def naive_tile(tile: list[float], values: list[float]) -> list[float]:
    largest = max(map(abs, tile))
    if any(map(math.isnan, tile)) or largest > values[-1] * 2.0 ** (128 - math.frexp(values[-1])[1]):
        return [math.nan] * len(tile)
    exponent = -126
    while largest > values[-1] * 2.0**exponent:
        exponent += 1
    return [math.copysign(nearest(abs(x) * 2.0**-exponent, values), x) * 2.0**exponent for x in tile]


def naive(rows_RD: Tensor, name: str) -> Tensor:
    tile, values = TILES[name]
    rows = [
        [value for first in range(0, len(row), tile) for value in naive_tile(row[first : first + tile], values)]
        for row in rows_RD.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float32).view_as(rows_RD)


def some_rows(rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes over forty powers of ten."""
    generator = torch.Generator().manual_seed(hidden)
    size = torch.randn(rows, hidden, generator=generator)
    return (size * 10.0 ** torch.randint(-20, 20, (rows, 1), generator=generator)).to(dtype)


def bits(x: Tensor) -> Tensor:
    """For comparisons that tell -0 from 0."""
    return x.contiguous().view(torch.uint8)


def there_and_back(rows_RD: Tensor, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    wire = wire_format(name, dtype)
    return wire.decode(wire.encode(rows_RD), rows_RD.shape[1], dtype)


@QUANTISED
@DTYPES
@pytest.mark.parametrize("hidden", [8, 31, 128, 200])
def test_quantised_like_value_by_value(name, dtype, hidden):
    rows_RD = some_rows(12, hidden, dtype)
    assert torch.equal(there_and_back(rows_RD, name), naive(rows_RD, name))
    assert torch.equal(there_and_back(rows_RD, name, torch.bfloat16), naive(rows_RD, name).bfloat16())


@QUANTISED
def test_every_value_and_every_tie(name):
    tile, values = TILES[name]
    pairs = list(itertools.pairwise(values))
    ties = [(low + high) / 2 for low, high in pairs]
    beside = [math.nextafter(tie, side) for tie in ties for side in (0, 1e9)]
    every = [sign * value for value in values + ties + beside for sign in (1, -1)]
    every += [0.0] * (-len(every) % (tile - 1))
    # The largest value in each tile keeps its scale at one.
    rows_RD = torch.tensor(every).view(-1, tile - 1)
    rows_RD = torch.cat((rows_RD, torch.full((len(rows_RD), 1), values[-1])), 1)
    assert torch.equal(there_and_back(rows_RD, name), naive(rows_RD, name))
    exact_RD = naive(rows_RD, name)
    assert torch.equal(there_and_back(exact_RD, name), exact_RD)


@QUANTISED
@DTYPES
def test_zeros_outliers_and_tiny_numbers(name, dtype):
    rows_RD = torch.zeros(5, 256, dtype=dtype)
    rows_RD[1] = torch.linspace(-1, 1, 256)
    rows_RD[1, 7] = 1e30
    rows_RD[2] = torch.linspace(-1e-39, 1e-39, 256)
    rows_RD[3, 3] = 2.0**-133
    rows_RD[4] = torch.linspace(-1e-12, 1e-12, 256)
    arrived = there_and_back(rows_RD, name)
    assert torch.equal(arrived, naive(rows_RD, name))
    assert torch.equal(bits(arrived[0]), bits(torch.zeros(256)))
    # The outlier wipes out its own tile only; a tile of tiny gradients keeps them.
    assert arrived[1, :7].abs().max() == 0
    assert arrived[1, 128:].max() == 1
    assert torch.allclose(arrived[4], rows_RD[4].float(), rtol=0.3, atol=1e-13)


@QUANTISED
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3.3e38])
@DTYPES
def test_what_is_no_number_poisons_its_tile(name, poison, dtype):
    tile = TILES[name][0]
    rows_RD = some_rows(2, 3 * tile, dtype)
    clean_RD = there_and_back(rows_RD, name)
    rows_RD[0, tile + 5] = poison
    arrived_RD = there_and_back(rows_RD, name, torch.bfloat16)
    assert arrived_RD[0, tile : 2 * tile].isnan().all()
    arrived_RD[0, tile : 2 * tile] = clean_RD[0, tile : 2 * tile]
    assert torch.equal(arrived_RD, clean_RD.bfloat16())


@pytest.mark.parametrize("name", [*TILES, "logfmt8", "logfmt10"])
@pytest.mark.parametrize("hidden", [1, 31, 130, 133, 389])
def test_a_row_is_its_tiles(name, hidden):
    """A last tile that is not whole is as exact as if it were alone."""
    rows_RD, tile = some_rows(4, hidden, torch.bfloat16), TILES.get(name, (128,))[0]
    parts = [there_and_back(part, name) for part in rows_RD.split(tile, dim=1)]
    assert torch.equal(there_and_back(rows_RD, name), torch.cat(parts, 1))


@QUANTISED
@DTYPES
def test_quantising_again_changes_nothing(name, dtype):
    once = there_and_back(some_rows(50, 200, dtype), name)
    assert torch.equal(there_and_back(once, name), once)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@DTYPES
def test_plain_formats_keep_what_they_can(name, dtype):
    rows_RD = some_rows(5, 200, dtype)
    rows_RD[1, 3], rows_RD[2, 4] = math.nan, -math.inf
    expected = rows_RD.to(getattr(torch, name))
    assert torch.equal(bits(there_and_back(rows_RD, name, dtype)), bits(expected.to(dtype)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_row_bytes(name, hidden):
    wire = wire_format(name, torch.bfloat16)
    encoded_RB = wire.encode(some_rows(3, hidden, torch.bfloat16))
    assert encoded_RB.dtype == torch.uint8
    assert encoded_RB.shape == (3, wire.row_bytes(hidden))
    assert wire.row_bytes(hidden) % 8 == 0
    bits_a_value = {
        "mxfp8": 8 + 8 / 32,
        "logfmt8": 8 + 32 / 128,
        "logfmt10": 10 + 32 / 128,
        "float32": 32,
        "bfloat16": 16,
        "fp8": 8 + 8 / 128,
        "fp4": 4 + 8 / 32,
    }
    if hidden % 1024 == 0:
        assert wire.row_bytes(hidden) == hidden * bits_a_value[name] / 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_rows_inside_wider_messages(name, hidden):
    """A message may have other columns beside the row, and encoding leaves them alone."""
    wire, rows_RD = wire_format(name, torch.bfloat16), some_rows(3, hidden, torch.bfloat16)
    size = wire.row_bytes(hidden)
    message = torch.full((3, 16 + size + 8), 7, dtype=torch.uint8)
    inside = message[:, 16 : 16 + size]
    assert wire.encode(rows_RD, inside).data_ptr() == inside.data_ptr()
    assert torch.equal(inside, wire.encode(rows_RD))
    assert (message[:, :16] == 7).all()
    assert (message[:, 16 + size :] == 7).all()
    assert torch.equal(wire.decode(inside, hidden, torch.float32), wire.decode(inside.clone(), hidden, torch.float32))


@pytest.mark.parametrize("name", [*TILES, "logfmt8", "logfmt10"])
def test_blocks_decode_what_the_whole_does(name, monkeypatch):
    wire, rows_RD = wire_format(name, torch.bfloat16), some_rows(7, 200, torch.bfloat16)
    whole_RD = wire.decode(wire.encode(rows_RD), 200, torch.bfloat16)
    monkeypatch.setitem(WIDE_ELEMENTS, "cpu", 400)
    assert torch.equal(wire.decode(wire.encode(rows_RD), 200, torch.bfloat16), whole_RD)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_rows_are_left_alone(name):
    wire = wire_format(name, torch.float32)
    assert wire.encode(torch.zeros(0, 200)).shape == (0, wire.row_bytes(200))
    assert there_and_back(torch.zeros(0, 200), name).shape == (0, 200)
    rows_RD = some_rows(3, 200, torch.float32)
    before = rows_RD.clone()
    encoded_RB = wire.encode(rows_RD).clone()
    again_RB = encoded_RB.clone()
    wire.decode(encoded_RB, 200, torch.float32)
    assert torch.equal(rows_RD, before)
    assert torch.equal(encoded_RB, again_RB)


def test_bytes_of_a_row():
    """What another implementation would need to know."""
    row = torch.zeros(1, 136)
    row[0, 0], row[0, 1], row[0, 2], row[0, 128] = 448.0, -(2.0**-9), 1.0, 3.0
    encoded = bytes(wire_format("fp8", torch.float32).encode(row)[0].tolist())
    assert encoded == struct.pack("3B125x", 0x7E, 0x81, 0x38) + struct.pack("B7x", 0x7C) + bytes([127, 120]) + bytes(6)
    encoded = bytes(wire_format("mxfp8", torch.float32).encode(row)[0].tolist())
    assert encoded[:136] == struct.pack("3B125xB7x", 0x7E, 0x81, 0x38, 0x7C)
    assert encoded[136:] == bytes([127, 1, 1, 1, 120]) + bytes(3)
    four = bytes(wire_format("fp4", torch.float32).encode(torch.tensor([[6.0, -0.5, 1.0]]))[0].tolist())
    assert four == struct.pack("2B14x", 0x97, 0x02) + bytes([127]) + bytes(7)


def test_names():
    assert wire_format("auto", torch.bfloat16).name == "bfloat16"
    assert wire_format("auto", torch.float32).name == "float32"
    assert [wire_format(name, torch.float32).name for name in NAMES] == list(NAMES)
    with pytest.raises(ConfigError, match="dispatch.wire=fp6"):
        wire_format("fp6", torch.float32)


def test_rows_may_begin_anywhere_in_their_storage():
    rows_RD = torch.arange(17, dtype=torch.bfloat16)[1:].view(2, 8)
    encoded = wire_format("bfloat16", torch.bfloat16).encode(rows_RD)
    assert torch.equal(encoded.view(torch.int64).view(torch.bfloat16), rows_RD)


@pytest.mark.parametrize("name", NAMES)
def test_any_nan_arrives_as_nan(name):
    """Quiet ones and others, of either sign, with all bits set and with a few."""
    patterns = torch.tensor([-1, 0x7FFFFFFF, 0x7FC00000, -0x400000, 0x7F800001], dtype=torch.int32)
    rows_RD = torch.ones(5, 32)
    rows_RD[:, 3] = patterns.view(torch.float32)
    assert there_and_back(rows_RD, name)[:, 3].isnan().all()


# -- Logarithms -------------------------------------------------------------------------------------------------------


def levels(tile: Tensor, bits_a_value: int) -> Tensor:
    """The magnitudes that a tile may get, FP64 in rising order, by the definition."""
    last = 2 ** (bits_a_value - 1) - 1
    largest = bfloat16_above(tile.abs().max())
    smallest = tile[tile != 0].abs().min().double()
    span = bfloat16_above((largest / smallest).log2().clamp(0, 32).float())
    exponents = -span * torch.arange(last - 1, -1, -1, dtype=torch.float64) / (last - 1)
    return torch.cat((torch.zeros(1).double(), largest * 2.0**exponents))


def bfloat16_above(x: Tensor) -> Tensor:
    """The smallest BF16 that is not below a positive number, in FP64."""
    bits = x.view(torch.int32) if x == x.bfloat16() else (x.view(torch.int32) // 2**16 + 1) * 2**16
    return bits.view(torch.float32).double()


@LOGARITHMIC
@DTYPES
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 5.0, 30.0])
def test_logarithms_take_the_nearest_value(bits_a_value, dtype, spread):
    """But for FP32's own error, which may decide between two values that are equally near."""
    generator = torch.Generator().manual_seed(bits_a_value)
    rows_RD = (2.0 ** (spread * torch.randn(6, 128, generator=generator))).to(dtype)
    rows_RD *= torch.randn(6, 128, generator=generator).sign()
    rows_RD[1, 17] = 0
    found_RD = there_and_back(rows_RD, f"logfmt{bits_a_value}").double()
    assert torch.equal(found_RD.sign(), rows_RD.double().sign() * (found_RD != 0))
    for tile, found in zip(rows_RD.float(), found_RD, strict=True):
        values = levels(tile, bits_a_value)
        distance = (tile.double().abs()[:, None] - values).abs().amin(1)
        assert ((found - tile).abs() <= distance * (1 + 1e-5) + 1e-5 * tile.abs()).all()
        nearest_value = (found.abs()[:, None] - values).abs().amin(1)
        assert (nearest_value <= 1e-5 * found.abs()).all()


@LOGARITHMIC
@DTYPES
def test_logarithms_of_zeros_outliers_and_tiny_numbers(bits_a_value, dtype):
    rows_RD = torch.zeros(5, 300, dtype=dtype)
    rows_RD[1] = torch.linspace(-1, 1, 300)
    rows_RD[1, 7] = 2.0**90
    rows_RD[2] = torch.linspace(-1e-39, 1e-39, 300)
    rows_RD[3, 3] = 2.0**-133
    rows_RD[4] = -3.0
    arrived = there_and_back(rows_RD, f"logfmt{bits_a_value}")
    assert torch.equal(bits(arrived[0]), bits(torch.zeros(300)))
    # A range of 2^32: the outlier wipes out its own tile only.
    assert arrived[1, 7] == 2.0**90
    assert arrived[1, :128].count_nonzero() == 1
    assert (arrived[1, 128:] - rows_RD[1, 128:].float()).abs().max() <= 0.03
    assert (arrived[2] - rows_RD[2].float()).abs().max() <= 0.05e-39
    # One magnitude alone is exact, whatever its size.
    assert arrived[3, 3] == 2.0**-133
    assert torch.equal(arrived[4], rows_RD[4].float())


@LOGARITHMIC
@DTYPES
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, torch.finfo(torch.float32).max])
def test_no_logarithm_poisons_its_tile(bits_a_value, dtype, poison):
    name, rows_RD = f"logfmt{bits_a_value}", some_rows(2, 384, dtype)
    clean_RD = there_and_back(rows_RD, name)
    rows_RD[0, 133] = poison
    arrived_RD = there_and_back(rows_RD, name)
    assert arrived_RD[0, 128:256].isnan().all()
    arrived_RD[0, 128:256] = clean_RD[0, 128:256]
    assert torch.equal(arrived_RD, clean_RD)


@LOGARITHMIC
def test_logarithms_bring_no_bias(bits_a_value):
    """Even numbers between neighbours that are far apart: rounded between logarithms, they would grow by 0.4%."""
    rows_RD = 2.0**-1 + torch.rand(2000, 128, generator=torch.Generator().manual_seed(0)) / 2
    rows_RD[:, 0], rows_RD[:, 1] = 1.0, 2.0**-40
    found_RD = there_and_back(rows_RD, f"logfmt{bits_a_value}")[:, 2:]
    # Between whole neighbours alone, as there are 2^(32 / (last - 1)) between them.
    step = 32 / (2 ** (bits_a_value - 1) - 2)
    inside = rows_RD[:, 2:] >= 2.0 ** -(step * (1 // step))
    bias = (found_RD - rows_RD[:, 2:])[inside].mean() / rows_RD[:, 2:][inside].mean()
    assert abs(bias) <= 4e-4


def relative_error(name: str, rows_RD: Tensor) -> float:
    return ((there_and_back(rows_RD, name) - rows_RD).norm() / rows_RD.norm()).item()


def test_errors_of_all_formats_on_normal_numbers():
    """Of the norm. Eight bits of logarithms are nearer than E4M3, ten are about as near as BF16."""
    rows_RD = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    error = {name: relative_error(name, rows_RD) for name in NAMES}
    assert error["float32"] == 0
    assert error["bfloat16"] == pytest.approx(0.0017, rel=0.1)
    assert error["fp8"] == pytest.approx(0.0266, rel=0.1)
    assert error["mxfp8"] == pytest.approx(0.0266, rel=0.1)
    assert error["logfmt8"] == pytest.approx(0.0142, rel=0.1)
    assert error["logfmt10"] == pytest.approx(0.0036, rel=0.1)
    assert error["fp4"] == pytest.approx(0.116, rel=0.1)


def test_smaller_tiles_keep_what_an_outlier_wipes_out():
    rows_RD = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))
    rows_RD[:, ::128] = 1e6
    lost = {name: (there_and_back(rows_RD, name) == 0).float().mean().item() for name in ("fp8", "mxfp8")}
    assert lost["mxfp8"] < 0.3 * lost["fp8"]
