"""The autograd of a started transfer.

    start     inputs leave                           backward: waits for the gradients of the inputs
    wait      waits for the output                   backward: the gradient of the output leaves

so that what is computed between start and wait hides the transfer in both directions. Between the two the graph is an
empty token; tensors travel beside it, since there is none with the shape of either end until it has arrived.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Result = TypeVar("Result", covariant=True)


class Flying(Protocol):
    """A started movement of tensors; `wait` is called once."""

    def wait(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Landed:
    """What was done at once."""

    result: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        return self.result


@dataclass
class Way:
    """A transfer in both directions."""

    kind: str
    # The inputs leave; the first tensor of the result is the output.
    depart: Callable[..., Flying]
    # The gradient of the output leaves, with what was kept; the result are the gradients of the inputs.
    depart_back: Callable[..., Flying]
    # Tensors that the way back needs, besides what the ticket holds.
    kept: tuple[Tensor, ...] = ()
    flight: Flying | None = None

    def land(self) -> tuple[Tensor, ...]:
        flight, self.flight = self.flight, None
        if flight is None:
            raise RuntimeError(f"the {self.kind} transfer was waited for twice")
        return flight.wait()


class Started(Generic[Result]):
    """The handle of `way`, whose inputs leave at once; `finish` turns what arrives into what the caller gets."""

    def __init__(self, way: Way, finish: Callable[[Tensor], Result], *inputs: Tensor):
        self.way, self.finish = way, finish
        self.token: Tensor = _Start.apply(way, *inputs)

    def wait(self) -> Result:
        return self.finish(_Wait.apply(self.token, self.way))


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Way, *inputs: Tensor) -> Tensor:
        ctx.way = way
        way.flight = way.depart(*inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token_grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.way.land()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, way: Way) -> Tensor:
        output, *_ = way.land()
        ctx.way = way
        ctx.save_for_backward(*way.kept)
        way.kept = ()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.way.flight = ctx.way.depart_back(grad, *ctx.saved_tensors)
        return grad.new_empty(0), None
