"""A played pipeline as text: a row for each rank, columns in time, folded like a line of print.

time     0    1    2    3    4    5
rank 0   F0.0 F0.1           B0.0-----
rank 1        F1.0 B1.0----- F1.1           kind, stage . micro-batch; what is blank is idle
"""

from collections.abc import Iterator, Sequence
from math import ceil

from dstrain.schedule.figures import Figures, Span
from dstrain.schedule.pipeline import Pipeline

# A slot so short that its name does not fit is cut; the longest one gets at most so many characters.
MOST_CHARACTERS = 60


def blocks(spans: Sequence[Sequence[Span]], width: int | None = None) -> Iterator[list[str]]:
    """Stretches of time, each as the lines of all ranks, at most `width` wide; None: one stretch."""
    tick_ms = min(span.end_ms - span.start_ms for rank in spans for span in rank)
    cell = _cell(spans, tick_ms)
    # Sums of times are a little off.
    length = ceil(max(rank[-1].end_ms for rank in spans) / tick_ms * cell - 1e-6)
    margin = len(f"rank {len(spans) - 1}") + 2
    fold = length if width is None else max(cell, (width - margin) // cell * cell)
    rows = [("time", _times(length, cell, tick_ms))]
    rows += [(f"rank {rank}", _row(own, length, fold, cell / tick_ms)) for rank, own in enumerate(spans)]
    for start in range(0, length, fold):
        yield [f"{name:<{margin}}{row[start : start + fold]}".rstrip() for name, row in rows]


def _cell(spans: Sequence[Sequence[Span]], tick_ms: float) -> int:
    """Characters for the time of the shortest slot, so that names fit into their slots with a gap behind them."""
    every = [span for rank in spans for span in rank]
    longest_ms = max(span.end_ms - span.start_ms for span in every)
    need = max((len(name_of(span)) + 1) * tick_ms / (span.end_ms - span.start_ms) for span in every)
    return max(1, min(ceil(need), int(MOST_CHARACTERS * tick_ms / longest_ms)))


def name_of(span: Span) -> str:
    return "&".join(map(str, span.slot))


def _row(spans: Sequence[Span], length: int, fold: int, per_ms: float) -> str:
    row = [" "] * length
    for span in spans:
        start = round(span.start_ms * per_ms)
        stop = max(start, round(span.end_ms * per_ms) - 1)
        name = name_of(span)[: stop - start]
        row[start:stop] = "-" * (stop - start)
        # A name that the fold would cut stands behind it, if there is room.
        behind = (start // fold + 1) * fold
        at = behind if start + len(name) > behind and behind + len(name) <= stop else start
        row[at : at + len(name)] = name
    return "".join(row)


def _times(length: int, cell: int, tick_ms: float) -> str:
    """Times above the columns where they begin, with room between them."""
    names = [f"{tick * tick_ms:.4g}" for tick in range(ceil(length / cell))]
    every = max(map(len, names)) // cell + 1
    return "".join(f"{name:<{cell * every}}" for name in names[::every]).rstrip()


def figures_table(pipeline: Pipeline, played: Figures) -> list[str]:
    """A line of figures for each rank."""
    lines = [f"{'rank':<6}{'stages':<12}{'idle':>10}{'live':>13}{'pending':>9}{'sent':>6}"]
    for rank, held in enumerate(pipeline.layout.held):
        idle_ms = played.bubble_ms[rank]
        lines.append(
            f"{rank:<6}{' '.join(map(str, held)):<12}{idle_ms:>10.4g}{idle_ms / played.makespan_ms:>7.1%}"
            f"{played.peak_live[rank]:>6}{played.peak_pending[rank]:>9}{played.messages[rank]:>6}"
        )
    return lines


def summary(pipeline: Pipeline, played: Figures) -> list[str]:
    """The figures of the whole, and what the columns of `figures_table` mean."""
    copies = "once" if played.copies == 1 else f"{played.copies} times"
    return [
        f"makespan {played.makespan_ms:g}; ranks are idle for {played.bubble_share:.1%} of it; every parameter is held "
        + copies,
        f"live: most activations at once, each of a stage (one of {pipeline.layout.num_stages}) and micro-batch",
        "pending: most weight gradients put off at once; sent: outputs and gradients that leave for other ranks",
    ]
