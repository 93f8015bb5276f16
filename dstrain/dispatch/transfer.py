"""The autograd of a started transfer.

    start     inputs leave                           backward: waits for the gradients of the inputs
    wait      waits for the outputs                  backward: the gradients of the outputs leave

so that what is computed between start and wait hides the transfer in both directions. Between the two the graph is an
empty token; tensors travel beside it, since there is none with the shape of either end until it has arrived.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.precision.formats import TILE
from dstrain.precision.quantize import Quantized
from dstrain.precision.tensor import Origin, QuantizedTensor

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


@dataclass(frozen=True)
class _Quantised:
    flight: Flying
    dtype: torch.dtype
    tile: int

    def wait(self) -> tuple[Tensor, ...]:
        values, scale, rows, rows_scale, row_N, *others = self.flight.wait()
        # Copies of many rows are not worth keeping; of few, neither is how they came about.
        origin = Origin(Quantized(rows, rows_scale, self.tile), row_N) if len(rows) < len(values) else None
        return QuantizedTensor(values, scale, self.dtype, self.tile, origin), *others


def as_quantised(flight: Flying, dtype: torch.dtype, tile: int = TILE) -> Flying:
    """The flight of what `Expansion.expand_quantised` makes, landing as one tensor. It is made by whoever waits: what a
    lane hands over are tensors that a device's streams know."""
    return _Quantised(flight, dtype, tile)


@dataclass
class Way:
    """A transfer in both directions."""

    kind: str
    # The inputs leave; the result begins with the outputs.
    depart: Callable[..., Flying]
    # The gradients of the outputs leave, zeros for one that nobody used; the result are the gradients of the inputs.
    depart_back: Callable[..., Flying]
    outputs: int = 1
    flight: Flying | None = None

    def land(self) -> tuple[Tensor, ...]:
        flight, self.flight = self.flight, None
        if flight is None:
            raise RuntimeError(f"the {self.kind} transfer was waited for twice")
        return flight.wait()


class Started(Generic[Result]):
    """The handle of `way`, whose inputs leave at once; `finish` turns what arrives into what the caller gets."""

    def __init__(self, way: Way, finish: Callable[..., Result], *inputs: Tensor):
        self.way, self.finish = way, finish
        self.token: Tensor = _Start.apply(way, *inputs)

    def wait(self) -> Result:
        return self.finish(*_Wait.apply(self.token, self.way))


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
    def forward(ctx: Any, token: Tensor, way: Way) -> tuple[Tensor, ...]:
        ctx.way = way
        return way.land()[: way.outputs]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.way.flight = ctx.way.depart_back(*grads)
        return grads[0].new_empty(0), None
