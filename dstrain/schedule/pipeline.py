"""A pipeline schedule as a table: in which order every rank works on which stage of which micro-batch. No torch.

The layers of a model are cut into stages, which micro-batches pass in ascending order forward and in descending order
backward. A rank holds one stage or several. It runs its slots one after the other; a slot is one op or an overlapped
pair: the forward pass of one micro-batch and the backward pass of another, whose transfers hide under each other's
compute (overlap.py says in which order the phases of both run).

    rank 0    F0.0  F0.1  F0.2  ...  (F0.3 & B3.0)  ...        kind, stage . micro-batch
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property


class Kind(Enum):
    __hash__ = object.__hash__

    FORWARD = "F"
    # Gradients of inputs and of weights.
    BACKWARD = "B"
    # Gradients of inputs only; those of the weights follow as WEIGHT.
    INPUT = "I"
    WEIGHT = "W"


@dataclass(frozen=True)
class Op:
    """Work of one kind on a stage for a micro-batch."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.micro_batch}"


# One op, or an overlapped pair: forward first, then backward.
Slot = tuple[Op, ...]


@dataclass(frozen=True)
class Layout:
    """Which stages every pipeline rank holds; the same for any number of micro-batches.

    `mirrored`: every stage is held twice, by ranks p and P - 1 - p, and half of the micro-batches start at each end.
    """

    held: tuple[tuple[int, ...], ...]
    mirrored: bool = False

    @property
    def num_stages(self) -> int:
        return 1 + max(stage for stages in self.held for stage in stages)

    @property
    def copies(self) -> int:
        """Ranks that hold each stage."""
        return 2 if self.mirrored else 1


@dataclass(frozen=True)
class Pipeline:
    """The slots of every rank."""

    name: str
    layout: Layout
    micro_batches: int
    ranks: tuple[tuple[Slot, ...], ...]

    @cached_property
    def rank_of(self) -> Mapping[tuple[int, int], int]:
        """The rank on which a micro-batch passes a stage, by (stage, micro-batch)."""
        return {
            (op.stage, op.micro_batch): rank
            for rank, slots in enumerate(self.ranks)
            for slot in slots
            for op in slot
            if op.kind is Kind.FORWARD
        }
