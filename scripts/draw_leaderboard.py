"""Writes docs/leaderboard.md and docs/leaderboard.svg: published runs, what dstrain predicts for them, and the errors.

    python scripts/draw_leaderboard.py            writes both
    python scripts/draw_leaderboard.py --check    exits with 1 if the tables are not what is predicted now

The rows are those of dstrain/plan/data/published_runs.json; no constant of a machine was fitted to them.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from dstrain.plan.outcomes import outcomes
from dstrain.plan.published import Row, read
from dstrain.plan.validate import SAME_PCT, Outcome, Summary, by_group, by_kind, ranking

DOCS = Path(__file__).parents[1] / "docs"
TABLES, PICTURE = DOCS / "leaderboard.md", DOCS / "leaderboard.svg"

HEAD = """\
# Predictions against published measurements

Written by `python scripts/draw_leaderboard.py` out of the rows in `dstrain/plan/data/published_runs.json`, which others
have measured and published; `dstrain plan validate` prints the same figures, and takes files of your own. Constants of
the machines ([hardware.md](hardware.md)) come from data sheets, benchmarks of single kernels and links, and DeepSeek's
training trace, or are assumed; **none is fitted to these rows**, but what other software hides, repeats and launches
was modelled with them in sight: expect somewhat more on runs that nobody has looked at. In `deepseek-trace`, speeds of
single kernels come from the trace itself, and only how they overlap is predicted.

An error is 100 * (predicted - measured) / measured in the row's own metric. Median, 90th percentile and maximum are of
its size; the bias is the mean with its sign, of times: below 0, dstrain is optimistic.

![Predicted over measured times, and the errors of every group](leaderboard.svg)
"""
# Colour of a kind of row, dark enough on white.
COLOURS = {
    "dense, several nodes": "#2f63b5",
    "MoE, several nodes": "#c4600a",
    "one node": "#5f8a3c",
    "memory": "#7a4fa3",
}
# Errors beyond are drawn at the edge.
EDGE_PCT = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    rows = read()
    found = list(outcomes(rows))
    text = "\n".join([HEAD, *tables(rows, found), ""])
    if arguments.check:
        if TABLES.read_text() != text:
            sys.exit(f"{TABLES.name} is not what is predicted now: run python scripts/draw_leaderboard.py")
        return
    TABLES.write_text(text)
    draw(found)


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row], found: Sequence[Outcome]) -> Iterator[str]:
    yield from ("## By kind", "", *summary_table(by_kind(found)), "", *ranking_lines(found), "")
    yield from ("## By source and machine", "", *summary_table(by_group(found)), "")
    yield from ("## Row by row", "", "| row | metric | predicted | measured | error % | source |")
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    sources = {row.id: row.source for row in rows}
    for row in found:
        source = "" if row.is_memory else sources[row.id]
        figures = f"{row.predicted:,.4g} | {row.measured:,.4g} | {row.error_pct:+.1f}"
        yield f"| {row.id} | {row.metric} | {figures} | {source} |"


def summary_table(summaries: Sequence[Summary]) -> Iterator[str]:
    yield "| | rows | median % | p90 % | maximum % | bias % |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for each in summaries:
        sizes = f"{each.median:.1f} | {each.p90:.1f} | {each.maximum:.1f}"
        yield f"| {each.name} | {each.count} | {sizes} | {each.bias:+.1f} |"


def ranking_lines(found: Sequence[Outcome]) -> Iterator[str]:
    order = ranking(found)
    yield f"Layouts of one model on one machine with one batch: {order.right} of {order.pairs} pairs are in the right"
    apart = f"{order.distinct_right} of {order.distinct}"
    yield f"order; of those measured more than {SAME_PCT:g}% apart, {apart}. A layout"
    yield f"predicted to be the best takes up to {order.worst_regret_pct:.1f}% longer than the best one measured."


# -- picture ----------------------------------------------------------------------------------------------------------


def draw(found: Sequence[Outcome]) -> None:
    # Texts stay texts, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dstrain", "font.size": 10})
    groups = [summary.name for summary in by_group(found)]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 1.6 + 0.32 * len(groups)), width_ratios=(1, 1.1), layout="constrained"
    )
    draw_scatter(left, [outcome for outcome in found if not outcome.is_memory])
    draw_errors(right, found, groups)
    figure.savefig(PICTURE, metadata={"Date": None})


def kind(outcome: Outcome) -> str:
    if outcome.is_memory:
        return "memory"
    if not outcome.multi_node:
        return "one node"
    return "MoE, several nodes" if outcome.is_moe else "dense, several nodes"


def draw_scatter(axes: Axes, found: Sequence[Outcome]) -> None:
    ends = [bound for row in found for bound in (row.measured_s, row.predicted_s)]
    low, high = min(ends) / 1.5, max(ends) * 1.5
    axes.fill_between([low, high], [low * 0.9, high * 0.9], [low * 1.1, high * 1.1], color="#000000", alpha=0.08, lw=0)
    axes.plot([low, high], [low, high], color="#566170", lw=0.8)
    for name, colour in COLOURS.items():
        # Memory has no points here, but a name.
        members = [row for row in found if kind(row) == name]
        times = [row.measured_s for row in members], [row.predicted_s for row in members]
        axes.scatter(*times, s=16, color=colour, alpha=0.75, lw=0, label=name)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel="measured, seconds a step", ylabel="predicted", title="Times (grey: within 10%)")
    axes.legend(frameon=False, loc="upper left")


def draw_errors(axes: Axes, found: Sequence[Outcome], groups: Sequence[str]) -> None:
    """A line of points for each group, its median a bar."""
    axes.axvspan(-10, 10, color="#000000", alpha=0.08, lw=0)
    axes.axvline(0, color="#566170", lw=0.8)
    for place, name in enumerate(groups):
        members = [row for row in found if by_group([row])[0].name == name]
        errors = sorted(max(-EDGE_PCT, min(EDGE_PCT, row.bias_pct)) for row in members)
        colours = [COLOURS[kind(row)] for row in sorted(members, key=lambda row: row.bias_pct)]
        # Neighbours lie beside each other.
        heights = [place + (index % 3 - 1) * 0.18 if len(errors) > 3 else place for index in range(len(errors))]
        axes.scatter(errors, heights, s=16, c=colours, alpha=0.75, lw=0)
        middle = median(errors)
        axes.plot([middle, middle], [place - 0.38, place + 0.38], color="#1b222c", lw=1.5)
    axes.set_yticks(range(len(groups)), groups)
    axes.set(xlim=(-EDGE_PCT - 2, EDGE_PCT + 2), ylim=(len(groups) - 0.4, -0.6))
    axes.set(
        xlabel=f"error of the time or of the memory, % (beyond {EDGE_PCT} at the edge)", title="By source and machine"
    )


if __name__ == "__main__":
    main()
