"""A decoder layer as four phases, cut where communication happens.

    attend    norm, attention, residual, norm, router          compute
    dispatch  tokens set out to their experts                  communication
    experts   the routed experts of this rank                  compute
    combine   results come home, summed                        communication

`forward` runs them in order, with the shared expert in the shadow of the dispatch; a schedule may call them one by one
and put other work between. A dense layer is all `attend`.

A model is a walk through its layers: a generator that stops at every MoE block and goes on when it is sent the block's
output. Who drives the walk decides when, and on what graph, each block is computed.

Shapes: B sequences, T tokens, D hidden, N = B * T, R rows.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor, nn

from dstrain.config.schema import ModelConfig
from dstrain.dispatch.contract import Arrived, Dispatcher, Handle, Route
from dstrain.model.attention import Attention
from dstrain.model.moe import FeedForward, MoE
from dstrain.model.router import RouterReport

Result = TypeVar("Result")


@dataclass(frozen=True)
class Attended:
    """What `attend` leaves behind: the residual stream and, in an MoE layer, normalised tokens with their routes."""

    x_BTD: Tensor
    normed_BTD: Tensor
    route: Route
    report: RouterReport


@dataclass(frozen=True)
class Block:
    """Where a walk stops: dispatch, experts and combine of `layer` are to be run by whoever drives the walk."""

    layer: "MoELayer"
    attended: Attended
    # Loss terms of the stretch that ends here: scalars, each to be differentiated with weight 1.
    roots: list[Tensor]


@dataclass(frozen=True)
class End(Generic[Result]):
    """Where a walk ends; `roots` are those of the last stretch."""

    roots: list[Tensor]
    result: Result
    # What the next stage of a pipeline starts from, [B, T, D]; None where the model ends.
    output: Tensor | None = None


Walk = Generator[Block, Tensor, End[Result]]


def walk_whole(walk: Walk[Result]) -> End[Result]:
    """The plain way: every block where the walk stops, all on one graph. The end, with the roots of all stretches."""
    roots: list[Tensor] = []
    try:
        block = next(walk)
        while True:
            roots += block.roots
            block = walk.send(block.layer.exchange(block.attended))
    except StopIteration as stop:
        return End([*roots, *stop.value.roots], stop.value.result, stop.value.output)


class DecoderLayer(nn.Module):
    """What dense and MoE layers share: attention with its residual."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.attn = Attention(model)
        self.ffn_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)

    def attention(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        return x_BTD + self.attn(self.attn_norm(x_BTD), cos_TR, sin_TR)


class DenseLayer(DecoderLayer):
    def __init__(self, model: ModelConfig):
        super().__init__(model)
        self.mlp = FeedForward(model.hidden_size, model.intermediate_size)

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, None]:
        return self.feed_forward(self.attention(x_BTD, cos_TR, sin_TR)), None

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """Everything after attention, residual included."""
        return x_BTD + self.mlp(self.ffn_norm(x_BTD))


class MoELayer(DecoderLayer):
    def __init__(self, model: ModelConfig, held: range, dispatcher: Dispatcher):
        super().__init__(model)
        self.moe = MoE(model, held)
        self.dispatcher = dispatcher

    def attend(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Attended:
        return self.route(self.attention(x_BTD, cos_TR, sin_TR))

    def route(self, x_BTD: Tensor) -> Attended:
        normed_BTD = self.ffn_norm(x_BTD)
        return Attended(x_BTD, normed_BTD, *self.moe.router(normed_BTD))

    def dispatch(self, attended: Attended) -> Handle[Arrived]:
        route = attended.route
        if self.moe.slots_E is not None:
            route = replace(route, experts_TK=self.moe.slots_E[route.experts_TK])
        return self.dispatcher.dispatch(attended.normed_BTD.flatten(0, 1), route)

    def shared(self, attended: Attended) -> Tensor:
        """The residual stream plus the shared expert: what can be computed while a transfer is under way."""
        return attended.x_BTD + self.moe.shared(attended.normed_BTD) if self.moe.shared else attended.x_BTD

    def experts(self, arrived: Arrived) -> Tensor:
        return self.moe.experts(arrived.rows_RD, arrived.counts_E, arrived.weights_R)

    def combine(self, rows_RD: Tensor, arrived: Arrived) -> Handle[Tensor]:
        return self.dispatcher.combine(rows_RD, arrived.ticket)

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, RouterReport]:
        attended = self.attend(x_BTD, cos_TR, sin_TR)
        return self.exchange(attended), attended.report

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """Everything after attention, residual included."""
        return self.exchange(self.route(x_BTD))

    def exchange(self, attended: Attended) -> Tensor:
        """Dispatch, experts and combine, one after the other."""
        outbound = self.dispatch(attended)
        stream_BTD = self.shared(attended)
        arrived = outbound.wait()
        homebound = self.combine(self.experts(arrived), arrived)
        return stream_BTD + homebound.wait().view_as(stream_BTD)
