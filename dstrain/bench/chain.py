"""The model of the bench: what a schedule may ask of a model (schedule/phases.py), around any dispatcher.

Its compute is given: sleeps that stand for an accelerator. Routes are fixed; what travels are real rows.

Shapes: T tokens, D hidden, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dstrain.bench.peers.contract import Compute
from dstrain.comm.lane import Flight, Lane
from dstrain.comm.trace import Trace
from dstrain.dispatch.contract import Arrived, Dispatcher, Handle, Route
from dstrain.dispatch.transfer import Landed, Started, Way
from dstrain.model.layer import Attended
from dstrain.model.router import RouterReport
from dstrain.schedule.phases import PhasedWalk
from dstrain.schedule.run import run
from dstrain.schedule.table import Table

# Of a router that isn't there.
NO_REPORT = RouterReport(torch.zeros(0, dtype=torch.int64), *[torch.zeros(())] * 3)


class BlockingLane(Lane):
    """A transfer is waited for as soon as it has started: what a blocking dispatcher costs."""

    def submit(self, *args: Any, **kwargs: Any) -> Flight:
        flight = super().submit(*args, **kwargs)
        flight.wait()
        return flight


class Replay:
    """No transfer: what a step takes with compute alone. The experts get as many rows as they do on average."""

    def __init__(self, rows_per_token: int, experts: int):
        self.rows_per_token, self.experts = rows_per_token, experts

    def dispatch(self, x_TD: Tensor, route: Route) -> Started[Arrived]:
        tokens, no_grad_TK = len(x_TD), torch.zeros_like(route.weights_TK)
        counts_E = torch.full((self.experts,), tokens * self.rows_per_token // self.experts)
        counts_E[0] += tokens * self.rows_per_token - counts_E.sum()
        way = Way(
            "dispatch",
            lambda x, weights: Landed((self._spread(x), weights.t()[: self.rows_per_token].flatten())),
            lambda grad, _: Landed((grad[:tokens], no_grad_TK)),
            outputs=2,
        )
        return Started(way, lambda rows, weights: Arrived(rows, weights, counts_E, tokens), x_TD, route.weights_TK)

    def combine(self, rows_RD: Tensor, ticket: int) -> Started[Tensor]:
        """`ticket` is the number of tokens."""
        way = Way("combine", lambda rows: Landed((rows[:ticket],)), lambda grad: Landed((self._spread(grad),)))
        return Started(way, lambda y: y, rows_RD)

    def _spread(self, x_TD: Tensor) -> Tensor:
        return x_TD.repeat(self.rows_per_token, 1) if self.rows_per_token > 1 else x_TD


@dataclass(frozen=True)
class Layer:
    """An MoE block."""

    dispatcher: Dispatcher
    compute: Compute
    block: int

    def dispatch(self, attended: Attended) -> Handle[Arrived]:
        return self.dispatcher.dispatch(attended.normed_BTD, attended.route)

    def shared(self, attended: Attended) -> Tensor:
        return attended.x_BTD + self.compute.shared(attended.normed_BTD, self.block)

    def experts(self, arrived: Arrived) -> Tensor:
        return self.compute.experts(arrived.rows_RD, arrived.counts_E.tolist(), self.block, arrived.weights_R)

    def combine(self, rows_RD: Tensor, arrived: Arrived) -> Handle[Tensor]:
        return self.dispatcher.combine(rows_RD, arrived.ticket)


@dataclass(frozen=True)
class Stop:
    """Before a block."""

    layer: Layer
    attended: Attended
    roots: Sequence[Tensor] = ()


@dataclass(frozen=True)
class End:
    """After the last stretch. The loss is half the square of the model's output, as for the peers; `output` is what the
    next stage starts from."""

    roots: Sequence[Tensor]
    result: Tensor | None = None
    output: Tensor | None = None


@dataclass(frozen=True)
class Chain:
    """Blocks with stretches between them, all or those of a stage in place; `routes[block][micro_batch]`."""

    layers: Sequence[Layer]
    routes: Sequence[Sequence[Route]]

    def walk(self, x_TD: Tensor, micro_batch: int, stage: range | None = None) -> PhasedWalk[Tensor | None]:
        """`stage`: its blocks. The stretch before a block is in the block's stage."""
        stage = stage or range(len(self.layers))
        for block in stage:
            layer = self.layers[block]
            x_TD = layer.compute.attend(x_TD, block)
            route = self.routes[block][micro_batch]
            # A leaf: the weights' gradient travels home as it does from a router.
            route = Route(route.experts_TK, route.weights_TK.clone().requires_grad_())
            x_TD = yield Stop(layer, Attended(x_TD, x_TD, route, NO_REPORT))
        if stage.stop < len(self.layers):
            return End([], output=x_TD)
        y_TD = self.layers[-1].compute.attend(x_TD, len(self.layers))
        return End([y_TD.float().square().sum() / 2], y_TD.detach())

    def step(self, table: Table, inputs: Sequence[Tensor], trace: Trace) -> list[Tensor | None]:
        """Forward and backward pass of all micro-batches in the order of the table; their outputs."""
        return run(table, [partial(self.walk, x_TD, number) for number, x_TD in enumerate(inputs)], trace)
