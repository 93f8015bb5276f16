"""What the driver of the bench and its workers say to each other."""

from dataclasses import dataclass

from dstrain.bench.case import Case
from dstrain.bench.workload import Workload
from dstrain.schedule.action import Action


@dataclass(frozen=True)
class Prepare:
    """From now on, this model; what was built for the one before is dropped."""

    work: Workload
    # Of the emulated compute of a block; None: real compute.
    forward_ms: float | None


@dataclass(frozen=True)
class Run:
    """So many steps of a case; `case` None: compute alone."""

    case: Case | None
    table: tuple[Action, ...]
    steps: int


@dataclass(frozen=True)
class Timing:
    """A step of a case in the sequential order, to be answered with what its phases and transfers cost."""

    case: Case
    table: tuple[Action, ...]


@dataclass(frozen=True)
class Record:
    """A step of a pipeline's case that has run before, to be answered with its account, spans and all; `alone`: in the
    order in which one micro-batch at a time is under way."""

    case: Case
    alone: bool


@dataclass(frozen=True)
class Failure:
    """A worker's last message."""

    trace: str


@dataclass(frozen=True)
class StepFigures:
    """One step of one rank."""

    step_ms: float
    # Of the main thread: sleeping for the accelerator, and waiting for the network.
    compute_ms: float
    waited_ms: float
    # Processor time of the main thread, and of all threads.
    main_cpu_ms: float
    cpu_ms: float

    @property
    def host_ms(self) -> float:
        """What the main thread did besides: bookkeeping of graph and transfers, and whatever is packed there."""
        return self.step_ms - self.compute_ms - self.waited_ms
