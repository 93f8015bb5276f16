"""A table: the order in which every rank of an expert-parallel group runs its actions. What makes one legal. No torch.

A rank computes one action at a time and in the order of the table. Because all ranks run the same table, transfers
start in the same order everywhere and need no tags. Gradients do not depend on the table: for each part of the model
the micro-batches come in ascending order in BACKWARD and in WEIGHT, so sums are formed in one order only.

A course is the way of one micro-batch through one stage; without a pipeline there are as many as micro-batches.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dstrain.schedule.action import Action, Pass, Phase

Table = Sequence[Action]


class IllegalTable(ValueError):
    """A table breaks a rule: a fault of the planner or of the file that the table was read from."""

    def __init__(self, rule: str, reason: str):
        super().__init__(f"{rule}: {reason}")
        self.rule = rule


@dataclass(frozen=True)
class Transfer:
    """A transfer of one micro-batch between two phases; `name` is dispatch or combine."""

    work: Pass
    name: str
    block: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.work.value} {self.name} {self.block} of {self.micro_batch}"


def forward(blocks: int, micro_batch: int, stage: int = 0) -> Iterator[Action]:
    """The forward pass of a course in the plain order: nothing but SHARED runs beside a transfer."""
    for block in range(blocks):
        for phase in (Phase.ATTEND, Phase.SHARED, Phase.EXPERTS):
            yield Action(Pass.FORWARD, phase, block, micro_batch, stage)
    yield Action(Pass.FORWARD, Phase.ATTEND, blocks, micro_batch, stage)


def backward(
    blocks: int, micro_batch: int, stage: int = 0, works: Sequence[Pass] = (Pass.BACKWARD, Pass.WEIGHT)
) -> Iterator[Action]:
    """The backward pass of a course in the plain order, or one half of it."""
    yield from (Action(work, Phase.ATTEND, blocks, micro_batch, stage) for work in works)
    for block in reversed(range(blocks)):
        for phase in (Phase.SHARED, Phase.EXPERTS, Phase.ATTEND):
            yield from (Action(work, phase, block, micro_batch, stage) for work in works)


def actions(blocks: int, micro_batch: int, stage: int = 0) -> Iterator[Action]:
    """All actions of a course in the plain order."""
    yield from forward(blocks, micro_batch, stage)
    yield from backward(blocks, micro_batch, stage)


def sequential(blocks: int, micro_batches: int) -> list[Action]:
    """One micro-batch after the other."""
    return [action for micro_batch in range(micro_batches) for action in actions(blocks, micro_batch)]


def starts(action: Action, blocks: int) -> Transfer | None:
    """The transfer that sets out when the action ends."""
    work, phase, block = action.work, action.phase, action.block
    if work is Pass.WEIGHT or phase is Phase.SHARED:
        return None
    if work is Pass.FORWARD:
        if phase is Phase.EXPERTS:
            return Transfer(work, "combine", block, action.micro_batch)
        return Transfer(work, "dispatch", block, action.micro_batch) if block < blocks else None
    if phase is Phase.EXPERTS:
        return Transfer(work, "dispatch", block, action.micro_batch)
    return Transfer(work, "combine", block - 1, action.micro_batch) if block else None


def sender(action: Action, blocks: int) -> Action | None:
    """The action whose transfer must have arrived before this one begins."""
    work, block, course = action.work, action.block, (action.micro_batch, action.stage)
    if work is Pass.WEIGHT or action.phase is Phase.SHARED:
        return None
    if work is Pass.FORWARD:
        if action.phase is Phase.EXPERTS:
            return Action(work, Phase.ATTEND, block, *course)
        return Action(work, Phase.EXPERTS, block - 1, *course) if block else None
    if action.phase is Phase.EXPERTS:
        return Action(work, Phase.ATTEND, block + 1, *course)
    return Action(work, Phase.EXPERTS, block, *course) if block < blocks else None


def computed_before(action: Action, blocks: int) -> Action | None:
    """The action of the same micro-batch whose result this one takes over on the rank itself."""
    work, phase, block, course = action.work, action.phase, action.block, (action.micro_batch, action.stage)
    if work is Pass.WEIGHT:
        return Action(Pass.BACKWARD, phase, block, *course)
    if phase is Phase.EXPERTS:
        return None
    if phase is Phase.SHARED:
        return Action(work, Phase.ATTEND, block + (work is Pass.BACKWARD), *course)
    if work is Pass.FORWARD:
        return Action(work, Phase.SHARED, block - 1, *course) if block else None
    if block == blocks:
        return Action(Pass.FORWARD, Phase.ATTEND, block, *course)
    return Action(work, Phase.SHARED, block, *course)


def check(table: Table, blocks: int, micro_batches: int, in_flight: int | None = None) -> None:
    """`check_courses` for one stage; `in_flight`, too, is a rule."""
    check_courses(table, {(0, micro_batch): blocks for micro_batch in range(micro_batches)})
    if in_flight is not None and peak_in_flight(table) > in_flight:
        raise IllegalTable("in_flight", f"{peak_in_flight(table)} micro-batches at once, {in_flight} allowed")


def check_courses(table: Table, blocks: Mapping[tuple[int, int], int]) -> None:
    """Raises IllegalTable with the first rule that is broken: complete, once, after, order.

    `blocks`: how many MoE blocks each course (stage, micro-batch) has that the rank takes part in.
    """
    plain = [action for (stage, micro_batch), count in blocks.items() for action in actions(count, micro_batch, stage)]
    wanted = set(plain)
    done: set[Action] = set()
    last: dict[tuple[Pass, Phase, int, int], int] = {}
    for line, action in enumerate(table, start=1):
        if action not in wanted:
            raise IllegalTable("complete", f"line {line}, {action}, is no part of this model and step")
        if action in done:
            raise IllegalTable("once", f"line {line} repeats {action}")
        count = blocks[action.course]
        for need in (computed_before(action, count), sender(action, count)):
            if need is not None and need not in done:
                raise IllegalTable("after", f"line {line}, {action}, comes before {need}, which it needs")
        place = (action.work, action.phase, action.block, action.stage)
        if action.work is not Pass.FORWARD and last.get(place, -1) > action.micro_batch:
            raise IllegalTable("order", f"line {line}, {action}, comes after micro-batch {last[place]}")
        last[place] = action.micro_batch
        done.add(action)
    if wanted - done:
        missing = next(action for action in plain if action not in done)
        raise IllegalTable("complete", f"{missing} is missing, and {len(wanted - done) - 1} others")


def peak_in_flight(table: Table) -> int:
    """The most courses at once between the start of their forward and the end of their backward pass."""
    live: set[tuple[int, int]] = set()
    peak = 0
    for action in table:
        if action.work is Pass.FORWARD:
            live.add(action.course)
            peak = max(peak, len(live))
        elif action.work is Pass.BACKWARD and action.phase is Phase.ATTEND and action.block == 0:
            live.discard(action.course)
    return peak


def to_text(table: Table) -> str:
    """One line per action, for example `B experts 3 of 1`, or `B experts 3 of 1 in 2` where the stage is not 0."""
    return "".join(f"{action}\n" for action in table)


def from_text(text: str) -> list[Action]:
    """What `to_text` wrote; blank lines and what follows a # do not count."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return list(_read(line for line in lines if line))


def _read(lines: Iterable[str]) -> Iterator[Action]:
    for line in lines:
        try:
            work, phase, block, of, micro_batch, *where = line.split()
            if of != "of" or (where and (len(where) != 2 or where[0] != "in")):
                raise ValueError
            stage = int(where[1]) if where else 0
            yield Action(Pass(work), Phase(phase), int(block), int(micro_batch), stage)
        except ValueError:
            raise IllegalTable("text", f"{line!r} is not like 'B experts 3 of 1'") from None
