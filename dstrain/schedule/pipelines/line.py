"""A rank's slots while they are written: names of passes and legs in, numbered ops out."""

from collections import deque
from collections.abc import Sequence

from dstrain.schedule.pipeline import Kind, Op, Slot


class Line:
    """The slots of a rank with one stage or more, here called legs of the way through the model: 0, 1, ...

    Each leg sees its micro-batches in ascending order in each pass. Weight gradients put off are done oldest first,
    whichever leg they are of.
    """

    def __init__(self, stages: Sequence[int], first: Sequence[int]):
        """`stages`: the stage of each leg. `first`: the micro-batch with which each leg begins."""
        self.slots: list[Slot] = []
        self._stages = stages
        self._forward, self._backward = list(first), list(first)
        self._put_off: deque[Op] = deque()

    def forward(self, leg: int) -> None:
        self.slots.append((self._next_forward(leg),))

    def backward(self, leg: int) -> None:
        self.slots.append((self._next_backward(leg, Kind.BACKWARD),))

    def pair(self, forward_leg: int, backward_leg: int) -> None:
        self.slots.append((self._next_forward(forward_leg), self._next_backward(backward_leg, Kind.BACKWARD)))

    def input(self, leg: int) -> None:
        op = self._next_backward(leg, Kind.INPUT)
        self.slots.append((op,))
        self._put_off.append(Op(Kind.WEIGHT, op.stage, op.micro_batch))

    def weight(self) -> None:
        self.slots.append((self._put_off.popleft(),))

    def remaining_weights(self) -> None:
        while self._put_off:
            self.weight()

    def _next_forward(self, leg: int) -> Op:
        op = Op(Kind.FORWARD, self._stages[leg], self._forward[leg])
        self._forward[leg] += 1
        return op

    def _next_backward(self, leg: int, kind: Kind) -> Op:
        op = Op(kind, self._stages[leg], self._backward[leg])
        self._backward[leg] += 1
        return op
