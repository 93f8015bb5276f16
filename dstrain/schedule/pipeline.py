"""A pipeline schedule as a table: in which order every rank works on which stage of which micro-batch. No torch.

The layers of a model are cut into stages, which micro-batches pass in ascending order forward and in descending order
backward. A rank holds one stage or several. It runs its slots one after the other; a slot is one op or an overlapped
pair: the forward pass of one micro-batch and the backward pass of another, whose transfers hide under each other's
compute (overlap.py says in which order the phases of both run).

    rank 0    F0.0  F0.1  F0.2  ...  (F0.3 & B3.0)  ...        kind, stage . micro-batch
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from dstrain.schedule.table import IllegalTable


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

    @staticmethod
    def looped(ranks: int, chunks: int) -> "Layout":
        """`chunks` stages a rank; the way through the model comes round to every rank as often."""
        return Layout(tuple(tuple(range(rank, ranks * chunks, ranks)) for rank in range(ranks)))

    @staticmethod
    def folded(ranks: int) -> "Layout":
        """Two stages a rank: down to the last rank and back up, a V."""
        return Layout(tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks)))

    @staticmethod
    def bidirectional(ranks: int) -> "Layout":
        """As many stages as ranks, passed from both ends."""
        return Layout(tuple((rank, ranks - 1 - rank) for rank in range(ranks)), mirrored=True)

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

    def target(self, op: Op) -> tuple[int, int] | None:
        """The stage that takes what an op makes, and the rank that runs it for the micro-batch; None if none does."""
        stage = op.stage + (1 if op.kind is Kind.FORWARD else -1)
        if op.kind is Kind.WEIGHT or not 0 <= stage < self.layout.num_stages:
            return None
        return stage, self.rank_of[stage, op.micro_batch]


@dataclass(frozen=True)
class Products:
    """What ops make and others wait for, as numbers: for each stage and micro-batch the output, the gradient of the
    input (by BACKWARD and INPUT alike) and the gradient of the weights."""

    stages: int
    micro_batches: int

    @property
    def count(self) -> int:
        return 3 * self.stages * self.micro_batches

    def of(self, op: Op) -> int:
        return (_PRODUCT[op.kind] * self.stages + op.stage) * self.micro_batches + op.micro_batch

    def needs(self, op: Op) -> tuple[int, ...]:
        own, kind = self.of(op), op.kind
        if kind is Kind.FORWARD:
            return (own - self.micro_batches,) if op.stage else ()
        # The product of the kind before, of the same stage and micro-batch.
        before = own - self.stages * self.micro_batches
        if kind is Kind.WEIGHT or op.stage == self.stages - 1:
            return (before,)
        return before, own + self.micro_batches

    def describe(self, product: int) -> str:
        place, micro_batch = divmod(product, self.micro_batches)
        kind, stage = divmod(place, self.stages)
        return f"the {_PRODUCT_NAMES[kind]} of stage {stage} for micro-batch {micro_batch}"


_PRODUCT = {Kind.FORWARD: 0, Kind.BACKWARD: 1, Kind.INPUT: 1, Kind.WEIGHT: 2}
_PRODUCT_NAMES = ("output", "input gradient", "weight gradient")


def walk(pipeline: Pipeline) -> Iterator[tuple[int, Slot]]:
    """Every slot with its rank, in an order in which the ranks could run together.

    A slot begins when all that its ops need is there. Raises IllegalTable (deadlock) when no rank can go on.
    """
    products = Products(pipeline.layout.num_stages, pipeline.micro_batches)
    made = bytearray(products.count)
    waiting: dict[int, list[int]] = defaultdict(list)
    places = [0] * len(pipeline.ranks)
    ready = list(range(len(pipeline.ranks)))
    while ready:
        rank = ready.pop()
        slots = pipeline.ranks[rank]
        while places[rank] < len(slots):
            slot = slots[places[rank]]
            lacking = [need for op in slot for need in products.needs(op) if not made[need]]
            if lacking:
                waiting[lacking[0]].append(rank)
                break
            for op in slot:
                made[products.of(op)] = True
                ready += waiting.pop(products.of(op), ())
            places[rank] += 1
            yield rank, slot
    if waiting:
        stuck = sorted((rank, need) for need, ranks in waiting.items() for rank in ranks)
        reasons = [
            f"rank {rank} waits in {' & '.join(map(str, pipeline.ranks[rank][places[rank]]))} for "
            f"{products.describe(need)}"
            for rank, need in stuck
        ]
        raise IllegalTable("deadlock", "; ".join(reasons))


def check(pipeline: Pipeline) -> None:
    """Raises IllegalTable with the first rule that is broken.

    slot      a slot is one op, or F and B of different micro-batches, so that neither needs the other
    home      a rank runs only stages that it holds, and all ops of a stage for a micro-batch
    once      no op stands twice, and there is no B where there is I or W
    order     on each rank the weight gradients of a stage come in ascending order of micro-batches: one order of sums
    complete  every stage sees every micro-batch forward and backward, with its weight gradient
    deadlock  every rank comes to its end, if each slot waits for what its ops need
    """
    if len(pipeline.ranks) != len(pipeline.layout.held):
        raise IllegalTable("home", f"{len(pipeline.ranks)} ranks run, {len(pipeline.layout.held)} hold stages")
    homes: dict[tuple[int, int], int] = {}
    seen: dict[tuple[int, int], int] = {}
    for rank, slots in enumerate(pipeline.ranks):
        last = dict.fromkeys(pipeline.layout.held[rank], -1)
        for slot in slots:
            _check_slot(slot)
            for op in slot:
                _check_op(op, rank, pipeline, last)
                place = (op.stage, op.micro_batch)
                if homes.setdefault(place, rank) != rank:
                    raise IllegalTable("home", f"rank {rank} runs {op}, whose stage rank {homes[place]} runs for it")
                before = seen.get(place, 0)
                if before & _EXCLUDES[op.kind]:
                    raise IllegalTable("once", f"{op} on rank {rank} repeats work")
                seen[place] = before | _BITS[op.kind]
    _check_complete(pipeline, seen)
    for _ in walk(pipeline):
        pass


_BITS = {kind: 1 << place for place, kind in enumerate(Kind)}
_SPLIT = _BITS[Kind.INPUT] | _BITS[Kind.WEIGHT]
# B is I and W in one.
_EXCLUDES = {
    Kind.FORWARD: _BITS[Kind.FORWARD],
    Kind.BACKWARD: _BITS[Kind.BACKWARD] | _SPLIT,
    Kind.INPUT: _BITS[Kind.INPUT] | _BITS[Kind.BACKWARD],
    Kind.WEIGHT: _BITS[Kind.WEIGHT] | _BITS[Kind.BACKWARD],
}
_WHOLE = (_BITS[Kind.FORWARD] | _BITS[Kind.BACKWARD], _BITS[Kind.FORWARD] | _SPLIT)


def _check_slot(slot: Slot) -> None:
    if len(slot) == 1:
        return
    kinds = [op.kind for op in slot]
    if kinds != [Kind.FORWARD, Kind.BACKWARD] or slot[0].micro_batch == slot[1].micro_batch:
        what = " & ".join(map(str, slot))
        raise IllegalTable("slot", f"({what}) is neither one op nor F and B of different micro-batches")


def _check_op(op: Op, rank: int, pipeline: Pipeline, last: dict[int, int]) -> None:
    """`last`: of each stage of the rank the micro-batch whose weight gradient came last, or -1."""
    if op.stage not in last:
        raise IllegalTable("home", f"rank {rank} runs {op}, but holds stages {pipeline.layout.held[rank]}")
    if not 0 <= op.micro_batch < pipeline.micro_batches:
        raise IllegalTable("complete", f"{op} on rank {rank}: there are {pipeline.micro_batches} micro-batches")
    if op.kind in (Kind.BACKWARD, Kind.WEIGHT):
        if op.micro_batch < last[op.stage]:
            raise IllegalTable("order", f"{op} on rank {rank} comes after micro-batch {last[op.stage]}")
        last[op.stage] = op.micro_batch


def _check_complete(pipeline: Pipeline, seen: dict[tuple[int, int], int]) -> None:
    """`seen`: the kinds of ops on a (stage, micro-batch), as bits."""
    for stage in range(pipeline.layout.num_stages):
        for micro_batch in range(pipeline.micro_batches):
            bits = seen.get((stage, micro_batch), 0)
            if bits not in _WHOLE:
                there = " ".join(kind.value for kind in Kind if bits & _BITS[kind]) or "nothing"
                reason = f"stage {stage} sees {there} of micro-batch {micro_batch}, instead of F B or F I W"
                raise IllegalTable("complete", reason)
