"""Draws docs/idea.svg: the four phases of a layer on two processes, and the transfers between them.

python scripts/draw_idea.py

The figure brings its own background, so that it can be read on a light page and on a dark one.
"""

from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).parents[1] / "docs" / "idea.svg"
WIDTH, HEIGHT = 960, 520

# Phase, its kind, where its column begins and ends, and what happens in it.
PHASES = [
    ("attend", "compute", 70, 250, ("norm, MLA, residual,", "norm, router")),
    ("dispatch", "communication", 250, 470, ("every token sets out", "to its experts")),
    ("experts", "compute", 470, 650, ("each process computes", "with its own experts")),
    ("combine", "communication", 650, 850, ("results come home,", "weighted and summed")),
]
# Process: height of its lane, and on which side of it the shared expert and the residual stream are drawn.
LANES = [("process 0", 212, -1, "experts 0-7"), ("process 1", 312, 1, "experts 8-15")]
ATTEND, EXPERTS, SHARED = (90, 140), (490, 140), (295, 130)
SHARED_AWAY, RESIDUAL_AWAY, SUM_X, SUM_R = 68, 108, 810, 13
FOOTNOTE = "The shared expert computes while tokens travel. The backward pass goes the same way back."

# Class -> (property, on a light page, on a dark page).
COLOURS = {
    "page": ("fill", "#ffffff", "#12161c"),
    "compute": ("fill", "#eef3fb", "#19222f"),
    "communication": ("fill", "#fdf1e3", "#2c2318"),
    "box": ("fill", "#2f63b5", "#3f76cc"),
    "in-shadow": ("fill", "#5f7fae", "#4a6390"),
    "on-box": ("fill", "#ffffff", "#ffffff"),
    "text": ("fill", "#1b222c", "#e4e9f0"),
    "faint": ("fill", "#566170", "#a3adba"),
    "wire": ("stroke", "#c4600a", "#f0a24e"),
    "wire-head": ("fill", "#c4600a", "#f0a24e"),
    "line": ("stroke", "#566170", "#a3adba"),
    "line-head": ("fill", "#566170", "#a3adba"),
}


def style() -> str:
    light = "".join(f".{name}{{{what}:{colour}}}" for name, (what, colour, _) in COLOURS.items())
    dark = "".join(f".{name}{{{what}:{colour}}}" for name, (what, _, colour) in COLOURS.items())
    shared = "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:13px}"
    shared += ".wire,.line{fill:none;stroke-width:1.8}.title{font-size:17px;font-weight:600}"
    return f"<style>{shared}{light}@media (prefers-color-scheme:dark){{{dark}}}</style>"


def text(x: float, y: float, words: str, classes: str = "text", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" class="{classes}" text-anchor="{anchor}">{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, classes: str, radius: float = 6) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" class="{classes}"/>'


def box(place: tuple[int, int], y: float, height: float, words: str, classes: str = "box") -> str:
    """A labelled box around height `y`; `place` is its left edge and its width."""
    x, width = place
    return rectangle(x, y - height / 2, width, height, classes) + text(x + width / 2, y + 4.5, words, "on-box")


def arrow(points: list[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" class="{kind}" marker-end="url(#{kind}-end)"/>'


def marker(kind: str) -> str:
    return (
        f'<marker id="{kind}-end" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" class="{kind}-head"/></marker>'
    )


def column(name: str, kind: str, begin: int, end: int, about: tuple[str, str]) -> str:
    middle = (begin + end) / 2
    band = rectangle(begin + 3, 16, end - begin - 6, 464, kind, 10)
    head = text(middle, 43, name, "text title") + text(middle, 62, kind, "faint")
    return band + head + text(middle, 450, about[0], "faint") + text(middle, 467, about[1], "faint")


def lane(name: str, y: int, side: int, held: str) -> str:
    """One process: its boxes, the tokens that stay with it, and its residual stream."""
    edge, into_sum = y + side * 22, y + side * SUM_R
    shared_y, residual_y = y + side * SHARED_AWAY, y + side * RESIDUAL_AWAY
    left, right = ATTEND[0] + 40, ATTEND[0] + 115
    return "".join(
        [
            text(42, y - 9, name, "faint"),
            arrow([(8, y), (ATTEND[0], y)], "line"),
            arrow([(left, edge), (left, residual_y), (SUM_X, residual_y), (SUM_X, into_sum)], "line"),
            text(left + 8, residual_y - 7, "residual stream", "faint", "start"),
            arrow([(right, edge), (right, shared_y), (SHARED[0], shared_y)], "line"),
            arrow([(SHARED[0] + SHARED[1], shared_y), (SUM_X - 2, shared_y)], "line"),
            box(ATTEND, y, 44, "MLA and router"),
            box(SHARED, shared_y, 34, "shared expert", "in-shadow"),
            box(EXPERTS, y, 44, held),
            f'<circle cx="{SUM_X}" cy="{y}" r="{SUM_R}" class="box"/>' + text(SUM_X, y + 5.5, "+", "on-box title"),
            arrow([(SUM_X + SUM_R, y), (952, y)], "line"),
            text(902, y - 9, "next layer", "faint"),
        ]
    )


def transfers() -> str:
    """Every process sends to every process, twice."""
    ways = [(ATTEND[0] + ATTEND[1], EXPERTS[0]), (EXPERTS[0] + EXPERTS[1], SUM_X - SUM_R)]
    heights = [y for _, y, _, _ in LANES]
    return "".join(arrow([(a, y), (b, z)], "wire") for a, b in ways for y in heights for z in heights)


def main() -> None:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>A layer in four phases: attend, dispatch, experts, combine</title>",
        style(),
        f"<defs>{marker('wire')}{marker('line')}</defs>",
        rectangle(0, 0, WIDTH, HEIGHT, "page", 12),
        *(column(*phase) for phase in PHASES),
        transfers(),
        *(lane(*process) for process in LANES),
        text(WIDTH / 2, 505, FOOTNOTE, "faint"),
        "</svg>",
    ]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
