"""The loss of a micro-batch as the sum of terms that arise in different places of the model.

Each term is a root of its own for the backward pass, with its weight and its share of the global batch already in it.
So a backward pass can begin wherever a term has arisen, and the terms of two micro-batches never meet in a graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dstrain.model.router import RouterReport

# Kinds of terms, as numbers into `StepLoss.parts_4`.
MAIN, MTP, BALANCE, Z = range(4)


@dataclass(frozen=True)
class StepLoss:
    """The share of these sequences in the loss of the global batch: all micro-batches of all ranks add up to it."""

    # What to differentiate where the graph is whole, otherwise detached: main + weights * others.
    total: Tensor
    # Detached parts, unweighted: [main, mtp, balance, z].
    parts_4: Tensor
    # One report per MoE layer of the stage, MTP layers last; without graphs.
    reports: list[RouterReport]


class LossTerms:
    """Takes the terms of a micro-batch as they arise; each kind has its weight."""

    def __init__(self, weights_4: Sequence[float], total_sequences: int):
        self._weights_4 = weights_4
        self._total_sequences = total_sequences
        self._parts: list[list[Tensor]] = [[] for _ in weights_4]
        self._roots: list[Tensor] = []
        self._taken: list[Tensor] = []
        self._reports: list[RouterReport] = []

    def add(self, kind: int, loss: Tensor) -> None:
        """A term, summed over the sequences of the micro-batch."""
        self._parts[kind].append(loss.detach())
        self._roots.append(loss * (self._weights_4[kind] / self._total_sequences))

    def report(self, report: RouterReport) -> None:
        self.add(BALANCE, report.balance_loss)
        self.add(Z, report.z_loss)
        parts = {"balance_loss": report.balance_loss.detach(), "z_loss": report.z_loss.detach()}
        self._reports.append(replace(report, **parts))

    def take(self) -> list[Tensor]:
        """The roots that are new since the last call."""
        roots, self._roots = self._roots, []
        self._taken += [root.detach() for root in roots]
        return roots

    def loss(self, like: Tensor) -> StepLoss:
        """When all roots have been taken: detached, on the device of `like`."""
        nothing = like.new_zeros((), dtype=torch.float32)
        total = torch.stack(self._taken).sum() if self._taken else nothing
        parts_4 = torch.stack([sum(parts, nothing) for parts in self._parts]) / self._total_sequences
        return StepLoss(total, parts_4, self._reports)
