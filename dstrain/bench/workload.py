"""What every configuration of a bench carries: the same model sizes, the same routes, the same compute.

Shapes: T tokens of a rank, K experts per token, E experts.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dstrain.dispatch.contract import Route
from dstrain.mesh.topology import Topology
from dstrain.schedule.action import Pass, Phase

# Share of each phase in the forward pass of a block, and again in its input and in its weight gradients.
SHARES = {Phase.ATTEND: 0.45, Phase.SHARED: 0.1, Phase.EXPERTS: 0.45}
# Forward pass, input gradients, weight gradients.
PASSES = len(Pass)


@dataclass(frozen=True)
class Workload:
    """A step of a model of `blocks` MoE blocks on nodes of equally many ranks, one expert-parallel group."""

    nodes: int
    ranks_per_node: int
    hidden_size: int
    num_experts: int
    experts_per_token: int
    # Of a rank and micro-batch.
    tokens: int
    blocks: int
    micro_batches: int
    # Nodes that a token may visit; None: all.
    route_nodes: int | None = None
    # How uneven experts are: the n-th most popular is chosen about n^-skew times as often as the first; 0: all alike.
    route_skew: float = 0.0
    seed: int = 0

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def held(self) -> int:
        """Experts of a rank."""
        return self.num_experts // self.ranks

    @property
    def topology(self) -> Topology:
        return Topology(tuple(rank // self.ranks_per_node for rank in range(self.ranks)))

    def routes(self, rank: int) -> list[list[Route]]:
        """By block and micro-batch, from the seed alone."""
        return [[self._route(rank, block, n) for n in range(self.micro_batches)] for block in range(self.blocks)]

    def _route(self, rank: int, block: int, micro_batch: int) -> Route:
        number = (rank * self.blocks + block) * self.micro_batches + micro_batch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        scores_TE = (
            self._popularity_E(block)
            - torch.empty(self.tokens, self.num_experts).exponential_(generator=generator).log_()
        )
        if self.route_nodes is not None:
            scores_TE.masked_fill_(~self._allowed_TE(generator), float("-inf"))
        chosen_TK = scores_TE.topk(self.experts_per_token).indices
        weights_TK = torch.rand(chosen_TK.shape, generator=generator) + 0.1
        return Route(chosen_TK, weights_TK / weights_TK.sum(1, keepdim=True))

    def _popularity_E(self, block: int) -> Tensor:
        """Logarithms; which experts are popular differs from block to block."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 - 1 - block)
        place_E = torch.randperm(self.num_experts, generator=generator) + 1
        return -self.route_skew * place_E.log()

    def _allowed_TE(self, generator: torch.Generator) -> Tensor:
        """The experts of `route_nodes` nodes drawn for each token."""
        nodes_TN = torch.rand(self.tokens, self.nodes, generator=generator).topk(self.route_nodes or 1).indices
        allowed_TN = torch.zeros(self.tokens, self.nodes, dtype=torch.bool).scatter_(1, nodes_TN, True)
        return allowed_TN.repeat_interleave(self.num_experts // self.nodes, dim=1)


@lru_cache(maxsize=4)
def all_routes(work: Workload) -> list[list[list[Route]]]:
    """Of every rank."""
    return [work.routes(rank) for rank in range(work.ranks)]
