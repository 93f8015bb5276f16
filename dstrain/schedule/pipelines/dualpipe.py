"""DualPipe and DualPipeV (DeepSeek-V3, arXiv 2412.19437, section 3.2.1; order as in the published DualPipe).

Two streams of micro-batches pass each rank in opposite directions, and forward of one overlaps with backward of the
other. In DualPipe they enter at both ends, and each stage is held by two ranks, whose gradients must be summed. In
DualPipeV the second stream is the first on its way back, and the ranks are the first half of DualPipe's.
"""

from dstrain.schedule.pipeline import Layout, Pipeline
from dstrain.schedule.pipelines.line import Line


def dualpipe(ranks: int, micro_batches: int) -> Pipeline:
    """Micro-batches of the first half enter at rank 0, those of the second half at the last rank.

    `ranks` is even; `micro_batches` is even and at least 2 `ranks`.
    """
    layout = Layout.bidirectional(ranks)
    half = micro_batches // 2
    lines = []
    for rank in range(ranks):
        # Leg 0 is the stream that enters at the nearer end.
        depth, first = (rank, [0, half]) if rank < ranks // 2 else (ranks - 1 - rank, [half, 0])
        line = Line((depth, ranks - 1 - depth), first)
        _write(line, depth, ranks // 2, half)
        lines.append(tuple(line.slots))
    return Pipeline("dualpipe", layout, micro_batches, tuple(lines))


def dualpipev(ranks: int, micro_batches: int) -> Pipeline:
    """`micro_batches` is at least 2 `ranks`."""
    layout = Layout.folded(ranks)
    lines = []
    for rank, stages in enumerate(layout.held):
        line = Line(stages, [0, 0])
        _write(line, rank, ranks, micro_batches)
        lines.append(tuple(line.slots))
    return Pipeline("dualpipev", layout, micro_batches, tuple(lines))


def _write(line: Line, depth: int, height: int, micro_batches: int) -> None:
    """A rank `depth` ranks from where leg 0 enters, of `height` ranks until leg 0 meets leg 1; both have as many
    micro-batches."""
    inner, outer = depth + 1, height - 1 - depth
    for _ in range(2 * outer):
        line.forward(0)
    for _ in range(inner):
        line.forward(0)
        line.forward(1)
    for _ in range(outer):
        line.input(1)
        line.weight()
        line.forward(1)
    for i in range(micro_batches - 2 * height + inner):
        if i == 0 and outer == 0:
            # Where the legs meet, the first gradient would have to wait for a whole pair.
            line.forward(0)
            line.backward(1)
        else:
            line.pair(0, 1)
        line.pair(1, 0)
    for _ in range(outer):
        line.backward(1)
        line.pair(1, 0)
    _drain(line, inner, outer)


def _drain(line: Line, inner: int, outer: int) -> None:
    """Backward passes of what is in flight; the later half puts its weight gradients off, to let gradients go on."""
    for i in range(2 * inner):
        if i < inner:
            line.backward(1 - i % 2)
        else:
            line.input(1 - i % 2)
    for _ in range(outer):
        line.weight()
        line.input(0)
    line.remaining_weights()
