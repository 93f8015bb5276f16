"""From the slots of a rank to its actions: in which order the phases of a forward and a backward pass interleave.

The order of DeepSeek-V3's training trace (https://github.com/deepseek-ai/profile-data): each transfer of one pass runs
under compute of the other. For block f of the forward and block b of the backward pass:

    B attend b+1 | B, W shared b, F attend f | F shared f, B experts b | W experts b, F experts f | B, W attend b | ...
                 | combine(B b)              | dispatch(F f)           | dispatch(B b)            | combine(F f)

(above compute, below the transfer that is under way meanwhile). Shared experts may run in several places; here they
fill the two windows that have least to do. The two stages of a pair may have different numbers of blocks; what one has
more runs in the plain order. Weight gradients that stand alone in the table, as zero-bubble schedules have them, fill
the transfers of the op before them. Those of different courses keep their order, so that gradients of what stages share
are summed in one order. No torch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.pipeline import Kind, Op, Slot
from dstrain.schedule.table import backward, forward, starts

# What a kind of op runs in its backward pass.
WORKS = {Kind.BACKWARD: (Pass.BACKWARD, Pass.WEIGHT), Kind.INPUT: (Pass.BACKWARD,), Kind.WEIGHT: (Pass.WEIGHT,)}


def expand(slots: Sequence[Slot], blocks: Sequence[int], *, overlap: bool) -> list[Action]:
    """The actions of a rank. `blocks`: MoE blocks of every stage, whose tokens travel; without `overlap`, one op runs
    after the other."""
    return [action for slot in merged(slots, blocks, overlap=overlap) for action in phases(slot, blocks, overlap)]


def merged(slots: Sequence[Slot], blocks: Sequence[int], *, overlap: bool) -> Iterator[Slot]:
    """The slots, those weight gradients that fill the transfers of the op before them in one slot with it."""
    following = [*slots[1:], ()]
    filled = False
    for slot, after in zip(slots, following, strict=True):
        if filled:
            filled = False
        elif overlap and _leaves_gaps(slot, blocks) and len(after) == 1 and after[0].kind is Kind.WEIGHT:
            yield slot + after
            filled = True
        else:
            yield slot


def _leaves_gaps(slot: Slot, blocks: Sequence[int]) -> bool:
    """Whether it has transfers, and no weight gradients of its own to hide them."""
    return len(slot) == 1 and slot[0].kind in (Kind.FORWARD, Kind.INPUT) and blocks[slot[0].stage] > 0


def _filled(op: Op, weight: Op, blocks: Sequence[int]) -> Iterator[Action]:
    """The phases of `op`, and under its transfers those of the weight gradients that come next, in equal shares."""
    host, rest = list(_plain(op, blocks[op.stage])), deque(_plain(weight, blocks[weight.stage]))
    gaps, places, done = 0, sum(starts(action, blocks[op.stage]) is not None for action in host), set()
    left_at = [len(rest) * (places - gap) // places for gap in range(places + 1)]
    for action in host:
        yield action
        done.add(action)
        if starts(action, blocks[op.stage]) is not None:
            gaps += 1
            while len(rest) > left_at[gaps] and _ready(rest[0], op, done):
                yield rest.popleft()
    yield from rest


def _ready(weight: Action, op: Op, done: set[Action]) -> bool:
    """Whether the input gradients that it belongs to are there; those of other micro-batches have long been."""
    own = weight.course == (op.stage, op.micro_batch)
    return not own or replace(weight, work=Pass.BACKWARD) in done


def phases(slot: Slot, blocks: Sequence[int], overlap: bool) -> Iterator[Action]:
    """The actions of one of the `merged` slots. They begin and end without transfers under way."""
    if slot[-1].kind is Kind.WEIGHT and len(slot) == 2:
        yield from _filled(*slot, blocks)
    # Where neither pass has a transfer, there is nothing to hide.
    elif len(slot) == 2 and overlap and any(blocks[op.stage] for op in slot):
        yield from pair(*slot, blocks)
    else:
        for op in slot:
            yield from _plain(op, blocks[op.stage])


def _plain(op: Op, blocks: int) -> Iterator[Action]:
    if op.kind is Kind.FORWARD:
        return forward(blocks, op.micro_batch, op.stage)
    return backward(blocks, op.micro_batch, op.stage, WORKS[op.kind])


def pair(ahead: Op, back: Op, blocks: Sequence[int]) -> Iterator[Action]:
    """The phases of a forward op `ahead` and a backward op `back`, each under the other's transfers."""

    def there(phase: Phase, block: int) -> Action:
        return Action(Pass.FORWARD, phase, block, ahead.micro_batch, ahead.stage)

    def home(phase: Phase, block: int) -> Iterator[Action]:
        return (Action(w, phase, block, back.micro_batch, back.stage) for w in WORKS[back.kind])

    last_there, last_home = blocks[ahead.stage], blocks[back.stage]
    yield from home(Phase.ATTEND, last_home)
    for n in range(max(last_there, last_home)):
        block = last_home - 1 - n
        if n == last_there:
            # The next stage waits for it.
            yield there(Phase.ATTEND, n)
        if block >= 0:
            yield from home(Phase.SHARED, block)
        if n < last_there:
            yield there(Phase.ATTEND, n)
            yield there(Phase.SHARED, n)
        if block >= 0:
            yield from home(Phase.EXPERTS, block)
        if n < last_there:
            yield there(Phase.EXPERTS, n)
        if block >= 0:
            yield from home(Phase.ATTEND, block)
    if last_there >= last_home:
        yield there(Phase.ATTEND, last_there)
