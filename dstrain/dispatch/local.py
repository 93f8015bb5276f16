"""The dispatcher of a rank that holds every expert: sorting, and no transfer. The reference for all others."""

from dataclasses import dataclass

from torch import Tensor

from dstrain.dispatch.contract import Arrived, Ready, Route
from dstrain.dispatch.permute import count_by_expert, sort_by_expert, spread, weighted_sum


@dataclass(frozen=True)
class _Ticket:
    weights_TK: Tensor
    row_of_pair_TK: Tensor


class LocalDispatcher:
    """All `num_experts` experts are here."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, route: Route) -> Ready[Arrived]:
        token_of_row, row_of_pair = sort_by_expert(route.experts_TK)
        counts_E = count_by_expert(route.experts_TK, self.num_experts)
        rows_RD = spread(x_TD, token_of_row, row_of_pair)
        return Ready(Arrived(rows_RD, counts_E, _Ticket(route.weights_TK, row_of_pair)))

    def combine(self, rows_RD: Tensor, ticket: _Ticket) -> Ready[Tensor]:
        return Ready(weighted_sum(rows_RD, ticket.weights_TK, ticket.row_of_pair_TK))
