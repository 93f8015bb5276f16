"""Rotary positions against complex numbers, and YaRN against its paper."""

import math

import pytest
import torch

from dstrain.config.schema import RopeConfig
from dstrain.model.rope import inverse_frequencies, rotate, rotation, softmax_scale

YARN = RopeConfig(theta=10000.0, yarn_factor=40.0, original_seq_len=4096)


def test_a_pair_is_a_complex_number_that_turns() -> None:
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    cos, sin = rotation(torch.arange(7), 8, RopeConfig(theta=100.0))
    turned = rotate(x, cos[:, None], sin[:, None])
    for t in range(7):
        for i in range(4):
            number = torch.complex(x[:, t, :, 2 * i], x[:, t, :, 2 * i + 1])
            expected = number * complex(math.cos(t * 100 ** (-i / 4)), math.sin(t * 100 ** (-i / 4)))
            found = torch.complex(turned[:, t, :, 2 * i], turned[:, t, :, 2 * i + 1])
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16)
    cos, sin = rotation(torch.tensor([3, 10, 103, 110]), 16, RopeConfig())
    turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
    near, far = turned_q[1] @ turned_k[0], turned_q[3] @ turned_k[2]
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert (near - turned_q[2] @ turned_k[0]).abs() > 1e-2


def test_bf16_is_turned_in_fp32() -> None:
    x = torch.randn(5, 8).bfloat16()
    cos, sin = rotation(torch.arange(5) + 1000, 8, RopeConfig())
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


def test_yarn_stretches_what_turns_slowly_and_leaves_what_turns_fast() -> None:
    plain, stretched = inverse_frequencies(64, RopeConfig()), inverse_frequencies(64, YARN)
    turns = plain * 4096 / (2 * math.pi)
    # DeepSeek-V3: the ramp goes from pair 10 to pair 23.
    assert torch.equal(stretched[:11], plain[:11])
    assert (turns[:10] > 32).all()
    torch.testing.assert_close(stretched[23:], plain[23:] / 40)
    assert (turns[23:] < 1).all()
    assert ((stretched < plain) & (stretched > plain / 40))[11:23].all()
    # Linear in the index of the pair: 16 has come 6 of 13 steps.
    torch.testing.assert_close(stretched[16], plain[16] * 7 / 13 + plain[16] / 40 * 6 / 13)


def test_temperatures() -> None:
    assert softmax_scale(192, RopeConfig()) == 192**-0.5
    # DeepSeek-V3: mscale 1, factor 40.
    assert softmax_scale(192, YARN) == pytest.approx(192**-0.5 * 1.3688879454**2)
    first = torch.zeros(1)
    assert rotation(first, 8, YARN)[0].tolist() == [[1.0] * 4]
    uneven = RopeConfig(yarn_factor=math.e, mscale=2.0, mscale_all_dim=1.0)
    torch.testing.assert_close(rotation(first, 8, uneven)[0], torch.full((1, 4), 1.2 / 1.1))
