"""What `dstrain plan` expects of the steps of a run, said beside what they take.

A plan is a convenience: where the machine is not known well enough there is none, and nothing that goes wrong in one
may end a run or slow it down.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import median
from typing import TypeVar

from dstrain.config.hardware import HardwareConfig
from dstrain.config.schema import Config
from dstrain.errors import UserError
from dstrain.hardware import interval
from dstrain.metrics.sinks import Record
from dstrain.plan.job import Job, job_of
from dstrain.plan.memory import rank_memory
from dstrain.plan.simulation import simulate
from dstrain.plan.step import predict

Result = TypeVar("Result")

PLANNED = "planned:"
# The first steps of a run set things up.
WARM_UP = 3
# Of the newest steps the median is compared.
WINDOW = 200


@dataclass(frozen=True)
class Planned:
    """A step of a given batch; seconds."""

    step_s: float
    # Waiting for transfers of tokens, gradients and weights.
    exposed_s: float


@lru_cache(maxsize=64)
def planned(config: Config, sequences: int) -> Planned | str:
    """`config` as a trainer has it; `sequences`: of the step. Otherwise why there is none, "" for a machine that says
    nothing of itself."""
    hardware = config.hardware
    if not (hardware.peak_bf16_tflops and hardware.memory_gbytes_per_s):
        return ""
    return _attempted(lambda: _planned(replace(job_of(config), sequences=sequences), hardware))


def _planned(job: Job, hardware: HardwareConfig) -> Planned:
    step = simulate(job, hardware).prediction
    return Planned(step.step_s, step.exposed_s + step.reduce_s)


def _attempted(act: Callable[[], Result]) -> Result | str:
    try:
        return act()
    except UserError as error:
        return str(error)
    except Exception as error:
        # A bug in a plan must not end a run.
        return f"{type(error).__name__}: {error}"


def step_s(config: Config, tokens: int) -> float | None:
    """What a step of so many tokens is planned to take."""
    found = planned(config, tokens // config.train.seq_len)
    return found.step_s if isinstance(found, Planned) else None


def promise(config: Config) -> str:
    """A line at the beginning of a run; "" where there is nothing to say."""
    train = config.train
    found = planned(config, train.sequences or (train.batch_tokens or 0) // train.seq_len)
    line = _attempted(lambda: _line(config, found)) if isinstance(found, Planned) else found
    return f"no plan of this run: {line}" if line and not line.startswith(PLANNED) else line


def _line(config: Config, found: Planned) -> str:
    job, hardware = job_of(config), config.hardware
    # The closed form says how much constants matter; what is played is the better middle.
    middle = predict(job, hardware).step_s
    low, high = (end / middle * found.step_s for end in interval(hardware, lambda other: predict(job, other).step_s))
    memory_gib = max(rank.total_gib for rank in rank_memory(job, hardware))
    waits = (
        f", {found.exposed_s:.2g} s of it waiting for transfers" if config.mesh.ep * (config.mesh.dp or 1) > 1 else ""
    )
    return f"{PLANNED} {found.step_s:.3g} s a step ({low:.3g}-{high:.3g}){waits}; {memory_gib:.3g} GiB on a device"


class Comparison:
    """A sink: remembers what steps took and were planned to take."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._seen = 0

    def log(self, record: Record) -> None:
        self._seen += 1
        taken_ms, plan_s, waited_ms = (
            record.get(key) for key in ("step_ms", "planned_step_s", "comm_exposed_worst_ms")
        )
        if self._seen > WARM_UP and taken_ms is not None and plan_s is not None and waited_ms is not None:
            self._steps.append((float(taken_ms) / 1e3, float(plan_s), float(waited_ms) / 1e3))

    def close(self) -> None:
        """There is nothing to close."""

    def line(self) -> str:
        """Measured against planned, at the end of a run; "" where nothing was planned, or too few steps ran."""
        if not self._steps:
            return ""
        taken_s, plan_s, waited_s = (median(values) for values in zip(*self._steps, strict=True))
        waits = f"; it waited {waited_s:.2g} s for transfers" if waited_s else ""
        return (
            f"a step took {taken_s:.3g} s (median of {len(self._steps)}), planned were {plan_s:.3g} s: the plan is off "
            f"by {plan_s / taken_s - 1:+.1%}{waits}"
        )
