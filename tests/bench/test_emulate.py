"""Sleeps as compute: what is asked of them, and in which pass."""

import time

import pytest
import torch

from dstrain.bench.emulate import Clock, Emulated
from dstrain.precision.weight_gradients import WeightGradients


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_sleep_is_as_long_as_asked_at_least(clock: Clock):
    began = time.perf_counter()
    for seconds in (0.0, 5e-5, 3e-3):
        clock.sleep(seconds)
    assert clock.slept_s >= 3.05e-3
    assert time.perf_counter() - began >= clock.slept_s


def slept_ms(clock: Clock, work) -> float:
    before = clock.slept_s
    work()
    return (clock.slept_s - before) * 1e3


def test_gradients_of_inputs_and_weights_take_as_long_as_the_forward_pass(clock: Clock):
    compute = Emulated(clock, forward_ms=20.0, blocks=1)
    x = torch.randn(3, 4, requires_grad=True)
    results = []
    # An experts' phase is 0.45 of a block.
    assert slept_ms(clock, lambda: results.append(compute.experts(x, [3], 0))) >= 9.0
    assert torch.equal(results[0], x)
    assert slept_ms(clock, lambda: results[0].backward(torch.ones(3, 4))) >= 18.0
    assert torch.equal(x.grad, torch.ones(3, 4))


def test_weight_gradients_wait_for_their_turn(clock: Clock):
    compute, gradients, later = Emulated(clock, forward_ms=20.0, blocks=1), WeightGradients(defers=True), []
    x = torch.randn(3, 4, requires_grad=True)
    with gradients.active(forward=True):
        y = compute.experts(x, [3], 0)
    with gradients.active(later=later):
        y.sum().backward()
    assert len(later) == 1
    assert all(weight.grad is None for weight in compute.weights.values())
    assert slept_ms(clock, later[0]) >= 9.0
    assert sum(weight.grad is not None for weight in compute.weights.values()) == 1


def test_the_last_stretch_takes_no_time(clock: Clock):
    compute = Emulated(clock, forward_ms=1e6, blocks=2)
    assert slept_ms(clock, lambda: compute.attend(torch.ones(1), 2)) == 0
