"""A good order for several micro-batches in flight, found by list scheduling and many tries. No torch.

The planner plays the machine of `simulate` forward: whenever the compute stream is free, it starts, among the actions
whose inputs are there, the one with the highest priority, or else the one whose input arrives first. The priority of an
action is the length of the longest chain of work that hangs on it, WEIGHT last; it is stretched and shaken at random a
few hundred times, and the shortest run wins. The result depends on the arguments alone, never on a clock.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.simulate import Costs, even_costs
from dstrain.schedule.table import computed_before, sender, sequential, starts

# Bounds the work of a plan: tries times actions.
EFFORT = 60_000


@lru_cache
def fixed(blocks: int, micro_batches: int, in_flight: int) -> tuple[Action, ...]:
    """The order for transfers as long as the compute: the hardest case, and good around it."""
    return tuple(planned(blocks, micro_batches, in_flight, even_costs(blocks)))


def planned(blocks: int, micro_batches: int, in_flight: int, costs: Costs, seed: int = 0) -> list[Action]:
    """The shortest order found with at most `in_flight` micro-batches between start of forward and end of backward."""
    if in_flight == 1 or blocks == 0 or micro_batches == 1:
        return sequential(blocks, micro_batches)
    work = _Work.of(blocks, micro_batches, in_flight, costs)
    generator = random.Random(seed)
    tails = work.tails_ms()
    best_ms, best = work.run(tails)
    for _ in range(EFFORT // len(tails)):
        noise = generator.choice((0.05, 0.2, 0.5))
        priorities = [tail * (1 + noise * generator.uniform(-1, 1)) for tail in tails]
        makespan_ms, order = work.run(priorities)
        if makespan_ms < best_ms:
            best_ms, best = makespan_ms, order
    return [work.actions[i] for i in best]


@dataclass(frozen=True)
class _Work:
    """The actions of a step as numbers: index into every list below."""

    actions: list[Action]
    compute_ms: list[float]
    # Of the transfer that the action starts; None: it starts none.
    transfer_ms: list[float | None]
    # The action whose transfer this one waits for, or -1.
    senders: list[int]
    # What must stand before it in the table, and what it must stand before.
    before: list[list[int]]
    after: list[list[int]]

    @staticmethod
    def of(blocks: int, micro_batches: int, in_flight: int, costs: Costs) -> "_Work":
        actions = sequential(blocks, micro_batches)
        index = {action: i for i, action in enumerate(actions)}
        before = [_before(action, blocks, in_flight, index) for action in actions]
        after: list[list[int]] = [[] for _ in actions]
        for i, needs in enumerate(before):
            for need in needs:
                after[need].append(i)
        transfers = [starts(action, blocks) for action in actions]
        sources = [sender(action, blocks) for action in actions]
        return _Work(
            actions,
            [costs.of(action) for action in actions],
            [None if transfer is None else costs.of(transfer) for transfer in transfers],
            [-1 if source is None else index[source] for source in sources],
            before,
            after,
        )

    def tails_ms(self) -> list[float]:
        """From the start of each action to the end of the longest chain behind it; WEIGHT is worth nothing."""
        tails = [0.0] * len(self.actions)
        waiting = [len(after) for after in self.after]
        free = [i for i, count in enumerate(waiting) if not count]
        while free:
            i = free.pop()
            behind = (tails[j] + (self.transfer_ms[i] or 0.0 if self.senders[j] == i else 0.0) for j in self.after[i])
            if self.actions[i].work is not Pass.WEIGHT:
                tails[i] = self.compute_ms[i] + max(behind, default=0.0)
            for j in self.before[i]:
                waiting[j] -= 1
                if not waiting[j]:
                    free.append(j)
        return tails

    def run(self, priorities: list[float]) -> tuple[float, list[int]]:
        """Makespan and order."""
        missing = [len(before) for before in self.before]
        ready = [i for i, count in enumerate(missing) if not count]
        input_ms = [0.0] * len(missing)
        now_ms = link_ms = 0.0
        order = []
        while ready:
            here = [i for i in ready if input_ms[i] <= now_ms]
            i = max(here, key=priorities.__getitem__) if here else min(ready, key=input_ms.__getitem__)
            ready.remove(i)
            order.append(i)
            now_ms = max(now_ms, input_ms[i]) + self.compute_ms[i]
            transfer_ms = self.transfer_ms[i]
            if transfer_ms is not None:
                link_ms = max(link_ms, now_ms) + transfer_ms
            for j in self.after[i]:
                missing[j] -= 1
                if self.senders[j] == i:
                    input_ms[j] = link_ms
                if not missing[j]:
                    ready.append(j)
        return now_ms, order


def _before(action: Action, blocks: int, in_flight: int, index: dict[Action, int]) -> list[int]:
    """What must stand before an action: its inputs, the same of the micro-batch before it, and the end of the backward
    pass of the micro-batch whose place it takes."""
    work, phase, block, micro_batch = action.work, action.phase, action.block, action.micro_batch
    needs = [computed_before(action, blocks), sender(action, blocks)]
    first = phase is Phase.ATTEND and block == 0
    if micro_batch and (work is not Pass.FORWARD or first):
        needs.append(Action(work, phase, block, micro_batch - 1))
    if work is Pass.FORWARD and first and micro_batch >= in_flight:
        needs.append(Action(Pass.BACKWARD, phase, block, micro_batch - in_flight))
    return [index[need] for need in needs if need is not None]
