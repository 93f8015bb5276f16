"""The figures of a bench as a picture: a bar for each case, of compute and of what it waited for; a mark at its bound.

The picture brings its own background, so that it can be read on a light page and on a dark one.
"""

from collections.abc import Iterator
from xml.sax.saxutils import escape

from dstrain.bench.fabric import CaseFigures, PointFigures
from dstrain.bench.report import Report, about_compute, about_routes, title

WIDTH, MARGIN = 1040, 24
LABELS, FIGURES = 290, 250
BAR, GAP = 18, 8
HEAD, FOOT, LEGEND = 78, 26, 40
# The width of a bar as long as the longest.
SCALE = WIDTH - 2 * MARGIN - LABELS - FIGURES

# Class -> (property, on a light page, on a dark page).
COLOURS = {
    "page": ("fill", "#ffffff", "#12161c"),
    "compute": ("fill", "#2f63b5", "#3f76cc"),
    "waits": ("fill", "#e2964a", "#c4752a"),
    "text": ("fill", "#1b222c", "#e4e9f0"),
    "faint": ("fill", "#566170", "#a3adba"),
    "bound": ("stroke", "#1b222c", "#e4e9f0"),
}


def draw(report: Report) -> str:
    """SVG."""
    parts, y = list(_legend()), float(LEGEND)
    for point in report.points:
        parts += _point(point, y)
        y += HEAD + len(point.cases) * (BAR + GAP) + FOOT
    machine = report.machine
    words = f"{machine.processor}, {machine.cores} cores, load {machine.load:.1f} at the start, {report.started}"
    parts.append(_text(MARGIN, y, words, "faint"))
    height = y + MARGIN
    open_tag = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
    page = f'<rect width="{WIDTH}" height="{height:.0f}" rx="12" class="page"/>'
    return "\n".join([open_tag, "<title>Step times on a limited network</title>", _style(), page, *parts, "</svg>\n"])


def _legend() -> Iterator[str]:
    y = LEGEND - 14
    for x, name, words in ((MARGIN, "compute", "compute"), (MARGIN + 100, "waits", "everything else: compute waits")):
        yield _rectangle(x, y - 10, 14, 12, name)
        yield _text(x + 20, y, words, "faint")
    yield _mark(MARGIN + 345, y - 11, 14)
    yield _text(MARGIN + 355, y, "bound: the longer of compute and own bytes on the line", "faint")


def _point(point: PointFigures, y: float) -> Iterator[str]:
    void = " (void: compute alone took too long)" if point.is_void else ""
    yield _text(MARGIN, y + 22, title(point) + void, "text title")
    yield _text(MARGIN, y + 41, about_routes(point), "faint")
    yield _text(MARGIN, y + 59, about_compute(point), "faint")
    longest_ms = max(case.step_ms for case in point.cases)
    for number, case in enumerate(point.cases):
        yield from _bar(case, point.compute_ms, SCALE / longest_ms, y + HEAD + number * (BAR + GAP))


def _bar(case: CaseFigures, compute_ms: float, pixels_per_ms: float, y: float) -> Iterator[str]:
    x, base = MARGIN + LABELS, y + BAR - 5
    compute = min(compute_ms, case.step_ms) * pixels_per_ms
    whole = case.step_ms * pixels_per_ms
    yield _text(x - 10, base, case.name, "text", "end")
    yield _rectangle(x, y, compute, BAR, "compute")
    yield _rectangle(x + compute, y, whole - compute, BAR, "waits")
    yield _mark(x + case.bound_ms * pixels_per_ms, y - 2, BAR + 4)
    words = f"{case.step_ms:.0f} ms, {case.over_bound:.2f} x bound"
    yield _text(x + max(whole, case.bound_ms * pixels_per_ms) + 8, base, words, "faint")


def _style() -> str:
    light = "".join(f".{name}{{{what}:{colour}}}" for name, (what, colour, _) in COLOURS.items())
    dark = "".join(f".{name}{{{what}:{colour}}}" for name, (what, _, colour) in COLOURS.items())
    shared = "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:13px}"
    shared += ".bound{stroke-width:2.5}.title{font-size:14px;font-weight:600}"
    return f"<style>{shared}{light}@media (prefers-color-scheme:dark){{{dark}}}</style>"


def _text(x: float, y: float, words: str, classes: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}" text-anchor="{anchor}">{escape(words)}</text>'


def _rectangle(x: float, y: float, width: float, height: float, classes: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{classes}"/>'


def _mark(x: float, y: float, height: float) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y + height:.1f}" class="bound"/>'
