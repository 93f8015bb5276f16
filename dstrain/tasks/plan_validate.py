"""`dstrain plan validate`: predictions against measurements, row by row and by group."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dstrain.config.plan import ValidateRoot
from dstrain.plan.outcomes import outcomes
from dstrain.plan.published import Row, read
from dstrain.plan.validate import SAME_PCT, Outcome, Ranking, Summary, by_group, by_kind, ranking
from dstrain.tasks.output import claim, write_json

# What the tables need; squeezed into less, they would cut ids off.
TABLE_WIDTH = 120


def run(config: ValidateRoot) -> None:
    """Prints the tables and writes `out`. Raises UserError for a row that can't be predicted."""
    if config.out:
        claim(config.out)
    rows = read(Path(config.runs) if config.runs else None)
    found = list(outcomes(rows))
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    console.print(row_table(found), "", summary_table(by_group(found)), "", summary_table(by_kind(found)), sep="\n")
    for line in (*ranking_lines(ranking(found)), *not_modelled(rows)):
        console.print(line, soft_wrap=True, markup=False)
    if config.out:
        write_json(records(found), Path(config.out))
        console.print(f"Written: {config.out}", soft_wrap=True, markup=False)


def records(found: Iterable[Outcome]) -> list[dict[str, str | float]]:
    """As they are written."""
    return [
        {"id": row.id, "predicted": row.predicted, "measured": row.measured, "error_pct": row.error_pct}
        for row in found
    ]


def row_table(found: Iterable[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("row", "in"):
        table.add_column(name, no_wrap=True)
    for name in ("predicted", "measured", "error %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        figures = f"{row.predicted:,.4g}", f"{row.measured:,.4g}", f"{row.error_pct:+.1f}"
        table.add_row(row.id, row.metric, *figures)
    return table


def summary_table(summaries: Sequence[Summary]) -> Table:
    """Of the sizes of errors; the bias is signed, above 0 where too much time (or memory) is predicted."""
    table = Table(box=None, pad_edge=False)
    table.add_column("errors, %", no_wrap=True)
    for name in ("rows", "median", "p90", "maximum", "bias of time"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in summaries:
        figures = (f"{value:.1f}" for value in (each.median, each.p90, each.maximum))
        table.add_row(each.name, str(each.count), *figures, f"{each.bias:+.1f}")
    return table


def ranking_lines(found: Ranking) -> Iterator[str]:
    yield ""
    if not found.pairs:
        yield "No two runs differ in nothing but their layout: there is no order to predict."
        return
    yield (
        f"Layouts in the right order: {found.right} of {found.pairs} pairs; of those measured more than {SAME_PCT:g}% "
        f"apart {found.distinct_right} of {found.distinct}."
    )
    wrong = [f"{chosen} +{regret:.1f}%" for chosen, regret in found.regrets_pct if regret]
    yield (
        f"The layout predicted to be the best is the best of {len(found.regrets_pct) - len(wrong)} of "
        f"{len(found.regrets_pct)} sets" + (f"; it takes longer than that in {', '.join(wrong)}." if wrong else ".")
    )


def not_modelled(rows: Iterable[Row]) -> Iterator[str]:
    """Keys of rows that the planner does not know."""
    keys = sorted({key for row in rows for key in row.unknown})
    if keys:
        yield f"Not modelled: {', '.join(keys)}."
