"""What a pipeline schedule costs: its slots played with given times, its bubbles, and what every rank holds. No torch.

The machine runs one slot at a time on each rank, in the order of the table. A slot begins when the one before it has
ended and all that its ops need has arrived; a pair begins when both inputs are there and gives both outputs at its end.
Messages between ranks take a latency and never wait for each other.

An activation is counted from the start of its forward pass until its backward pass has given the gradient of the input,
and the weight gradient put off from there on is counted apart, as DeepSeek counts for DualPipe. Of both, one is what a
stage needs for a micro-batch; where ranks hold several stages, each is smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from dstrain.schedule.pipeline import Kind, Op, Pipeline, Products, Slot, walk


@dataclass(frozen=True)
class StageCosts:
    """Milliseconds of one micro-batch on each stage. A full backward pass takes input and weight together."""

    forward_ms: tuple[float, ...]
    input_ms: tuple[float, ...]
    weight_ms: tuple[float, ...]
    # Time of an overlapped pair over the sum of its ops.
    pair: float = 1.0
    # From the end of a slot until another rank can begin with what it made.
    latency_ms: float = 0.0

    @staticmethod
    def even(
        stages: int, forward_ms: float, input_ms: float, weight_ms: float, pair: float = 1.0, latency_ms: float = 0.0
    ) -> "StageCosts":
        """All stages alike."""
        return StageCosts((forward_ms,) * stages, (input_ms,) * stages, (weight_ms,) * stages, pair, latency_ms)

    def of(self, slot: Slot) -> float:
        serial_ms = sum(self._op(op) for op in slot)
        return serial_ms * self.pair if len(slot) == 2 else serial_ms

    def _op(self, op: Op) -> float:
        if op.kind is Kind.FORWARD:
            return self.forward_ms[op.stage]
        if op.kind is Kind.INPUT:
            return self.input_ms[op.stage]
        if op.kind is Kind.WEIGHT:
            return self.weight_ms[op.stage]
        return self.input_ms[op.stage] + self.weight_ms[op.stage]


@dataclass(frozen=True)
class Span:
    """A slot in time."""

    slot: Slot
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class Figures:
    """Lists have an entry for each rank."""

    makespan_ms: float
    # Time in which a rank computes nothing.
    bubble_ms: list[float]
    # In stages times micro-batches.
    peak_live: list[int]
    peak_pending: list[int]
    # Ranks that hold each parameter.
    copies: int
    # Outputs and gradients sent to other ranks.
    messages: list[int]

    @property
    def bubble_share(self) -> float:
        """Of the time of all ranks."""
        return sum(self.bubble_ms) / (len(self.bubble_ms) * self.makespan_ms)


def play(pipeline: Pipeline, costs: StageCosts) -> list[list[Span]]:
    """Start and end of every slot, by rank. Raises IllegalTable if the ranks wait for each other."""
    products = Products(pipeline.layout.num_stages, pipeline.micro_batches)
    ends_ms = [0.0] * products.count
    makers = [0] * products.count
    free_ms = [0.0] * len(pipeline.ranks)
    spans: list[list[Span]] = [[] for _ in pipeline.ranks]
    for rank, slot in walk(pipeline):
        start_ms = free_ms[rank]
        for op in slot:
            for need in products.needs(op):
                start_ms = max(start_ms, ends_ms[need] + (costs.latency_ms if makers[need] != rank else 0.0))
        free_ms[rank] = start_ms + costs.of(slot)
        spans[rank].append(Span(slot, start_ms, free_ms[rank]))
        for op in slot:
            ends_ms[products.of(op)] = free_ms[rank]
            makers[products.of(op)] = rank
    return spans


def figures(pipeline: Pipeline, costs: StageCosts) -> Figures:
    spans = play(pipeline, costs)
    makespan_ms = max(rank[-1].end_ms for rank in spans)
    return Figures(
        makespan_ms,
        bubble_ms=[makespan_ms - sum(costs.of(slot) for slot in slots) for slots in pipeline.ranks],
        peak_live=[peak_live(slots) for slots in pipeline.ranks],
        peak_pending=[peak_pending(slots) for slots in pipeline.ranks],
        copies=pipeline.layout.copies,
        messages=messages(pipeline),
    )


def peak_live(slots: Sequence[Slot]) -> int:
    """The most activations that a rank holds at once; in a pair, that of the forward op is there beside the other."""
    return _peak(slots, {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.INPUT: -1})


def peak_pending(slots: Sequence[Slot]) -> int:
    """The most weight gradients that a rank has put off at once."""
    return _peak(slots, {Kind.INPUT: 1, Kind.WEIGHT: -1})


def _peak(slots: Sequence[Slot], changes: Mapping[Kind, int]) -> int:
    return max(accumulate(changes.get(op.kind, 0) for slot in slots for op in slot))


def messages(pipeline: Pipeline) -> list[int]:
    """How many tensors each rank sends to others in a step."""
    targets = [[pipeline.target(op) for slot in slots for op in slot] for slots in pipeline.ranks]
    return [sum(at is not None and at[1] != rank for at in found) for rank, found in enumerate(targets)]
