"""The flat all-to-all: one row per (token, expert) to the rank of the expert and back.

The plain reference of all transports across ranks. Ranks first exchange how many rows go to each expert (E integers,
one host synchronisation), then the rows. A rank receives rows by source rank and, within it, by expert; it sorts them
by expert, and undoes that on the way back.

Shapes: T tokens, K experts per token, D hidden, R arrived rows, P ranks of the group, E local experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dstrain.comm.collectives import Peers, all_to_all, all_to_all_equal
from dstrain.dispatch.contract import Arrived, Route, Then
from dstrain.dispatch.permute import count_by_expert, invert, reorder, sort_by_expert, spread, weighted_sum


@dataclass(frozen=True)
class _Ticket:
    weights_TK: Tensor
    row_of_pair_TK: Tensor
    # Back from the order of experts to the order of source ranks.
    arrival_order_R: Tensor
    sent_rows: list[int]
    received_rows: list[int]


class AllToAllDispatcher:
    """`num_experts` experts in equal contiguous shares over the ranks of `peers`."""

    def __init__(self, num_experts: int, peers: Peers):
        self.num_experts, self.peers = num_experts, peers

    def dispatch(self, x_TD: Tensor, route: Route) -> Then[Arrived]:
        token_of_row, row_of_pair = sort_by_expert(route.experts_TK)
        sent_PE = count_by_expert(route.experts_TK, self.num_experts).view(self.peers.size, -1)
        received_PE = all_to_all_equal(sent_PE, self.peers, "counts")
        rows_RD = spread(x_TD, token_of_row, row_of_pair)
        # The one time that the host waits for the device.
        sent_rows, received_rows = torch.stack((sent_PE.sum(1), received_PE.sum(1))).tolist()
        transfer = all_to_all(rows_RD, sent_rows, received_rows, self.peers, "dispatch")

        def arrive(arrived_RD: Tensor) -> Arrived:
            by_expert_R = _order_by_expert(received_PE, len(arrived_RD))
            ticket = _Ticket(route.weights_TK, row_of_pair, invert(by_expert_R), sent_rows, received_rows)
            return Arrived(reorder(arrived_RD, by_expert_R), received_PE.sum(0), ticket)

        return Then(transfer, arrive)

    def combine(self, rows_RD: Tensor, ticket: _Ticket) -> Then[Tensor]:
        by_source_RD = reorder(rows_RD, ticket.arrival_order_R)
        transfer = all_to_all(by_source_RD, ticket.received_rows, ticket.sent_rows, self.peers, "combine")
        return Then(transfer, lambda home_RD: weighted_sum(home_RD, ticket.weights_TK, ticket.row_of_pair_TK))


def _order_by_expert(received_PE: Tensor, rows: int) -> Tensor:
    """The permutation of `rows` rows that takes rows sorted by (source, expert) to rows sorted by (expert, source)."""
    experts_PE = torch.arange(received_PE.shape[1], device=received_PE.device).expand_as(received_PE)
    return experts_PE.flatten().repeat_interleave(received_PE.flatten(), output_size=rows).argsort(stable=True)
