"""A good order for several micro-batches in flight: list scheduling, then simulated annealing. No torch.

The search is over the order of forward and backward actions; weight gradients fill the gaps in which compute would wait
for the link, oldest first. Every candidate is played on the machine of `simulate`:

1. list scheduling: whenever compute is free, start, among the actions whose inputs are there, the one with the longest
   chain of work behind it, or else the one whose input arrives first; once as it is and some times shaken at random;
2. annealing: move one action to another legal place; keep it if the step gets shorter, seldom if it gets longer;
3. of several limits to the weight gradients put off, the lowest that costs next to nothing when transfers take up to a
   fifth more or less time than planned.

A part of the model that has run forward is held until its weight gradient is done; no more parts are held at once than
`in_flight` micro-batches have, so putting off weight gradients does not raise the peak of memory. The result depends on
the arguments alone, never on a clock.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.simulate import Costs, even_costs
from dstrain.schedule.table import computed_before, sender, sequential, starts

# Limits of the search: orders tried in the first and second step, and actions played in all of them.
LISTED, ANNEALED, PLAYED = 60, 40_000, 3_000_000
# A weight gradient fills a gap that is at least this share of its length.
FILL = 0.2
# How far an action is moved at once.
REACH = 20
# The third step: step times compared, error of the transfers in each, and what a lower limit may cost.
SHAKEN, ERROR, FREE = 8, 0.2, 1.002


@lru_cache
def fixed(blocks: int, micro_batches: int, in_flight: int) -> tuple[Action, ...]:
    """The order for transfers as long as the compute: the hardest case, and good around it. It allows each transfer a
    latency of a twentieth of a block's forward pass."""
    return tuple(planned(blocks, micro_batches, in_flight, replace(even_costs(blocks), latency_ms=0.05)))


def planned(blocks: int, micro_batches: int, in_flight: int, costs: Costs, seed: int = 0) -> list[Action]:
    """The shortest order found with at most `in_flight` micro-batches between start of forward and end of backward."""
    work = _Work.of(blocks, micro_batches, in_flight, costs)
    random = Random(seed)
    order = _annealed(work, _listed(work, random), random)
    return [work.actions[i] for i in _unburdened(work, order, random)]


@dataclass(frozen=True)
class _Work:
    """The actions of a step as numbers, in the sequential order; they index every list below."""

    actions: list[Action]
    compute_ms: list[float]
    # Of the transfer that the action starts, or None.
    transfer_ms: list[float | None]
    latency_ms: float
    # The action whose transfer this one waits for, or -1.
    senders: list[int]
    # The weight gradient that a backward action leaves behind, or -1.
    weights: list[int]
    # What must stand before a forward or backward action, and what it must stand before.
    before: list[list[int]]
    after: list[list[int]]
    in_flight: int
    # Actions of a micro-batch: a third of them are forward, one for each part of the model.
    size: int

    @staticmethod
    def of(blocks: int, micro_batches: int, in_flight: int, costs: Costs) -> "_Work":
        actions = sequential(blocks, micro_batches)
        numbers = {action: i for i, action in enumerate(actions)}
        transfers = [starts(action, blocks) for action in actions]
        sources = [sender(action, blocks) for action in actions]
        before = [[numbers[need] for need in _before(action, blocks, in_flight)] for action in actions]
        after: list[list[int]] = [[] for _ in actions]
        for i, needs in enumerate(before):
            for need in needs:
                after[need].append(i)
        return _Work(
            actions,
            compute_ms=[costs.of(action) for action in actions],
            transfer_ms=[None if transfer is None else costs.of(transfer) for transfer in transfers],
            latency_ms=costs.latency_ms,
            senders=[-1 if source is None else numbers[source] for source in sources],
            weights=[numbers[replace(a, work=Pass.WEIGHT)] if a.work is Pass.BACKWARD else -1 for a in actions],
            before=before,
            after=after,
            in_flight=min(in_flight, micro_batches),
            size=len(actions) // micro_batches,
        )

    @property
    def most_held(self) -> int:
        """Parts of the model held at once."""
        return self.in_flight * self.size // 3

    def bound_ms(self) -> float:
        return max(sum(self.compute_ms), sum(filter(None, self.transfer_ms)))

    def searched(self) -> list[int]:
        return [i for i, action in enumerate(self.actions) if action.work is not Pass.WEIGHT]

    def chains_ms(self) -> list[float]:
        """From the start of each action to the end of the longest chain behind it, without weight gradients."""
        chains_ms = [0.0] * len(self.actions)
        for i in reversed(self.searched()):
            travel_ms = (self.transfer_ms[i] or 0.0) + self.latency_ms
            behind_ms = (chains_ms[j] + (travel_ms if self.senders[j] == i else 0.0) for j in self.after[i])
            chains_ms[i] = self.compute_ms[i] + max(behind_ms, default=0.0)
        return chains_ms


def _before(action: Action, blocks: int, in_flight: int) -> list[Action]:
    """What must stand before an action: its inputs, the same of the micro-batch before it, and the end of the backward
    pass of the micro-batch whose place it takes. Weight gradients are placed by `_play`."""
    work, phase, block, micro_batch = action.work, action.phase, action.block, action.micro_batch
    if work is Pass.WEIGHT:
        return []
    needs = [computed_before(action, blocks), sender(action, blocks)]
    first = phase is Phase.ATTEND and block == 0
    if micro_batch and (work is Pass.BACKWARD or first):
        needs.append(Action(work, phase, block, micro_batch - 1))
    if work is Pass.FORWARD and first and micro_batch >= in_flight:
        needs.append(Action(Pass.BACKWARD, phase, block, micro_batch - in_flight))
    return [need for need in needs if need is not None]


def _play(work: _Work, order: list[int], most_pending: int = 1 << 30) -> tuple[float, list[int]]:
    """Makespan, and the table: `order` with weight gradients put in where there is a gap or a limit demands it."""
    compute_ms, transfer_ms, latency_ms, senders = work.compute_ms, work.transfer_ms, work.latency_ms, work.senders
    weights, most_held = work.weights, work.most_held
    arrival_ms = [0.0] * len(weights)
    table: list[int] = []
    pending: list[int] = []
    now_ms = link_ms = 0.0
    done = held = 0
    for i in order:
        source = senders[i]
        input_ms = arrival_ms[source] if source >= 0 else 0.0
        room = most_held - (weights[i] < 0)
        while done < len(pending):
            weight_ms = compute_ms[pending[done]]
            if held <= room and len(pending) - done <= most_pending and input_ms <= now_ms + FILL * weight_ms:
                break
            now_ms += weight_ms
            table.append(pending[done])
            done += 1
            held -= 1
        now_ms = (input_ms if input_ms > now_ms else now_ms) + compute_ms[i]
        table.append(i)
        travel_ms = transfer_ms[i]
        if travel_ms is not None:
            link_ms = (now_ms if now_ms > link_ms else link_ms) + travel_ms
            arrival_ms[i] = link_ms + latency_ms
        if weights[i] >= 0:
            pending.append(weights[i])
        else:
            held += 1
    return now_ms + sum(compute_ms[i] for i in pending[done:]), table + pending[done:]


def _listed(work: _Work, random: Random) -> list[int]:
    """The best of a few list schedules, some with fewer micro-batches in flight than allowed: more are not always
    better for an order that looks no further than the next action."""
    chains_ms, limits = work.chains_ms(), range(min(2, work.in_flight), work.in_flight + 1)
    candidates = [_list(work, chains_ms, limit) for limit in limits]
    for _ in range(min(LISTED, PLAYED // len(chains_ms) // 20)):
        shake = random.choice((0.05, 0.2, 0.5))
        priorities = [chain_ms * (1 + shake * random.uniform(-1, 1)) for chain_ms in chains_ms]
        candidates.append(_list(work, priorities, random.choice(limits)))
    return min(candidates, key=lambda order: _play(work, order)[0])


def _list(work: _Work, priorities: list[float], in_flight: int) -> list[int]:
    missing = [len(needs) for needs in work.before]
    ready = [i for i in work.searched() if not missing[i]]
    input_ms = [0.0] * len(missing)
    now_ms = link_ms = 0.0
    order: list[int] = []
    live = 0
    while ready:
        # The first action of a micro-batch waits until it may be in flight.
        allowed = [i for i in ready if live < in_flight or i % work.size]
        here = [i for i in allowed if input_ms[i] <= now_ms]
        i = max(here, key=priorities.__getitem__) if here else min(allowed, key=input_ms.__getitem__)
        ready.remove(i)
        order.append(i)
        # The last two of a micro-batch are the end of its backward pass and a weight gradient.
        live += (i % work.size == 0) - (i % work.size == work.size - 2)
        now_ms = max(now_ms, input_ms[i]) + work.compute_ms[i]
        link_ms = max(link_ms, now_ms) + (work.transfer_ms[i] or 0.0)
        for j in work.after[i]:
            missing[j] -= 1
            if work.senders[j] == i:
                input_ms[j] = link_ms + work.latency_ms
            if not missing[j]:
                ready.append(j)
    return order


def _annealed(work: _Work, order: list[int], random: Random) -> list[int]:
    """Simulated annealing (Kirkpatrick et al. 1983) from a given order; a very long order has no time for it."""
    places = [0] * len(work.actions)
    for place, i in enumerate(order):
        places[i] = place
    tries = min(ANNEALED, PLAYED // len(order))
    if tries < len(order):
        return order
    hot_ms = sum(work.compute_ms) / len(work.compute_ms)
    now_ms = best_ms = _play(work, order)[0]
    best, bound_ms = order, work.bound_ms()
    for attempt in range(tries):
        if best_ms <= bound_ms * 1.0001:
            break
        move = _move(work, order, places, random)
        if move is None:
            continue
        start, end = move
        moved = order.copy()
        moved.insert(end, moved.pop(start))
        moved_ms = _play(work, moved)[0]
        temperature_ms = hot_ms * 30 ** (-attempt / tries)
        if moved_ms <= now_ms or random.random() < math.exp((now_ms - moved_ms) / temperature_ms):
            order, now_ms = moved, moved_ms
            for place in range(min(start, end), max(start, end) + 1):
                places[order[place]] = place
            if now_ms < best_ms:
                best, best_ms = order, now_ms
    return best


def _move(work: _Work, order: list[int], places: list[int], random: Random) -> tuple[int, int] | None:
    """A random action's place and another one to which it may move, or None if it may not move at all."""
    start = int(random.random() * len(order))
    i = order[start]
    low = max(start - REACH, 0, *(places[j] + 1 for j in work.before[i]))
    high = min(start + REACH, len(order) - 1, *(places[j] - 1 for j in work.after[i]))
    if low >= high:
        return None
    end = low + int(random.random() * (high - low))
    return start, end + (end >= start)


def _unburdened(work: _Work, order: list[int], random: Random) -> list[int]:
    """The table with the lowest limit of pending weight gradients whose mean step, over shaken transfers, is nearly as
    short as the best."""
    shaken = [_shaken(work, random) for _ in range(SHAKEN)]
    limits = sorted({min(2**n, work.most_held) for n in range(1, work.most_held.bit_length() + 1)})
    tables = [_play(work, order, limit)[1] for limit in limits]
    means_ms = [sum(_play(other, table)[0] for other in shaken) for table in tables]
    return next(table for table, mean_ms in zip(tables, means_ms, strict=True) if mean_ms <= FREE * min(means_ms))


def _shaken(work: _Work, random: Random) -> _Work:
    """The same work with other transfer times: all longer or shorter, and each by itself. The table is given, so no
    weight gradient is left to place."""

    def factor() -> float:
        return 1 + ERROR * random.uniform(-1, 1)

    common = factor()
    transfer_ms = [None if time_ms is None else time_ms * common * factor() for time_ms in work.transfer_ms]
    return replace(work, transfer_ms=transfer_ms, weights=[-1] * len(work.weights))
