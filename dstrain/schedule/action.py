"""What a rank does with a micro-batch, as names: the vocabulary of every order of work. No torch.

A stage of a model is a chain of stretches with an MoE block between each two; without a pipeline there is one stage:

    stretch 0 | block 0 | stretch 1 | block 1 | ... | stretch B

A stretch is everything from the arrival of one block's results to the departure of the next block's tokens: residual,
dense layers, MLA, router; in the first stretch of the model the embedding, in the last one the head and the loss.

    ATTEND n    waits for combine of block n - 1, computes stretch n, starts dispatch of block n
    SHARED n    the shared expert of block n, between ATTEND n and ATTEND n + 1 (backward the other way round)
    EXPERTS n   waits for dispatch of block n, computes its routed experts, starts combine of block n

Backward, ATTEND n waits for the gradient of dispatch n and starts that of combine n - 1; EXPERTS n waits for the
gradient of combine n and starts that of dispatch n. WEIGHT is the part of a backward pass that no other phase waits
for. Between stages, ATTEND 0 waits for the output of the stage before, and the last ATTEND sends that of its own;
backward it is the other way round.
"""

from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    # That of an object instead of Enum's, which is computed in Python: tables are looked up all the time.
    __hash__ = object.__hash__

    ATTEND = "attend"
    SHARED = "shared"
    EXPERTS = "experts"


class Pass(Enum):
    __hash__ = object.__hash__

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"


@dataclass(frozen=True, order=False)
class Action:
    """One piece of compute; it starts the transfer that follows from it and waits for the one it needs."""

    work: Pass
    phase: Phase
    # Of the stage.
    block: int
    micro_batch: int
    stage: int = 0

    @property
    def course(self) -> tuple[int, int]:
        """The way of one micro-batch through one stage: (stage, micro-batch)."""
        return self.stage, self.micro_batch

    def __str__(self) -> str:
        where = f" in {self.stage}" if self.stage else ""
        return f"{self.work.value} {self.phase.value} {self.block} of {self.micro_batch}{where}"
