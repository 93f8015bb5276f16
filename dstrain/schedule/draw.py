"""A played pipeline as a picture: a row for each rank, time to the right, folded into panels like a line of print.

Colour is the kind of work, numbers are micro-batches; the later stages of a rank are lighter. A pair is a box in two
halves, forward above and backward below. Other things that take time can be laid over the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dstrain.schedule.figures import Span
from dstrain.schedule.pipeline import Kind, Layout, Op

COLOURS = {Kind.FORWARD: "#3b6fb6", Kind.BACKWARD: "#2f8f5b", Kind.INPUT: "#8d6cc0", Kind.WEIGHT: "#e09a2d"}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "gradient of inputs",
    Kind.WEIGHT: "gradient of weights",
}
# What is idle shows through.
IDLE = "#eceff1"

DPI = 110
WIDTH_IN = 15.0
ROW_IN = 0.34
# Above the first panel: title and legend. Below each one: its times.
HEAD_IN = 0.85
FOOT_IN = 0.45
# What the shortest slot should measure, for a number of two digits.
SLOT_IN = 0.27
DIGIT_IN = 0.075
# Points between boxes, where they are wide enough for it.
EDGE = 0.7
# Share of a row above and below its boxes.
GAP = 0.05
# More rows than this are too many to look at: then panels grow longer and slots shorter.
MOST_ROWS = 200
# A later stage of a rank is mixed with this much white.
LIGHTER = 0.5


@dataclass(frozen=True)
class Mark:
    """Something else on a rank's row, between two heights of it: 0 is its upper edge, 1 the lower one."""

    rank: int
    start_ms: float
    end_ms: float
    style: "Style"
    upper: float = GAP
    lower: float = 1 - GAP


@dataclass(frozen=True)
class Style:
    label: str
    colour: str
    # Of matplotlib; with one, what is below shows through.
    hatch: str = ""


def draw(
    layout: Layout,
    spans: Sequence[Sequence[Span]],
    title: str,
    path: Path,
    software: str,
    marks: Sequence[Mark] = (),
    most_rows: int = MOST_ROWS,
) -> None:
    """Writes a PNG that carries `software` in its metadata. OSError where it can't be written."""
    end_ms = max([rank[-1].end_ms for rank in spans] + [mark.end_ms for mark in marks])
    panels, panel_ms = _panels(spans, end_ms, most_rows)
    height_in = HEAD_IN + panels * (len(spans) * ROW_IN + FOOT_IN)
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI)
    axes = np.atleast_1d(figure.subplots(panels, 1))
    figure.subplots_adjust(
        left=0.75 / WIDTH_IN,
        right=1 - 0.25 / WIDTH_IN,
        top=1 - HEAD_IN / height_in,
        bottom=FOOT_IN / height_in,
        hspace=FOOT_IN / (len(spans) * ROW_IN),
    )
    for number, ax in enumerate(axes):
        start_ms, stop_ms = number * panel_ms, min((number + 1) * panel_ms, end_ms)
        _panel(ax, layout, spans, start_ms, stop_ms, panel_ms)
        _lay_over(ax, marks, start_ms, stop_ms)
    figure.text(0.75 / WIDTH_IN, 1 - 0.25 / height_in, title, fontsize=11, va="center")
    _legend(figure, layout, spans, marks, height_in)
    figure.savefig(path, metadata={"Software": software, "Title": title})


def _panels(spans: Sequence[Sequence[Span]], end_ms: float, most_rows: int) -> tuple[int, float]:
    """How many, and the time of each."""
    shortest_ms = min(span.end_ms - span.start_ms for rank in spans for span in rank)
    wanted = ceil(end_ms * SLOT_IN / shortest_ms / (WIDTH_IN - 1))
    panels = max(1, min(wanted, most_rows // len(spans)))
    # Whole fives of slots, so that panels begin at round times.
    length_ms = 5 * shortest_ms if panels > 1 else shortest_ms
    panel_ms = ceil(end_ms / panels / length_ms) * length_ms
    return ceil(end_ms / panel_ms), panel_ms


def _panel(
    ax: Axes, layout: Layout, spans: Sequence[Sequence[Span]], start_ms: float, end_ms: float, panel_ms: float
) -> None:
    """The slots between two times, on an axis of `panel_ms`."""
    corners, colours = [], []
    in_per_ms = (WIDTH_IN - 1) / panel_ms
    for rank, own in enumerate(spans):
        corners.append(_box(start_ms, end_ms, rank + GAP, rank + 1 - GAP))
        colours.append(to_rgb(IDLE))
        for span in own:
            begin_ms, stop_ms = max(span.start_ms, start_ms), min(span.end_ms, end_ms)
            for op, upper, lower in _halves(span, rank) if begin_ms < stop_ms else ():
                corners.append(_box(begin_ms, stop_ms, upper, lower))
                colours.append(colour(op, layout.held[rank]))
                if (stop_ms - begin_ms) * in_per_ms > len(str(op.micro_batch)) * DIGIT_IN:
                    ink = "white" if colours[-1] == to_rgb(COLOURS[op.kind]) else "black"
                    x, y, style = (begin_ms + stop_ms) / 2, (upper + lower) / 2, "center_baseline"
                    ax.text(x, y, str(op.micro_batch), ha="center", va=style, color=ink, fontsize=7)
    shortest_in = min(span.end_ms - span.start_ms for span in spans[0]) * in_per_ms
    ax.add_collection(
        PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=min(EDGE, 3 * shortest_in))
    )
    ax.set_xlim(start_ms, start_ms + panel_ms)
    ax.set_ylim(len(spans), 0)
    ax.set_yticks([rank + 0.5 for rank in range(len(spans))], [f"rank {rank}" for rank in range(len(spans))])
    ax.tick_params(labelsize=8, length=0)
    ax.set_frame_on(False)


def _lay_over(ax: Axes, marks: Sequence[Mark], start_ms: float, end_ms: float) -> None:
    """The part of marks between two times; those of one style are drawn together."""
    for style in dict.fromkeys(mark.style for mark in marks):
        boxes = [
            _box(max(mark.start_ms, start_ms), min(mark.end_ms, end_ms), mark.rank + mark.upper, mark.rank + mark.lower)
            for mark in marks
            if mark.style == style and mark.start_ms < end_ms and mark.end_ms > start_ms
        ]
        faces, edges = ("none", style.colour) if style.hatch else (style.colour, "none")
        laid = PolyCollection(boxes, facecolors=faces, edgecolors=edges, linewidths=0, hatch=style.hatch or None)
        ax.add_collection(laid)


def _patch(style: Style) -> Patch:
    if style.hatch:
        return Patch(facecolor=IDLE, edgecolor=style.colour, hatch=style.hatch, linewidth=0, label=style.label)
    return Patch(color=style.colour, label=style.label)


def _halves(span: Span, rank: int) -> list[tuple[Op, float, float]]:
    """The ops of a slot with the heights between which each is drawn."""
    share = (1 - 2 * GAP) / len(span.slot)
    return [(op, rank + GAP + place * share, rank + GAP + (place + 1) * share) for place, op in enumerate(span.slot)]


def _box(start_ms: float, end_ms: float, upper: float, lower: float) -> list[tuple[float, float]]:
    return [(start_ms, upper), (end_ms, upper), (end_ms, lower), (start_ms, lower)]


def colour(op: Op, held: tuple[int, ...]) -> tuple[float, float, float]:
    """Of the kind, lighter for every later stage of a rank."""
    share = LIGHTER * held.index(op.stage) / max(1, len(held) - 1)
    red, green, blue = ((1 - share) * value + share for value in to_rgb(COLOURS[op.kind]))
    return red, green, blue


def _legend(
    figure: Figure, layout: Layout, spans: Sequence[Sequence[Span]], marks: Sequence[Mark], height_in: float
) -> None:
    used = {op.kind for rank in spans for span in rank for op in span.slot}
    patches = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in Kind if kind in used]
    if len(layout.held[0]) > 1:
        patches.append(Patch(color=colour(Op(Kind.FORWARD, 1, 0), (0, 1)), label="lighter: a later stage of the rank"))
    patches.append(Patch(color=IDLE, label="idle"))
    patches += [_patch(style) for style in dict.fromkeys(mark.style for mark in marks)]
    place = (0.65 / WIDTH_IN, 1 - 0.55 / height_in)
    # Nine entries fill the width.
    compact = {"handletextpad": 0.5, "columnspacing": 1.3, "frameon": False}
    figure.legend(handles=patches, loc="center left", bbox_to_anchor=place, ncols=len(patches), fontsize=8.5, **compact)
