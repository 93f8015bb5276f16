"""Sleeps that stand for an accelerator's compute, so that two cores can host eight ranks.

The main thread sleeps as long as an accelerator would compute; what is around it (packing, sending) is real.
Gradients of inputs and of weights take as long as the forward pass each. Weight gradients are left to whoever runs the
pieces (precision/weight_gradients.py), or follow at once.

Shapes: T tokens, D hidden, R rows.
"""

import ctypes
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dstrain.bench.workload import SHARES
from dstrain.precision.weight_gradients import WeightGradients, used
from dstrain.schedule.action import Phase

# The kernel wakes a sleeper late by up to its timer slack and by what else has to run: the last bit is waited out.
SPIN_S = 150e-6
PR_SET_TIMERSLACK = 29


class Clock:
    """Sleeps of exact length, added up."""

    def __init__(self) -> None:
        self.slept_s = 0.0
        if sys.platform == "linux":
            # 50 us by default; of the calling thread alone.
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)

    def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            return
        began = time.perf_counter()
        if seconds > SPIN_S:
            time.sleep(seconds - SPIN_S)
        while (now := time.perf_counter()) < began + seconds:
            pass
        self.slept_s += now - began


class Emulated:
    """Compute of a model: identities that take their time. `forward_ms` is that of a block, stretch included."""

    def __init__(self, clock: Clock, forward_ms: float, blocks: int):
        self.clock, self.forward_ms, self.blocks = clock, forward_ms, blocks
        # What gradients are asked for; a weight of each phase and block.
        self.weights = {(phase, n): nn.Parameter(torch.zeros(1)) for phase in Phase for n in range(blocks)}

    def attend(self, x_TD: Tensor, stretch: int) -> Tensor:
        """The last stretch, head and loss, takes no time."""
        return x_TD if stretch == self.blocks else self._run(x_TD, Phase.ATTEND, stretch)

    def shared(self, x_TD: Tensor, block: int) -> Tensor:
        return self._run(x_TD, Phase.SHARED, block)

    def experts(self, rows_RD: Tensor, counts: Sequence[int], block: int, weights_R: Tensor | None = None) -> Tensor:
        """Without the weights: to multiply by them is compute, and all of that is the sleep. They get no gradient."""
        return self._run(rows_RD, Phase.EXPERTS, block)

    def _run(self, x: Tensor, phase: Phase, block: int) -> Tensor:
        weight = self.weights[phase, block]
        seconds = SHARES[phase] * self.forward_ms / 1e3
        y: Tensor = _Run.apply(x, weight, seconds, self.clock, used(weight))
        return y


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, seconds: float, clock: Clock, gradients: WeightGradients | None
    ) -> Tensor:
        ctx.weight, ctx.seconds, ctx.clock, ctx.gradients = weight, seconds, clock, gradients
        clock.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        def weight_grad() -> Tensor:
            ctx.clock.sleep(ctx.seconds)
            return torch.zeros_like(ctx.weight)

        ctx.clock.sleep(ctx.seconds)
        taken = weight_grad() if ctx.gradients is None else ctx.gradients.take(ctx.weight, weight_grad)
        return grad, taken, None, None, None
