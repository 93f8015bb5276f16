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
TILES = {"fp8": (128, E4M3), "fp4": (32, E2M1)}
QUANTISED = pytest.mark.parametrize("name", TILES)
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
    bits_a_value = {"float32": 32, "bfloat16": 16, "fp8": 8 + 8 / 128, "fp4": 4 + 8 / 32}[name]
    if hidden % 1024 == 0:
        assert wire.row_bytes(hidden) == hidden * bits_a_value / 8


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


@QUANTISED
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
