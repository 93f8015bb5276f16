"""A dispatcher for ranks that have no peers: every expert gets equally many tokens, and nothing but bytes is counted.

It keeps the contract of dispatch/contract.py in shapes and dtypes, on torch's meta device, and books what a transport
would send for a router that likes all experts equally (plan/traffic.py): the same account as that of a real run.

Shapes: T tokens, K experts per token, D hidden, R rows, E experts held.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from dstrain.comm.trace import Trace
from dstrain.dispatch.choose import Task
from dstrain.dispatch.contract import Arrived, Route
from dstrain.dispatch.transfer import Landed, Started
from dstrain.dispatch.transfer import Way as BothWays
from dstrain.mesh.topology import Link
from dstrain.plan.traffic import Way, expected, link_bytes
from dstrain.precision.tensor import QuantizedTensor

# As timelines and metrics name them.
KINDS = {
    Way.DISPATCH: "dispatch",
    Way.COMBINE: "combine",
    Way.COMBINE_GRADIENT: "combine",
    Way.DISPATCH_GRADIENT: "dispatch",
}


def sent_bytes(kind: str, task: Task) -> dict[tuple[Way, Link], int]:
    """What a rank sends in each way of an MoE block and micro-batch with transport `kind`, balanced routing."""
    node_of_rank = [node for node, size in enumerate(task.node_sizes) for _ in range(size)]
    found = link_bytes(expected(kind, task.node_sizes, task.router, task.tokens), node_of_rank, task.rows)
    return {place: round(num_bytes) for place, num_bytes in found.items()}


class BalancedDispatcher:
    """For `held` experts of this rank. `tile`: values to a scale of what arrives and stays quantised; None: no such."""

    def __init__(self, held: int, sends: Mapping[tuple[Way, Link], int], trace: Trace, tile: int | None = None):
        self.held, self.sends, self.trace, self.tile = held, sends, trace, tile

    def dispatch(self, x_TD: Tensor, route: Route) -> Started[Arrived]:
        tokens, experts_per_token = route.experts_TK.shape
        # As many rows set out from every rank as arrive there.
        rows = tokens * experts_per_token
        counts_E = torch.full((self.held,), rows // self.held, device=x_TD.device)
        way = BothWays(
            "dispatch",
            lambda x, weights: self._fly(Way.DISPATCH, self._arriving(x, rows), weights.new_empty(rows)),
            lambda grad, _: self._fly(
                Way.DISPATCH_GRADIENT, grad.new_empty(tokens, grad.shape[1]), torch.empty_like(route.weights_TK)
            ),
            outputs=2,
        )
        return Started(way, partial(_arrived, counts_E, tokens), x_TD, route.weights_TK)

    def combine(self, rows_RD: Tensor, ticket: int) -> Started[Tensor]:
        """`ticket`: the number of tokens that are to come home."""
        rows = len(rows_RD)
        way = BothWays(
            "combine",
            lambda rows_RD: self._fly(Way.COMBINE, rows_RD.new_empty(ticket, rows_RD.shape[1])),
            lambda grad_TD: self._fly(Way.COMBINE_GRADIENT, self._arriving(grad_TD, rows)),
        )
        return Started(way, lambda y_TD: y_TD, rows_RD)

    def _arriving(self, x_TD: Tensor, rows: int) -> Tensor:
        """What comes to the experts for such tokens, [rows, D]."""
        hidden = x_TD.shape[1]
        if self.tile is None:
            return x_TD.new_empty(rows, hidden)
        values = x_TD.new_empty(rows, hidden, dtype=torch.float8_e4m3fn)
        scale = x_TD.new_empty(rows, -(-hidden // self.tile), dtype=torch.float32)
        return QuantizedTensor(values, scale, x_TD.dtype, self.tile)

    def _fly(self, way: Way, *result: Tensor) -> Landed:
        transfer = self.trace.begin(KINDS[way], "ep")
        for link in (Link.NODE, Link.NETWORK):
            self.trace.sent(transfer, link, self.sends[way, link])
        self.trace.end(transfer)
        return Landed(result)


def _arrived(counts_E: Tensor, tokens: int, rows_RD: Tensor, weights_R: Tensor) -> Arrived:
    return Arrived(rows_RD, weights_R, counts_E, tokens)
