"""The contract between an MoE layer and whatever carries its tokens.

    handle = dispatcher.dispatch(x_TD, route)       start: every token sets out to its experts
    arrived = handle.wait()                         the rows of this rank's experts, sorted by expert
    handle = dispatcher.combine(rows_RD, arrived.ticket)
    y_TD = handle.wait()                            y[t] = sum over k of route.weights[t, k] * row of (t, k)

A handle is a transfer that has started; what is computed between start and wait hides it, and the same holds for its
backward pass. Every transport is drop-in for every other. The layer never sees a process group.

Shapes: T tokens of this rank, K experts per token, D hidden size, R rows that arrived here, E experts held here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True)
class Route:
    """Where each token goes. `experts_TK` int64, global expert numbers, distinct in a row; `weights_TK` FP32."""

    experts_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class Arrived:
    """Rows for this rank's experts: the first counts_E[0] belong to its first expert, and so on."""

    rows_RD: Tensor
    # int64, on the device of the rows: nothing on the host depends on it.
    counts_E: Tensor
    # What `combine` needs to find the way back; opaque to the layer.
    ticket: Any


class Handle(Protocol, Generic[Result]):
    """A started transfer."""

    def wait(self) -> Result:
        """The result, usable on the current stream. Called once."""
        ...


class Dispatcher(Protocol):
    """A transport for one expert-parallel group."""

    def dispatch(self, x_TD: Tensor, route: Route) -> Handle[Arrived]: ...

    def combine(self, rows_RD: Tensor, ticket: Any) -> Handle[Tensor]: ...


@dataclass(frozen=True)
class Ready(Generic[Result]):
    """A handle for what needed no transfer."""

    result: Result

    def wait(self) -> Result:
        return self.result


@dataclass(frozen=True)
class Then(Generic[Result]):
    """A handle whose result is a function of another's, computed when it is waited for."""

    handle: Handle[Any]
    finish: Callable[[Any], Result]

    def wait(self) -> Result:
        return self.finish(self.handle.wait())
