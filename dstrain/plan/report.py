"""The page of `dstrain plan` as data: what is shown as text (`lines`), as HTML (html.py) or as a picture.

A step of the slowest rank falls into parts that add up: computing, waiting for the pipeline, transfers of tokens that
nothing hides, gradients and weights that nothing hides, the update.
"""

from dataclasses import dataclass

from dstrain.config.hardware import Evidence


@dataclass(frozen=True)
class RankUse:
    """Memory of a pipeline rank: of its data ranks the one that needs most."""

    rank: int
    # By what it holds; they add up to the total.
    parts_gib: dict[str, float]
    total_gib: float


@dataclass(frozen=True)
class Range:
    """A predicted figure with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    # "deepseek_v3 on 2048 x h800_sxm"
    title: str
    # Model, layout, batch and machine, a line each.
    about: tuple[str, ...]
    gpus: int
    step_s: Range
    # By name; they add up to the step.
    parts_s: dict[str, float]
    # Busy time of a device in a step by kind of work, in the order of their size.
    kinds_s: dict[str, float]
    tokens_per_s_per_gpu: Range
    # None: the machine names no peak.
    mfu: float | None
    memory: tuple[RankUse, ...]
    # Of a device; 0: the machine does not say.
    capacity_gib: float
    # None: the capacity is not known.
    fits: bool | None
    # In words: whether it fits, by how much, on which rank; then what would change it, a line each.
    verdict: tuple[str, ...]
    # Of the whole run.
    steps: int
    tokens: int
    hours: Range
    gpu_hours: Range
    # US dollars; None: the machine names no price.
    cost: Range | None
    # What is taken for granted, and what is not modelled.
    assumptions: tuple[str, ...]
    evidence: tuple[Evidence, ...]
