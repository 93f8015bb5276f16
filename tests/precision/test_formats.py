"""Formats and scales against arithmetic in FP64."""

from math import inf, nan

import pytest
import torch

from dstrain.precision.formats import E4M3, E5M6, FLOOR, SMALLEST_SCALE, Scaling, scale_exponents


def test_formats_are_those_of_torch_and_of_the_published_kernels():
    e4m3 = torch.finfo(torch.float8_e4m3fn)
    assert (E4M3.largest, E4M3.smallest_normal) == (e4m3.max, e4m3.smallest_normal)
    # FP16 has five exponent bits, too; its largest number with six fraction bits.
    assert E5M6.smallest_normal == torch.finfo(torch.float16).smallest_normal
    assert E5M6.largest == (2 - 2**-6) * 2**15


@pytest.mark.parametrize("number", [E4M3, E5M6], ids=lambda number: number.name)
def test_a_power_of_two_is_the_smallest_that_fits(number):
    generator = torch.Generator().manual_seed(0)
    largest = torch.exp2(torch.rand(4096, generator=generator) * 220 - 110)
    edges = torch.tensor([number.largest * 2.0**n for n in (-40, -1, 0, 1, 40)])
    largest = torch.cat((largest, edges, edges.nextafter(torch.tensor(inf)), edges.nextafter(torch.tensor(0.0))))
    scale = Scaling().scales(largest, number).double()
    assert torch.equal(scale.log2(), scale.log2().round())
    assert (largest <= number.largest * scale).all()
    assert (largest > number.largest * scale / 2).all()


def test_a_plain_scale_is_a_quotient():
    largest = torch.tensor([1.0, 3.0e-3, 7.5e30])
    assert torch.equal(Scaling(power_of_two=False).scales(largest), largest / 448)
    assert Scaling(power_of_two=False).scales(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("power_of_two", [True, False])
def test_what_has_no_scale(power_of_two: bool):
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    bad = torch.cat((torch.tensor([inf, nan, -nan]), all_ones))
    assert Scaling(power_of_two).scales(bad).isnan().all()
    assert Scaling(power_of_two, FLOOR).scales(bad).isnan().all()


@pytest.mark.parametrize("power_of_two", [True, False])
def test_the_smallest(power_of_two: bool):
    tiny = torch.tensor([1e-45, 1e-38])
    assert (Scaling(power_of_two).scales(tiny) == SMALLEST_SCALE).all()
    floored = Scaling(power_of_two, FLOOR).scales(torch.tensor([0.0, 1e-20, FLOOR]))
    assert (floored == floored[-1]).all()
    assert floored[0] == (2.0**-22 if power_of_two else torch.tensor(FLOOR) / 448)


def test_numbers_beyond_the_largest_scale():
    # 448 * 2^126 is above the largest FP32 number, so the exponent alone decides.
    assert scale_exponents(torch.tensor([2.9e38, 3.0e38]), E4M3.largest).tolist() == [246, 255]
