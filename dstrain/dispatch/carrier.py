"""What every transport offers a layer: the contract of dispatch/contract.py, around the four ways of its rows.

    dispatch  forward    tokens and weights to their experts    combine  forward    what the experts made, home
              backward   gradients of both, home                         backward   gradients of the tokens' sums, out

Each way is started by one method and ends in a flight; dispatch/transfer.py makes them one graph.

Shapes: T tokens, K experts per token, D hidden, R rows by expert, N pairs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from dstrain.comm.lane import Lane
from dstrain.comm.trace import Label
from dstrain.dispatch.contract import Arrived, Route
from dstrain.dispatch.permute import Expansion
from dstrain.dispatch.transfer import Flying, Started, Way


@dataclass(kw_only=True)
class Ticket:
    """What a micro-batch leaves in a layer's transport between dispatch and the end of its backward pass."""

    # Of the dispatch; the other ways are other directions of the same work.
    label: Label
    # Known once the tokens have arrived.
    expansion: Expansion | None = None

    @property
    def arrived(self) -> Expansion:
        if self.expansion is None:
            raise RuntimeError("combine was called before the dispatch had arrived")
        return self.expansion


AnyTicket = TypeVar("AnyTicket", bound=Ticket)


class Carrier(ABC, Generic[AnyTicket]):
    """Without a lane, nothing travels and every way is done at once."""

    def __init__(self, lane: Lane | None):
        self.lane = lane

    def dispatch(self, x_TD: Tensor, route: Route) -> Started[Arrived]:
        ticket = self._ticket(x_TD, route, self.lane.trace.label if self.lane else Label())
        way = Way(
            "dispatch",
            lambda x, weights: self._dispatch(x, route.experts_TK, weights, ticket),
            lambda grad, weight_grad: self._dispatch_back(grad, weight_grad, ticket),
            outputs=2,
        )

        def arrive(rows_RD: Tensor, weights_R: Tensor) -> Arrived:
            return Arrived(rows_RD, weights_R, ticket.arrived.counts_E, ticket)

        return Started(way, arrive, x_TD, route.weights_TK)

    def combine(self, rows_RD: Tensor, ticket: AnyTicket) -> Started[Tensor]:
        way = Way("combine", lambda rows: self._combine(rows, ticket), lambda grad: self._combine_back(grad, ticket))
        return Started(way, lambda y: y, rows_RD)

    def close(self) -> None:
        """Ends the threads."""
        if self.lane is not None:
            self.lane.close()

    @abstractmethod
    def _ticket(self, x_TD: Tensor, route: Route, label: Label) -> AnyTicket: ...

    @abstractmethod
    def _dispatch(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, ticket: AnyTicket) -> Flying:
        """Lands as the rows, [R, D], and the weights, FP32 [R], and counts of what `ticket.expansion` then is."""

    @abstractmethod
    def _dispatch_back(self, grad_RD: Tensor, weight_grad_R: Tensor, ticket: AnyTicket) -> Flying:
        """Lands as the gradients of the tokens, [T, D], and of their weights, FP32 [T, K]."""

    @abstractmethod
    def _combine(self, rows_RD: Tensor, ticket: AnyTicket) -> Flying:
        """Lands as the sums of the tokens, [T, D]."""

    @abstractmethod
    def _combine_back(self, grad_TD: Tensor, ticket: AnyTicket) -> Flying:
        """Lands as the gradient of the rows, [R, D]: for each row that of its token."""
