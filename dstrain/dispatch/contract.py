"""The contract between an MoE layer and whatever carries its tokens.

    handle = dispatcher.dispatch(x_TD, route)       start: every token sets out to its experts
    arrived = handle.wait()                         the rows of this rank's experts, sorted by expert, and weights
    handle = dispatcher.combine(rows_RD, arrived.ticket)
    y_TD = handle.wait()                            y[t] = sum over k of the row of (t, k)

The experts multiply by the weights, before their last product: so combine is a plain sum, its gradient reaches an
expert as it left the token, and nothing of what the experts made is kept for the gradient of the weights. That one
starts at the experts and goes home with the gradient of dispatch.

A handle is a transfer that has started; what is computed between start and wait hides it, and the same holds for its
backward pass: the backward of `wait` starts the gradient's transfer, the backward of the start waits for it. Between
the two, the graph is an empty tensor, `handle.token`: whoever runs the phases one by one cuts the graph there, by
giving the handle a detached token before it calls `wait`. Nothing else connects the two sides: a ticket holds no tensor
that requires a gradient. Every transport is drop-in for every other. The layer never sees a process group.

Shapes: T tokens of this rank, K experts per token, D hidden size, R rows that arrived here, E experts held here.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

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
    # The weight of each row, FP32, differentiable: an expert's output is to be multiplied by it.
    weights_R: Tensor
    # int64, on the device of the rows: nothing on the host depends on it.
    counts_E: Tensor
    # What `combine` needs to find the way back; opaque to the layer, and without a graph.
    ticket: Any


class Handle(Protocol[Result]):
    """A started transfer."""

    # An empty tensor through which the graph runs from start to wait.
    token: Tensor

    def wait(self) -> Result:
        """The result, usable on the current stream. Called once."""
        ...


class Dispatcher(Protocol):
    """A transport for one expert-parallel group."""

    def dispatch(self, x_TD: Tensor, route: Route) -> Handle[Arrived]: ...

    def combine(self, rows_RD: Tensor, ticket: Any) -> Handle[Tensor]: ...
