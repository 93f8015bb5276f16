"""AdamW on flat shards is torch's AdamW, with moments that may be narrow."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dstrain.config.schema import OptimConfig
from dstrain.engine import optimizer
from dstrain.engine.optimizer import AdamShard, square_sum

OPTIM = OptimConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)


def weights() -> Tensor:
    return torch.randn(1000, generator=torch.Generator().manual_seed(0))


def grads(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1000, generator=generator) * 10.0 ** (step % 3) for step in range(steps)]


def shard_after(steps: int, *, decays: bool = True, moments: torch.dtype = torch.float32) -> AdamShard:
    shard = AdamShard.of(weights(), moments, decays)
    for step, grad in enumerate(grads(steps)):
        shard.update(grad, 0.01 * (step + 1), step, OPTIM)
    return shard


def torch_after(steps: int, weight_decay: float) -> tuple[Tensor, Tensor, Tensor]:
    parameter = torch.nn.Parameter(weights())
    betas = (OPTIM.beta1, OPTIM.beta2)
    adamw = torch.optim.AdamW([parameter], betas=betas, eps=OPTIM.eps, weight_decay=weight_decay, foreach=False)
    for step, grad in enumerate(grads(steps)):
        adamw.param_groups[0]["lr"] = 0.01 * (step + 1)
        parameter.grad = grad
        adamw.step()
    state = adamw.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("decays", [True, False])
def test_equals_torch(decays: bool):
    shard = shard_after(10, decays=decays)
    expected = torch_after(10, OPTIM.weight_decay if decays else 0.0)
    for found, reference in zip((shard.master, shard.exp_avg, shard.exp_avg_sq), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-7)


def test_decay_is_not_in_the_moments():
    """Decoupled: with a zero gradient weights shrink by lr * decay and nothing else happens."""
    shard = AdamShard.of(weights(), torch.float32, decays=True)
    shard.update(torch.zeros(1000), 0.1, 0, OPTIM)
    torch.testing.assert_close(shard.master, weights() * (1 - 0.1 * 0.3))
    assert not shard.exp_avg.any()
    assert not shard.exp_avg_sq.any()


def test_the_first_updates_count():
    """Bias correction: the first step has the size of the rate whatever the betas; a later one has not."""
    optim, sizes = replace(OPTIM, weight_decay=0.0), []
    for updates_before in (0, 50):
        shard = AdamShard.of(torch.zeros(4), torch.float32, decays=False)
        shard.update(torch.full((4,), 2.0), 0.01, updates_before, optim)
        sizes.append(shard.master.abs().max().item())
    assert sizes[0] == pytest.approx(0.01, rel=1e-4)
    assert sizes[1] < 0.007


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, moments: torch.dtype):
    expected = shard_after(3, moments=moments)
    monkeypatch.setattr(optimizer, "BLOCK_ELEMENTS", 48)
    found = shard_after(3, moments=moments)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_narrow_moments_are_rounded_once_a_step():
    """The update itself uses the moments before rounding."""
    narrow, wide = (shard_after(1, moments=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert narrow.master.dtype == torch.float32
    assert torch.equal(narrow.master, wide.master)
    assert torch.equal(narrow.exp_avg, wide.exp_avg.bfloat16())
    assert torch.equal(narrow.exp_avg_sq, wide.exp_avg_sq.bfloat16())
    again = AdamShard(wide.master.clone(), narrow.exp_avg.float(), narrow.exp_avg_sq.float(), decays=True)
    second = grads(2)[1]
    again.update(second, 0.02, 1, OPTIM)
    narrow.update(second, 0.02, 1, OPTIM)
    assert torch.equal(narrow.master, again.master)
    assert torch.equal(narrow.exp_avg, again.exp_avg.bfloat16())


def descend(moments: torch.dtype) -> list[float]:
    """Losses of a least-squares problem."""
    generator = torch.Generator().manual_seed(2)
    a, goal = torch.randn(64, 16, generator=generator), torch.randn(64, generator=generator)
    shard, losses = AdamShard.of(torch.zeros(16), moments, decays=False), []
    for step in range(60):
        error = a @ shard.master - goal
        losses.append(error.square().mean().item())
        shard.update(2 * a.T @ error / 64, 0.02, step, OptimConfig())
    return losses


def test_narrow_moments_learn_as_well():
    wide, narrow = descend(torch.float32), descend(torch.bfloat16)
    assert wide[-1] < 0.9 * wide[0]
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.01)


def test_the_sum_of_squares_of_a_long_vector_keeps_its_digits() -> None:
    vector = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    exact = vector.double().square().sum()
    torch.testing.assert_close(square_sum(vector), exact, rtol=3e-7, atol=0)
    torch.testing.assert_close(square_sum(vector[:0]), torch.zeros((), dtype=torch.float64))
