"""What every transport does: rows over its hops, to the experts and back, forward and backward.

    dispatch            tokens in the wire format over the hops, each row once for each of its experts
    combine             sum over a row's experts, home over the hops in reverse, summed wherever rows meet
    gradient of combine   as dispatch, on the same legs
    gradient of dispatch  as combine; takes the gradient of the weights along

The weights go to the experts and are theirs to apply. Sums are FP32 inside a rank; between ranks rows travel home in
the compute dtype. Out they travel in the wire format: quantised once, where they start, and forwarded as bytes. All of
it happens in a lane, off the main thread. What arrives quantised stays so where the experts' products take it as it is
(precision/tensor.py): values and scales are expanded, and no other copy is made.

Shapes: T tokens, K experts per token, D hidden, B bytes of a row, A arrived rows, R rows by expert, N pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dstrain.comm.lane import Lane
from dstrain.comm.trace import Label, Transfer
from dstrain.dispatch.carrier import Carrier, Ticket
from dstrain.dispatch.contract import Route
from dstrain.dispatch.hop import Crossing, FirstOut, Home, Hop, Leg, Out, relay
from dstrain.dispatch.permute import Expansion, Pairs
from dstrain.dispatch.transfer import Flying, Landed, as_quantised
from dstrain.dispatch.wire import Fp8, Plain, WireFormat
from dstrain.precision.quantize import Quantized


@dataclass(kw_only=True)
class HopTicket(Ticket):
    shape_TK: torch.Size
    hidden: int
    dtype: torch.dtype
    legs: list[Leg] = field(default_factory=list)


class Transport(Carrier[HopTicket]):
    """`experts` experts of this rank, behind `hops` and a lane; without hops, all of them, and no lane.

    `wire` None: the dtype of the tokens. `keeps_quantised`: with fp8 or mxfp8 on the wire, rows and the gradients of
    what the experts made arrive as QuantizedTensors.
    """

    # For timelines.
    group = "ep"

    def __init__(
        self,
        experts: int,
        wire: WireFormat | None,
        hops: Sequence[Hop] = (),
        lane: Lane | None = None,
        keeps_quantised: bool = False,
    ):
        super().__init__(lane)
        self.experts, self.wire, self.hops = experts, wire, tuple(hops)
        self.kept = wire if keeps_quantised and isinstance(wire, Fp8) else None

    def _ticket(self, x_TD: Tensor, route: Route, label: Label) -> HopTicket:
        return HopTicket(label=label, shape_TK=route.experts_TK.shape, hidden=x_TD.shape[1], dtype=x_TD.dtype)

    def _dispatch(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, ticket: HopTicket) -> Flying:
        def unload(cargo: tuple[Tensor, Pairs]) -> tuple[Tensor, ...]:
            bytes_AB, pairs = cargo
            ticket.expansion = to = Expansion.of(pairs, self.experts)
            return *self._expanded(bytes_AB, ticket), to.by_expert(pairs.weight_N), to.counts_E

        flight = self._fly(
            "dispatch",
            replace(ticket.label, direction="forward"),
            lambda transfer: [FirstOut(hop, transfer, ticket.legs) for hop in self.hops],
            lambda: (self._encode(x_TD, ticket), Pairs.of_tokens(experts_TK, weights_TK)),
            unload,
            (x_TD, experts_TK, weights_TK),
        )
        return as_quantised(flight, ticket.dtype, self.kept.tile) if self.kept else flight

    def _dispatch_back(self, grad_RD: Tensor, weight_grad_R: Tensor, ticket: HopTicket) -> Flying:
        def load() -> tuple[Tensor, Tensor]:
            return ticket.arrived.sum(grad_RD), ticket.arrived.by_pair(weight_grad_R)

        def unload(cargo: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            x_grad_TD, weight_grad_N = cargo
            return x_grad_TD, weight_grad_N.view(ticket.shape_TK)

        label = replace(ticket.label, direction="backward")
        reads = (grad_RD, weight_grad_R)
        return self._fly("dispatch", label, lambda t: self._homeward(t, ticket, True), load, unload, reads)

    def _combine(self, rows_RD: Tensor, ticket: HopTicket) -> Flying:
        return self._fly(
            "combine",
            replace(ticket.label, direction="forward"),
            lambda transfer: self._homeward(transfer, ticket, False),
            lambda: (ticket.arrived.sum(rows_RD), None),
            lambda cargo: (cargo[0],),
            (rows_RD,),
        )

    def _combine_back(self, grad_TD: Tensor, ticket: HopTicket) -> Flying:
        def outward(transfer: Transfer) -> list[Crossing]:
            return [
                Out(hop, transfer, leg, self._row_bytes(ticket))
                for hop, leg in zip(self.hops, ticket.legs, strict=True)
            ]

        flight = self._fly(
            "combine",
            replace(ticket.label, direction="backward"),
            outward,
            lambda: self._encode(grad_TD, ticket),
            lambda bytes_AB: self._expanded(bytes_AB, ticket),
            (grad_TD,),
        )
        return as_quantised(flight, ticket.dtype, self.kept.tile) if self.kept else flight

    def _homeward(self, transfer: Transfer, ticket: HopTicket, with_numbers: bool) -> list[Crossing]:
        legs = zip(reversed(self.hops), reversed(ticket.legs), strict=True)
        return [Home(hop, transfer, leg, ticket.hidden, ticket.dtype, with_numbers) for hop, leg in legs]

    def _fly(
        self,
        kind: str,
        label: Label,
        crossings: Callable[[Transfer], Sequence[Crossing]],
        load: Callable[[], Any],
        unload: Callable[[Any], tuple[Tensor, ...]],
        reads: Sequence[Tensor],
    ) -> Flying:
        """Starts a way over the hops; at once, where there is none."""
        if self.lane is None:
            return Landed(unload(load()))
        transfer = self.lane.trace.begin(kind, self.group, label)
        way = crossings(transfer)

        def close(_: Any) -> None:
            for crossing in way:
                crossing.close()

        return self.lane.submit(relay(way, load, unload), transfer, reads, close)

    def _format(self, ticket: HopTicket) -> WireFormat:
        return self.wire or Plain(ticket.dtype)

    def _row_bytes(self, ticket: HopTicket) -> int:
        return self._format(ticket).row_bytes(ticket.hidden)

    def _encode(self, rows_TD: Tensor, ticket: HopTicket) -> Tensor:
        return self._format(ticket).encode(rows_TD)

    def _expanded(self, bytes_AB: Tensor, ticket: HopTicket) -> tuple[Tensor, ...]:
        """Arrived rows, each once for each of its experts; if they stay quantised, their values and their scales."""
        to = ticket.arrived
        if self.kept is None:
            return (to.expand(self._format(ticket).decode(bytes_AB, ticket.hidden, ticket.dtype)),)
        values_AD, scale_AS = self.kept.unpack(bytes_AB, ticket.hidden)
        return to.expand_quantised(Quantized(values_AD, scale_AS.float(), self.kept.tile))
