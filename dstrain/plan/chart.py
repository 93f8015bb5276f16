"""Charts of a plan as SVG within a page: a stacked bar, memory by rank, a schedule.

What has one colour is one path, so that a browser need not hold thousands of boxes. Text and lines take the colours of
the page (html.py).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from dstrain.plan.simulation import Played, RankPlay, Run
from dstrain.schedule.pipeline import Kind

# Of parts, in their order; legible on light and on dark.
PALETTE = (
    "#3b6fb6",
    "#e09a2d",
    "#2f8f5b",
    "#8d6cc0",
    "#c4554d",
    "#3a9c9c",
    "#a1793f",
    "#7d8794",
    "#c56a9b",
    "#6b8e23",
    "#4f5fb0",
)
# Of the schedule, by class: those of schedule/draw.py. A later stage of a rank is paler.
COLOURS = {
    "forward": "#3b6fb6",
    "backward": "#2f8f5b",
    "input": "#8d6cc0",
    "weight": "#e09a2d",
    "reduce": "#455a64",
    "update": "#b0413e",
    "gather": "#90a4ae",
}
PASSES = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.INPUT: "input", Kind.WEIGHT: "weight"}
NAMES = {
    "forward": "forward",
    "backward": "backward",
    "input": "gradient of inputs",
    "weight": "gradient of weights",
    "waits": "waits for a transfer (at the end of a slot, all of it)",
    "reduce": "gradients to their owners",
    "update": "update",
    "gather": "weights that the next step waits for",
}
STYLE = (
    "".join(f".{name}{{fill:{colour};background:{colour}}}" for name, colour in COLOURS.items())
    + ".later{opacity:.55}.idle{fill:var(--idle);background:var(--idle)}.waits{fill:url(#waits);background:"
    "repeating-linear-gradient(45deg,#c62828 0 2px,transparent 2px 5px)}"
    "svg text{fill:var(--ink);font-size:12px}svg .tick{fill:var(--faint);font-size:11px}"
    ".capacity{stroke:var(--ink);stroke-dasharray:4 3}.page{stroke:var(--card)}"
)
HATCH = (
    '<defs><pattern id="waits" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="1.8" height="5" fill="#c62828"/></pattern></defs>'
)

# Units of the drawing; a page shows it as wide as it is.
WIDTH, LEFT, RIGHT = 1060.0, 60.0, 12.0
BAR, ROW, GAP, FOOT = 30.0, 22.0, 4.0, 22.0


def bar(parts: Sequence[float]) -> str:
    """Parts of a whole, in the colours of PALETTE."""
    total = sum(parts)
    boxes = _stacked(parts, WIDTH / total, 0.0, 0.0, BAR)
    return _svg(BAR, "".join(boxes), "parts of a whole")


def memory_chart(rows: Sequence[tuple[str, Sequence[float]]], capacity_gib: float) -> str:
    """`rows`: ranks in words, with the GiB of each part. A dashed line is what a device has; 0: unknown."""
    longest_gib = max([sum(parts) for _, parts in rows] + [capacity_gib])
    # Room for the figure behind the longest bar.
    scale = (WIDTH - LEFT - RIGHT - 70) / longest_gib
    content = []
    for number, (name, parts) in enumerate(rows):
        top = number * (ROW + GAP)
        content.append(_text(LEFT - 8, top + 15, name, "end"))
        content += _stacked(parts, scale, LEFT, top, ROW)
        content.append(_text(LEFT + sum(parts) * scale + 6, top + 15, f"{sum(parts):.1f}", "start"))
    height = len(rows) * (ROW + GAP)
    if capacity_gib:
        x = LEFT + capacity_gib * scale
        content.append(f'<path class="capacity" d="M{x:.1f} 0V{height:.1f}"/>')
        content.append(_text(x, height + 14, f"{capacity_gib:.1f} GiB", "middle", "tick"))
    return _svg(height + FOOT, "".join(content), "memory by rank in GiB")


def _stacked(parts: Sequence[float], scale: float, left: float, top: float, height: float) -> Iterator[str]:
    starts = accumulate(parts, initial=0.0)
    for number, (start, part) in enumerate(zip(starts, parts, strict=False)):
        colour = PALETTE[number % len(PALETTE)]
        place = f'x="{left + start * scale:.1f}" y="{top:.1f}" width="{part * scale:.1f}" height="{height:.1f}"'
        yield f'<rect {place} fill="{colour}" class="page"/>'


def _svg(height: float, content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{label}">{content}</svg>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{text}</text>'


# -- the schedule -----------------------------------------------------------------------------------------------------

# Start, end, upper and lower edge.
Box = tuple[float, float, float, float]


def schedule_chart(played: Played) -> tuple[str, list[tuple[str, str]]]:
    """The drawing, and its legend: names with their classes."""
    height = len(played.ranks) * (ROW + GAP)
    scale = (WIDTH - LEFT - RIGHT) / played.step_ms
    boxes: defaultdict[str, list[Box]] = defaultdict(list)
    for number, rank in enumerate(played.ranks):
        top = number * (ROW + GAP)
        boxes["idle"].append((0.0, played.step_ms, top, top + ROW))
        for run in rank.runs:
            _add_slot(boxes, run, played.layout.held[number], top)
        _add_end(boxes, rank, played, top)
    order = ["idle", *(f"{name}{later}" for name in PASSES.values() for later in ("", " later"))]
    order += ["waits", "reduce", "update", "gather"]
    paths = (f'<path class="{name}" d="{_path(boxes[name], scale)}"/>' for name in order if name in boxes)
    names = (_text(LEFT - 8, n * (ROW + GAP) + 15, f"rank {n}", "end") for n in range(len(played.ranks)))
    chart = _svg(height + FOOT, HATCH + "".join([*paths, *names, *_ticks(played.step_ms, scale, height)]), "schedule")
    used = {name.split()[0] for name in boxes}
    legend = [(text, name) for name, text in NAMES.items() if name in used]
    if any("later" in name for name in boxes):
        legend.append(("paler: a later stage of the rank", "forward later"))
    return chart, [*legend, ("idle", "idle")]


def _add_slot(boxes: Mapping[str, list[Box]], run: Run, held: Sequence[int], top: float) -> None:
    each = ROW / len(run.slot)
    for place, op in enumerate(run.slot):
        name = PASSES[op.kind] + (" later" if op.stage != held[0] else "")
        boxes[name].append((run.start_ms, run.end_ms, top + place * each, top + (place + 1) * each))
    if run.inside.exposed_ms > 0:
        boxes["waits"].append((run.end_ms - run.inside.exposed_ms, run.end_ms, top, top + ROW))


def _add_end(boxes: Mapping[str, list[Box]], rank: RankPlay, played: Played, top: float) -> None:
    reduced_ms = played.makespan_ms + played.reduce_ms
    updated_ms = reduced_ms + played.update_ms
    foot = top + 0.8 * ROW
    if rank.reduce_end_ms > rank.reduce_start_ms:
        boxes["reduce"].append((rank.reduce_start_ms, rank.reduce_end_ms, foot, top + ROW))
    if played.update_ms:
        boxes["update"].append((reduced_ms, updated_ms, top, top + ROW))
    if played.gather_ms:
        boxes["gather"].append((updated_ms, played.step_ms, foot, top + ROW))


def _path(boxes: Sequence[Box], scale: float) -> str:
    """A hair's breadth is left between neighbours."""
    return "".join(
        f"M{LEFT + start * scale:.1f} {upper:g}H{LEFT + end * scale - min(0.3, 0.1 * (end - start) * scale):.1f}"
        f"V{lower:g}H{LEFT + start * scale:.1f}z"
        for start, end, upper, lower in boxes
    )


def _ticks(end_ms: float, scale: float, height: float) -> Iterator[str]:
    """At round times."""
    power = 10.0 ** len(str(int(end_ms)))
    step_ms = next(power * share for share in (0.2, 0.1, 0.05, 0.02, 0.01) if end_ms / (power * share) >= 4)
    in_seconds = end_ms >= 2000
    for number in range(int(end_ms / step_ms) + 1):
        time_ms = number * step_ms
        text = f"{time_ms / 1000:g} s" if in_seconds else f"{time_ms:g} ms"
        yield _text(LEFT + time_ms * scale, height + 14, text, "middle", "tick")
