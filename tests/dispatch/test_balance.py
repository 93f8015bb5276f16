"""The bias evens out the load without touching the loss."""

import torch

from dstrain.config.schema import RouterConfig
from dstrain.dispatch.balance import update_bias
from dstrain.model.router import choose_experts


def test_the_bias_moves_against_the_load_by_a_fixed_amount():
    bias = torch.tensor([0.5, 0.0, -0.25, 1.0])
    update_bias(bias, torch.tensor([9, 0, 5, 6]), rate=0.125)
    torch.testing.assert_close(bias, torch.tensor([0.375, 0.125, -0.25, 0.875]), rtol=0, atol=0)


def test_an_even_load_leaves_the_bias_alone():
    bias = torch.tensor([0.5, -0.5, 0.0])
    update_bias(bias, torch.tensor([7, 7, 7]), rate=0.1)
    assert bias.tolist() == [0.5, -0.5, 0.0]


def test_counts_beyond_the_precision_of_fp32_still_tell():
    bias = torch.zeros(2)
    update_bias(bias, torch.tensor([2**30, 2**30 + 1]), rate=1.0)
    assert bias.tolist() == [1.0, -1.0]


def test_a_skewed_load_evens_out():
    """Affinities that favour expert 0, then 1, ...; only the bias changes from step to step."""
    generator = torch.Generator().manual_seed(0)
    tilt_E, bias_E = torch.linspace(0.4, -0.4, 8), torch.zeros(8)
    worst = []
    for _ in range(60):
        scores_NE = (torch.randn(512, 8, generator=generator) * 0.5 + tilt_E).sigmoid()
        experts_NK = choose_experts(scores_NE + bias_E, RouterConfig(), experts_per_token=2)
        load_E = experts_NK.flatten().bincount(minlength=8)
        worst.append((load_E.max() / load_E.double().mean()).item())
        update_bias(bias_E, load_E, rate=0.005)
    first, last = sum(worst[:5]) / 5, sum(worst[-5:]) / 5
    assert first > 1.8
    assert last < 1.25
    assert bias_E.sort().indices.tolist() == list(range(8))
