"""What the bench asks of a peer: the same model, routes and compute as ours, carried by the peer's own MoE layer.

A model is a chain: stretch 0, block 0, stretch 1, ..., the last stretch. The peer's layer is the block. It runs its
forward and backward passes one micro-batch after another, as it does by default; nothing of it is copied or edited, and
what it needs to run on a CPU is laid around each step and taken away again.

Shapes: T tokens of this rank, K experts per token, D hidden size, R rows of this rank's experts, E all experts.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import torch
from torch import Tensor

from dstrain.dispatch.contract import Route
from dstrain.errors import UserError

# The logit of an expert that was not chosen: its softmax is zero in FP32.
UNCHOSEN = -1e4


@dataclass(frozen=True)
class Spec:
    """One rank's share of the model. `routes[block][micro_batch]`; the weights of a token add up to one."""

    hidden: int
    experts: int
    top_k: int
    tokens: int
    routes: Sequence[Sequence[Route]]

    @property
    def blocks(self) -> int:
        return len(self.routes)

    def logits_TE(self, block: int, micro_batch: int) -> Tensor:
        """FP32 logits from which a softmax gate takes exactly this route. A leaf: weights have gradients."""
        route = self.routes[block][micro_batch]
        logits_TE = torch.full((self.tokens, self.experts), UNCHOSEN)
        return logits_TE.scatter_(1, route.experts_TK, route.weights_TK.log()).requires_grad_()


class Compute(Protocol):
    """The computation between transfers, differentiable; real, or a sleep that stands for it."""

    def attend(self, x_TD: Tensor, stretch: int) -> Tensor: ...

    def shared(self, x_TD: Tensor, block: int) -> Tensor: ...

    def experts(self, rows_RD: Tensor, counts: Sequence[int], block: int, weights_R: Tensor | None = None) -> Tensor:
        """Rows sorted by expert, counts[i] of them for this rank's i-th expert; times their weights, if they are given.
        A peer multiplies by them itself."""
        ...


class Layer(Protocol):
    """A peer's MoE layer: routed and shared experts."""

    def __call__(self, x_TD: Tensor, micro_batch: int) -> Tensor: ...


@dataclass(frozen=True)
class Facts:
    """What a table of figures has to say about a peer."""

    name: str
    versions: dict[str, str]
    # What was put in or around it so that it runs here.
    adaptations: tuple[str, ...]
    # What of it, or in this run, is not what its users would get.
    limits: tuple[str, ...]


@dataclass
class Peer:
    """The chain around a peer's layers, one for each block."""

    facts: Facts
    compute: Compute
    layers: Sequence[Layer]
    adapted: Callable[[], AbstractContextManager[object]] = nullcontext

    def step(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Forward and backward pass of every micro-batch, one after the other; returns the outputs [T, D].

        `inputs` are BF16 leaves and get gradients. The loss is half the square of the output.
        """
        with self.adapted():
            return [self._micro_batch(number, x_TD) for number, x_TD in enumerate(inputs)]

    def _micro_batch(self, number: int, x_TD: Tensor) -> Tensor:
        for block, layer in enumerate(self.layers):
            x_TD = self.compute.attend(x_TD, block)
            x_TD = x_TD + layer(x_TD, number)
        y_TD = self.compute.attend(x_TD, len(self.layers))
        y_TD.backward(y_TD.detach())
        return y_TD.detach()


def versions_of(packages: Sequence[str], peer: str, cure: str) -> dict[str, str]:
    """Versions of what a peer needs; UserError if something is missing."""
    try:
        return {package: version(package) for package in packages}
    except PackageNotFoundError as error:
        raise UserError(f"{peer} cannot run: {error.name} is not installed. {cure}") from None
