"""What a step takes, part by part: what layer.py and network.py say, in the form in which a schedule is played.

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

    # A micro-batch in each phase and transfer. A stage without MoE blocks, or without experts that are spread, has the
    # one phase ATTEND 0, and no transfers.
    stages: tuple[Costs, ...]
    # From the end of a stage until its neighbour on another rank can begin; and of that, what keeps compute from going
    # on (transfers that nothing hides).
    send_ms: float
    send_exposed_ms: float
    ranks: tuple[Reduction, ...]
    # Model FLOPs of a step on a device, without what is recomputed (plan.count's convention).
    flops: float
    # By name, for the report: milliseconds of a device in a step in gemm, grouped gemm, attention, memory-bound
    # kernels, waiting for the host, tensor-parallel transfers, recomputation.
    kinds_ms: dict[str, float]
