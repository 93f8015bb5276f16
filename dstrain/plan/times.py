"""What a step takes, part by part: what stages.py says, in the form in which a schedule is played.

Times of a stage are those of its phases (schedule/action.py), so that the planner plays the very tables that the
trainer executes. All for the most loaded rank.
"""

from dataclasses import dataclass

from dstrain.schedule.simulate import Costs


@dataclass(frozen=True)
class Reduction:
    """Of one pipeline rank, at the end of a step: gradients to the ranks that own them, weights back."""

    reduce_ms: float
    gather_ms: float
    # The optimiser's own work.
    update_ms: float


@dataclass(frozen=True)
class StepTimes:
    """By stage in the order of the model, and by pipeline rank."""

    # A micro-batch in each phase and transfer. Of a stage without MoE blocks, or without experts that are spread, all
    # is the one phase ATTEND 0, and there are no transfers.
    stages: tuple[Costs, ...]
    # From the end of a stage until its neighbour on another rank can begin.
    send_ms: float
    # Of that, what both ops of a micro-batch on a stage last longer because nothing hides it.
    send_exposed_ms: float
    ranks: tuple[Reduction, ...]
    # Whether tokens cross the links that gradients and weights cross, so that one waits for the other.
    shares_links: bool = False
