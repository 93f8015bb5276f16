"""What a pipeline rank holds at once: micro-batches between forward and backward pass, and weight gradients put off.

Walked through the slots of the very tables that are run. Where a step has many micro-batches, its middle repeats
itself, so that a shorter step shows the same peaks: that one is walked once for all jobs with the same pipeline.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dstrain.schedule.pipeline import Kind, Slot
from dstrain.schedule.pipelines.choose import make

# In so many micro-batches for each rank, and so many more, every pipeline reaches its steady state.
STEADY = 3


@dataclass(frozen=True)
class Moment:
    """When an op begins on a rank: for each of the rank's stages what is held, its own micro-batch included."""

    # Micro-batches whose gradient of the input is not there yet.
    live: tuple[int, ...]
    # Those of which it is there, and the weight gradient is not.
    pending: tuple[int, ...]
    # The place among the rank's stages of the one whose backward pass runs; None: a weight gradient alone.
    working: int | None

    def exceeds(self, other: "Moment") -> bool:
        """Whether it holds at least as much of everything."""
        if other.working not in (None, self.working):
            return False
        mine, others = self.live + self.pending, other.live + other.pending
        return all(a >= b for a, b in zip(mine, others, strict=True))


# Of every rank the moments that no other one exceeds.
Peaks = tuple[tuple[Moment, ...], ...]


def alone(micro_batches: int) -> Peaks:
    """Without a pipeline, with so many micro-batches in flight."""
    return ((Moment((micro_batches,), (0,), 0),),)


def peaks(name: str, ranks: int, chunks: int, micro_batches: int, overlap: bool, *, exact: bool = False) -> Peaks:
    """Of the schedule `name`, as schedule/pipelines/choose.py makes it; `exact` walks the whole step."""
    return _walked(name, ranks, chunks, micro_batches if exact else _enough(ranks, micro_batches), overlap)


def _enough(ranks: int, micro_batches: int) -> int:
    """A number with the same peaks that keeps the rules of every schedule as `micro_batches` does."""
    steady = (STEADY + 1) * ranks
    if micro_batches <= steady:
        return micro_batches
    return steady if micro_batches % ranks == 0 else steady + micro_batches % 2


@lru_cache(maxsize=1024)
def _walked(name: str, ranks: int, chunks: int, micro_batches: int, overlap: bool) -> Peaks:
    pipeline = make(name, ranks, micro_batches, chunks, overlap)
    both = zip(pipeline.ranks, pipeline.layout.held, strict=True)
    return tuple(tuple(_largest(_moments(slots, held))) for slots, held in both)


def _moments(slots: Sequence[Slot], held: Sequence[int]) -> Iterator[Moment]:
    """At the start of everything but forward ops, which a backward op with as much follows; in a pair the forward op's
    activation is there beside the other."""
    live, pending = [0] * len(held), [0] * len(held)
    for slot in slots:
        for op in slot:
            place = held.index(op.stage)
            if op.kind is Kind.FORWARD:
                live[place] += 1
                continue
            working = None if op.kind is Kind.WEIGHT else place
            yield Moment(tuple(live), tuple(pending), working)
            if op.kind is Kind.WEIGHT:
                pending[place] -= 1
            else:
                live[place] -= 1
                pending[place] += op.kind is Kind.INPUT


def _largest(moments: Iterator[Moment]) -> list[Moment]:
    found: list[Moment] = []
    for moment in dict.fromkeys(moments):
        if not any(other.exceeds(moment) for other in found):
            found = [other for other in found if not moment.exceeds(other)] + [moment]
    return found
