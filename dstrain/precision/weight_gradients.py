"""Gradients of weights apart from those of inputs: what no other work waits for can be computed whenever there is time.

A backward pass that is cut into pieces has two questions for every weight. When is its gradient computed: at once, or
later, while compute would wait for the network? And is it complete: a weight that several pieces use (the embedding
and the head with multi-token prediction) has one gradient per micro-batch, not one per piece. A `WeightGradients`
answers both for one micro-batch; without an active one, autograd computes every gradient in its place.

    with gradients.active(forward=True):      the functions of this package report every use of a weight
        forward pass
    with gradients.active(later=jobs):        backward pass for inputs; what it leaves is appended to `jobs`
        torch.autograd.backward(...)
    for job in jobs: job()                    the gradients, handed to autograd so that hooks run as ever

Gradients of a weight are added in the order in which the backward pass met its uses, whenever they are computed: the
order in which autograd adds them when the graph is whole, so the sums are the same bit by bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Compute = Callable[[], Tensor]
Job = Callable[[], None]


@dataclass
class _Sum:
    """The gradient of a weight while it is added up; `waiting` holds what was computed before its turn."""

    uses: int = 0
    met: int = 0
    added: int = 0
    total: Tensor | None = None
    waiting: dict[int, Tensor] = field(default_factory=dict)

    def add(self, turn: int, gradient: Tensor) -> bool:
        """Whether the sum is complete."""
        self.waiting[turn] = gradient
        while self.added in self.waiting:
            part = self.waiting.pop(self.added)
            self.total = part if self.total is None else self.total.add_(part)
            self.added += 1
        return self.added == self.uses

    def take(self) -> Tensor:
        """The sum, which nobody else holds from then on: autograd copies what is held elsewhere."""
        total, self.total = self.total, None
        if total is None:
            raise RuntimeError("a weight gradient was taken twice")
        return total


class WeightGradients:
    """Of one micro-batch. Without `defers`, gradients are computed in their places, and only those of weights that
    several pieces share pass through here."""

    def __init__(self, *, defers: bool) -> None:
        self.defers = defers
        self._sums: dict[Tensor, _Sum] = {}
        # Where the backward pass leaves what it doesn't compute.
        self._later: list[Job] = []
        self._counts = False

    @contextmanager
    def active(self, *, forward: bool = False, later: list[Job] | None = None) -> Iterator[None]:
        """Work inside is a forward pass, or else a backward pass that leaves its jobs in `later`; recomputation inside
        the latter counts no uses."""
        global _active
        before, _active = _active, self
        self._counts, self._later = forward, [] if later is None else later
        try:
            yield
        finally:
            _active = before
            self._counts = False

    def used(self, weight: Tensor) -> None:
        if self._counts:
            self._sums.setdefault(weight, _Sum()).uses += 1

    def take(self, weight: Tensor, compute: Compute) -> Tensor | None:
        """In a backward pass: what to return as the gradient of this use of `weight`."""
        found = self._sums[weight]
        turn, found.met = found.met, found.met + 1
        if found.met == found.uses:
            del self._sums[weight]
        if self.defers:
            self._later.append(partial(_deliver, weight, found, turn, compute))
            return None
        return found.take() if found.add(turn, compute()) else None

    def check_complete(self) -> None:
        """After the backward pass: RuntimeError if it has not come past every use."""
        if self._sums:
            shapes = ", ".join(str(tuple(weight.shape)) for weight in self._sums)
            raise RuntimeError(f"weights of shape {shapes} were used more often than the backward pass came past them")


_active: WeightGradients | None = None


def used(weight: Tensor, *, shared: bool = False) -> WeightGradients | None:
    """Announces a use of `weight` in a forward pass; what will take its gradient, None for autograd.

    `shared`: there are other uses in the micro-batch, maybe in other pieces.
    """
    if _active is None or not weight.requires_grad or not torch.is_grad_enabled():
        return None
    if not (shared or _active.defers):
        return None
    _active.used(weight)
    return _active


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, autograd computes every gradient in its place: for a graph within a backward pass."""
    global _active
    before, _active = _active, None
    try:
        yield
    finally:
        _active = before


def _deliver(weight: Tensor, found: _Sum, turn: int, compute: Compute) -> None:
    with torch.no_grad():
        complete = found.add(turn, compute())
    if complete:
        _Hand.apply(weight, found).backward(weight.new_empty(0))


class _Hand(torch.autograd.Function):
    """Hands a gradient to autograd as a result of its own: what is given to it from outside, it copies."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, found: _Sum) -> Tensor:
        ctx.found = found
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.found.take(), None
