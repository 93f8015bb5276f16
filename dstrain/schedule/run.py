"""Runs a table: every action on a piece of graph of its own, so that micro-batches can interleave in both directions.

A piece begins and ends at `Cut`s. Forward, a cut hands over data without its graph; backward, the piece behind it
leaves the gradient in the cut, and the piece before it starts from there. The action that needs a transfer waits for
it, the action that has computed what travels starts it:

    F attend n    wait for combine n - 1 | stretch n | start dispatch n       F experts n    the same with dispatch n
    B attend n    wait for the gradient of dispatch n | stretch n backward, whose last act starts the gradient of
                  combine n - 1 | its weight gradients, unless they are left to W attend n

Of a pipeline, a rank runs the courses of its stages; what passes from stage to stage goes through `Edges`.

Gradients are bit by bit those of the whole graph, in whatever order the table runs: within a piece autograd keeps the
order of the whole graph, what comes out of a cut comes first as it does there, and precision/weight_gradients.py adds
up what pieces share. In the forward pass waiting lies between the spans of compute, in the backward pass inside them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dstrain.comm.trace import Trace
from dstrain.dispatch.contract import Handle
from dstrain.model.layer import Attended
from dstrain.precision.weight_gradients import Job, WeightGradients
from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.phases import PhasedBlock, PhasedLayer, PhasedWalk, Result, WalkEnd
from dstrain.schedule.table import Table, check

DIRECTIONS = {Pass.FORWARD: "forward", Pass.BACKWARD: "backward", Pass.WEIGHT: "weight"}


class Edges(Protocol):
    """Between stages. An edge has the number of the stage before it: forward the output of that stage passes it,
    backward the gradient of this output."""

    def send(self, work: Pass, edge: int, micro_batch: int, x: Tensor) -> None:
        """Starts; nobody else uses `x` from then on."""
        ...

    def take(self, work: Pass, edge: int, micro_batch: int) -> Tensor | None:
        """Waits; None before the first stage and behind the last one."""
        ...


class NoEdges:
    """Of a model in one stage."""

    def send(self, work: Pass, edge: int, micro_batch: int, x: Tensor) -> None:
        raise ValueError("a model in one stage has no output")

    def take(self, work: Pass, edge: int, micro_batch: int) -> Tensor | None:
        return None


# Begins a course from the output of the stage before, None in the first stage.
Start = Callable[[Tensor | None], PhasedWalk[Result]]


def run(
    table: Table, walks: Sequence[Callable[[], PhasedWalk[Result]]], trace: Trace, *, defer_weights: bool = True
) -> list[Result]:
    """Forward and backward over the micro-batches; what each walk returned, in their order.

    `walks[m]()` begins micro-batch m: `partial(model.walk, tokens, ...)`, or any generator as in schedule/phases.py.
    IllegalTable if an action is missing or out of place, before any is run. The rest is as in `run_stages`.
    """
    blocks = max(action.block for action in table)
    check(table, blocks, len(walks))
    starts: dict[tuple[int, int], Start[Result]] = {(0, m): partial(_whole, walk) for m, walk in enumerate(walks)}
    return list(run_stages(table, starts, (blocks,), NoEdges(), trace, defer_weights=defer_weights).values())


def _whole(walk: Callable[[], PhasedWalk[Result]], x: Tensor | None) -> PhasedWalk[Result]:
    return walk()


def run_stages(
    table: Table,
    starts: Mapping[tuple[int, int], Start[Result]],
    blocks: Sequence[int],
    edges: Edges,
    trace: Trace,
    *,
    defer_weights: bool = True,
) -> dict[tuple[int, int], Result]:
    """Forward and backward over this rank's courses; what each walk returned, by (stage, micro-batch).

    `table` has passed `check_courses`: once is enough, however often it runs. `starts`: how each course begins;
    `blocks`: MoE blocks of every stage of the model. Without `defer_weights`, weight gradients are computed in their
    places and the WEIGHT actions do nothing: better where nothing travels, since inputs and gradients need not be kept.
    Every parameter gets one gradient per course that uses it, in the order of the micro-batches. ValueError if the
    table is that of another model.
    """
    courses = {
        course: _Course(start, *course, blocks[course[0]], edges, defer_weights, trace)
        for course, start in starts.items()
    }
    before = [sum(blocks[:stage]) for stage in range(len(blocks))]
    for action in table:
        if action.work is Pass.WEIGHT and not defer_weights:
            continue
        where = {"stage": action.stage} if len(blocks) > 1 else {}
        direction, block = DIRECTIONS[action.work], before[action.stage] + action.block
        with trace.at(block=block, micro_batch=action.micro_batch, direction=direction, **where):
            courses[action.course].run(action)
    return {course: done.result for course, done in courses.items()}


class Cut:
    """A tensor between two pieces of graph. Entered at most once, so that it is clear when its gradient is complete."""

    def __init__(self, x: Tensor):
        self._x: Tensor | None = x.detach()
        self.edge: GradientEdge | None = get_gradient_edge(x) if x.requires_grad else None
        self.grad: Tensor | None = None

    def enter(self) -> Tensor:
        """The tensor at the beginning of a graph. It isn't kept here: only what the graph needs stays in memory."""
        x = self.leave()
        return x if self.edge is None else _Enter.apply(x, x.new_empty(0).requires_grad_(), self)

    def leave(self) -> Tensor:
        """The tensor itself, for a piece on another rank."""
        x, self._x = self._x, None
        if x is None:
            raise RuntimeError("a cut was entered twice")
        return x


class _Enter(torch.autograd.Function):
    """`anchor` makes autograd come past here; a leaf would keep its data as long as its gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.cut.grad = grad
        return None, None, None


def _differentiate(cuts: Sequence[Cut], roots: Sequence[Tensor] = ()) -> None:
    """Through the graph that ends at the cuts, from whose other side the gradients have come, and at roots."""
    ends = [(cut.edge, cut.grad) for cut in cuts if cut.edge is not None and cut.grad is not None]
    ends += [(get_gradient_edge(root), torch.ones_like(root)) for root in roots if root.requires_grad]
    if ends:
        edges, grads = zip(*ends, strict=True)
        torch.autograd.backward(edges, grads)


@dataclass
class _Piece:
    """The graph of one action, from its forward pass until its weight gradients are there."""

    ends: Sequence[Cut] = ()
    roots: Sequence[Tensor] = ()
    weights: list[Job] = field(default_factory=list)


@dataclass
class _Passage:
    """What the actions of a block hand on to each other in the forward pass."""

    layer: PhasedLayer
    attended: Attended
    stream: Cut
    normed: Cut
    # The transfer that is under way.
    handle: Handle[Any]
    token: Cut

    def wait(self) -> Any:
        self.handle.token = self.token.enter()
        return self.handle.wait()


@dataclass
class _Course(Generic[Result]):
    """A micro-batch on its way through a stage; `blocks` is what the table says."""

    start: Start[Result]
    stage: int
    micro_batch: int
    blocks: int
    edges: Edges
    defer_weights: bool
    trace: Trace
    result: Result = field(init=False)
    _walk: PhasedWalk[Result] | None = None
    # Where the stage begins and where it ends; None where the model does.
    _input: Cut | None = None
    _output: Cut | None = None
    _passage: _Passage | None = None
    _pieces: dict[tuple[Phase, int], _Piece] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._gradients = WeightGradients(defers=self.defer_weights)

    def run(self, action: Action) -> None:
        place = (action.phase, action.block)
        if action.work is Pass.FORWARD:
            with self._gradients.active(forward=True):
                self._pieces[place] = self._forward(*place)
        elif action.work is Pass.BACKWARD:
            if place == (Phase.ATTEND, self.blocks) and self._output is not None:
                # The piece holds it as long as it is needed.
                output, self._output = self._output, None
                output.grad = self.edges.take(Pass.BACKWARD, self.stage, self.micro_batch)
            self._backward(action.phase, self._pieces[place] if self.defer_weights else self._pieces.pop(place))
            if place == (Phase.ATTEND, 0):
                self._gradients.check_complete()
                self._send_back()
        else:
            self._weight(action.phase, self._pieces.pop(place))

    def _forward(self, phase: Phase, block: int) -> _Piece:
        if phase is Phase.ATTEND:
            return self._attend(block)
        if self._passage is None:
            raise ValueError(f"the table has {self.blocks} MoE blocks, the model {block}")
        return self._shared(self._passage) if phase is Phase.SHARED else self._experts(self._passage)

    def _attend(self, block: int) -> _Piece:
        x = self._arrive() if self._passage is None else self._joined(self._passage)
        with self.trace.computing("attend"):
            try:
                stop = self._advance(x)
            except StopIteration as end:
                self._walk = self._passage = None
                self.result = end.value.result
                return self._finish(end.value)
            if block == self.blocks:
                raise ValueError(f"the table has {self.blocks} MoE blocks, the model more")
            return self._depart(stop)

    def _arrive(self) -> Tensor | None:
        """The output of the stage before."""
        x = self.edges.take(Pass.FORWARD, self.stage - 1, self.micro_batch)
        if x is None:
            return None
        self._input = Cut(x.requires_grad_())
        return self._input.enter()

    def _advance(self, x: Tensor | None) -> PhasedBlock:
        if self._walk is None:
            self._walk = self.start(x)
            return next(self._walk)
        if x is None:
            raise RuntimeError("a walk has begun, and nothing has come home")
        return self._walk.send(x)

    def _finish(self, end: WalkEnd[Result]) -> _Piece:
        if end.output is None:
            return _Piece(roots=end.roots)
        self._output = Cut(end.output)
        self.edges.send(Pass.FORWARD, self.stage, self.micro_batch, self._output.leave())
        return _Piece((self._output,), end.roots)

    def _send_back(self) -> None:
        """The gradient of the stage's input."""
        if self._input is None:
            return
        if self._input.grad is None:
            raise RuntimeError(f"stage {self.stage} has left no gradient of its input")
        self.edges.send(Pass.BACKWARD, self.stage - 1, self.micro_batch, self._input.grad)
        self._input = None

    @staticmethod
    def _joined(passage: _Passage) -> Tensor:
        home_TD = passage.wait()
        stream_BTD = passage.stream.enter()
        return stream_BTD + home_TD.view_as(stream_BTD)

    def _depart(self, block: PhasedBlock) -> _Piece:
        attended, handle = block.attended, block.layer.dispatch(block.attended)
        stream, normed, token = Cut(attended.x_BTD), Cut(attended.normed_BTD), Cut(handle.token)
        self._passage = _Passage(block.layer, attended, stream, normed, handle, token)
        return _Piece((stream, normed, token), block.roots)

    def _shared(self, passage: _Passage) -> _Piece:
        attended = replace(passage.attended, x_BTD=passage.stream.enter(), normed_BTD=passage.normed.enter())
        with self.trace.computing("shared"):
            passage.stream = Cut(passage.layer.shared(attended))
        return _Piece((passage.stream,))

    def _experts(self, passage: _Passage) -> _Piece:
        arrived = passage.wait()
        with self.trace.computing("experts"):
            passage.handle = passage.layer.combine(passage.layer.experts(arrived), arrived)
            passage.token = Cut(passage.handle.token)
        return _Piece((passage.token,))

    def _backward(self, phase: Phase, piece: _Piece) -> None:
        with self._gradients.active(later=piece.weights), self.trace.computing(phase.value):
            _differentiate(piece.ends, piece.roots)
        piece.ends, piece.roots = (), ()

    def _weight(self, phase: Phase, piece: _Piece) -> None:
        piece.weights.reverse()
        with self.trace.computing(phase.value):
            while piece.weights:
                piece.weights.pop()()
