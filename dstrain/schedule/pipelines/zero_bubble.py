"""Zero-bubble schedules (Qi et al., arXiv 2401.10241): weight gradients fill gaps, since nobody waits for them.

Both hold as much as 1F1B: an activation whose backward pass is over gives its room to a weight gradient put off.
"""

from dstrain.schedule.pipeline import Layout, Pipeline
from dstrain.schedule.pipelines.line import Line


def zb_1p(ranks: int, micro_batches: int) -> Pipeline:
    """1F1B in which rank p stays p weight gradients behind: it does them at the end, while others still wait."""
    lines = []
    for rank in range(ranks):
        line = Line([rank], [0])
        warm_up = min(ranks - 1 - rank, micro_batches)
        for _ in range(warm_up):
            line.forward(0)
        for i in range(micro_batches):
            if warm_up + i < micro_batches:
                line.forward(0)
            line.input(0)
            if i >= rank:
                line.weight()
        line.remaining_weights()
        lines.append(tuple(line.slots))
    return Pipeline("zb_1p", Layout.looped(ranks, 1), micro_batches, tuple(lines))


def zb_v(ranks: int, micro_batches: int) -> Pipeline:
    """Stages lie in a V, so the gradient starts on the rank where micro-batches enter (arXiv 2405.15362).

    Without bubbles but the triangles at start and end where forward, input gradient and weight gradient of a stage take
    equal times. The order needs 2 P - 1 micro-batches; if there are fewer, the ops of those missing are left out.
    """
    full = max(micro_batches, 2 * ranks - 1)
    layout = Layout.folded(ranks)
    lines = []
    for rank, stages in enumerate(layout.held):
        line = Line(stages, [0, 0])
        _v(line, rank, ranks - rank, full)
        lines.append(tuple(slot for slot in line.slots if slot[0].micro_batch < micro_batches))
    return Pipeline("zb_v", layout, micro_batches, tuple(lines))


def _v(line: Line, before: int, left: int, micro_batches: int) -> None:
    """A rank with `before` ranks above it in the V; `left` counts those below it and itself."""
    for _ in range(2 * left - 1):
        line.forward(0)
    for _ in range(before):
        line.forward(1)
        line.forward(0)
    for _ in range(left):
        line.forward(1)
        line.input(1)
        line.weight()
    for i in range(before + left, micro_batches):
        # The first leg is ahead by the micro-batches on the way down, and comes to its end earlier.
        if i < micro_batches - left + 1:
            line.forward(0)
        line.input(0)
        line.weight()
        line.forward(1)
        line.input(1)
        line.weight()
    for _ in range(before):
        line.input(0)
        line.input(1)
    for _ in range(left):
        line.input(0)
        line.weight()
    line.remaining_weights()
