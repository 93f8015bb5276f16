"""E5M6 against arithmetic in FP64, and its bits against their description."""

import torch

from dstrain.precision.e5m6 import pack, unpack
from tests.precision.cases import matrix, same


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Numbers of [1, 65024] or far below to FP16 by dropping digits, then to six fraction bits, to even."""
    power = torch.exp2(x.abs().log2().floor().clamp_min(-14.0))
    dropped = torch.trunc(x / (power * 2**-10)) * (power * 2**-10)
    return torch.round(dropped / (power * 2**-6)) * (power * 2**-6)


def test_every_number_is_rounded_as_described():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(50, 300, generator=generator) * torch.exp(4 * torch.randn(50, 300, generator=generator))).double()
    packed = pack(x.float())
    scale = packed.scale.double().repeat_interleave(128, 1)[:, :300]
    assert torch.equal(packed.scale.log2(), packed.scale.log2().round())
    expected = rounded((x.float() / scale.float()).double()) * scale
    assert torch.equal(unpack(packed, torch.float32).double(), expected)


def test_every_code_survives():
    codes = torch.arange(4096)
    codes = codes[codes & 0x7C0 != 0x7C0]
    numbers = (codes << 4).to(torch.int16).view(torch.float16).float()
    # With the largest number in every tile the scale is 1.
    rows = torch.cat((numbers, torch.full((-len(numbers) % 127,), 1.0))).view(-1, 127)
    rows = torch.cat((rows, torch.full((len(rows), 1), 65024.0)), 1)
    packed = pack(rows)
    assert (packed.scale == 1).all()
    assert torch.equal(unpack(packed, torch.float32), rows)


def test_twelve_bits_a_number():
    packed = pack(torch.ones(3, 300))
    assert (packed.values.dtype, packed.values.shape, packed.scale.shape) == (torch.int32, (3, 114), (3, 3))
    # 1.0 over its scale, 2^-15, is 2^15: exponent 30, fraction 0, so 0x780 in every 12 bits.
    stream = sum((int(word) & 0xFFFFFFFF) << 32 * n for n, word in enumerate(packed.values[0].tolist()))
    assert [stream >> 12 * n & 0xFFF for n in range(300)] == [0x780] * 300


def test_what_is_not_finite_and_what_is_small():
    y = unpack(pack(matrix(7, 300)), torch.float32)
    assert y[1, 128:256].isnan().all()
    assert y[2, 256:].isnan().all()
    assert not y[3].any()
    assert same(y[4].bfloat16(), torch.full((300,), 2e38).bfloat16())
