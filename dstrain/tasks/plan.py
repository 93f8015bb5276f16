"""`dstrain plan`: memory, step time and cost of a training run on one page, predicted without a GPU or torch."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from rich.console import Console
from rich.table import Table

from dstrain.config.plan import PlanRoot, changes, fitted
from dstrain.config.schema import Config
from dstrain.engine.recipe import steps_by_batch
from dstrain.errors import UserError
from dstrain.plan import report
from dstrain.plan.cures import cures
from dstrain.plan.job import job_of
from dstrain.plan.memory import rank_memory
from dstrain.plan.report import Range, RankUse, Report, short
from dstrain.plan.simulation import Simulation, simulate

# What the tables need; squeezed into less, they would cut figures off.
PAGE_WIDTH = 120
# Kinds of kernels below this share of the step are summed up.
LEAST_SHARE = 0.005
WRAP = 120


def run(config: PlanRoot) -> None:
    """Prints the page."""
    console = open_console()
    fit = prepare(config)
    page, _ = report_of(fit)
    for line in note(config, fit):
        console.print(line, soft_wrap=True, markup=False)
    show(console, page)


def open_console() -> Console:
    """As wide as the terminal, and at least as a page. Raises UserError under torchrun: one process plays all ranks."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("dstrain plan plays all ranks itself: run it as one process, without torchrun.")
    console = Console(width=None if sys.stdout.isatty() else PAGE_WIDTH, highlight=False)
    console.width = max(console.width, PAGE_WIDTH)
    return console


def prepare(config: Config) -> Config:
    """On all devices of the machine, with a number as model.vocab_size."""
    config = fitted(config)
    if config.model.vocab_size is None:
        # Only here, since it takes its time.
        from dstrain.data.tokenizer import embedding_rows, load_tokenizer

        rows = embedding_rows(load_tokenizer(config.data.tokenizer))
        config = replace(config, model=replace(config.model, vocab_size=rows))
    return config


def note(config: Config, fit: Config) -> list[str]:
    """Says so where the machine has other numbers of devices than the mesh asks for."""
    changed = changes(config, fit)
    if not changed:
        return []
    mesh, hardware = config.mesh, config.hardware
    asked = mesh.pp * mesh.ep * (mesh.dp or 1)
    machine = f"hardware.nodes={hardware.nodes} has {hardware.nodes * hardware.devices_per_node}"
    return [f"The mesh asks for {asked:,} devices, {machine}: planned with {changed}.", ""]


def report_of(config: Config) -> tuple[Report, Simulation]:
    """`config` is prepared. Raises ConfigError where the machine is not known well enough."""
    job, hardware = job_of(config), config.hardware
    played = simulate(job, hardware)
    memory = [RankUse(rank.rank, rank.parts_gib, rank.total_gib) for rank in rank_memory(job, hardware)]
    steps = steps_by_batch(config.train)
    verdict = report.judged(memory, hardware.memory_gib, cures(job, hardware))
    return report.make(job, hardware, played.prediction, memory, verdict, steps), played


# -- what is shown ----------------------------------------------------------------------------------------------------


def show(console: Console, page: Report) -> None:
    for line in headline(page):
        console.print(line, soft_wrap=True, markup=False)
    console.print("", step_table(page), "", memory_table(page.memory), sep="\n")
    for line in (*page.verdict.lines, "", *run_lines(page), "", *basis(page)):
        console.print(line, soft_wrap=True, markup=False)


def headline(page: Report) -> Iterator[str]:
    yield page.title
    width = max(map(len, page.about))
    for name, text in page.about.items():
        yield f"  {name:<{width}}  {text}"
    yield ""
    yield (
        f"A step takes {ranged(page.step_s)} s, {ranged(page.tokens_per_s_per_gpu)} tokens/s on a device"
        + (f", MFU {page.mfu:.1%}" if page.mfu else "")
    )


def ranged(figure: Range) -> str:
    """With its interval: "14.2 (12.9-16.1)"."""
    return f"{short(figure.value)} ({short(figure.low)}-{short(figure.high)})"


def amount(count: int) -> str:
    """With a letter: "14.8T"."""
    for letter, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:,}"


def step_table(page: Report) -> Table:
    """Where a step goes, and beside it the kernels and transfers that a device is busy with."""
    table = Table(box=None, pad_edge=False)
    for name in ("where a step goes", "busy with"):
        table.add_column(name, no_wrap=True)
        table.add_column("s", justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    step_s = page.step_s.value
    parts = [(name, seconds) for name, seconds in page.parts_s.items() if seconds > 0]
    kinds = [(kind, seconds) for kind, seconds in page.kinds_s.items() if seconds >= LEAST_SHARE * step_s]
    rest = sum(page.kinds_s.values()) - sum(seconds for _, seconds in kinds)
    kinds += [("the rest", rest)] if rest > 0 else []
    for row in range(max(len(parts), len(kinds))):
        table.add_row(*_share(parts[row : row + 1], step_s), *_share(kinds[row : row + 1], step_s))
    return table


def _share(entry: Sequence[tuple[str, float]], step_s: float) -> tuple[str, str, str]:
    if not entry:
        return "", "", ""
    name, seconds = entry[0]
    return name, short(seconds), f"{seconds / step_s:.1%}"


def memory_table(memory: Sequence[RankUse]) -> Table:
    """GiB of every pipeline rank; neighbours that need the same are one row."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("GiB", no_wrap=True)
    parts = list(memory[0].parts_gib)
    for name in (*parts, "total"):
        table.add_column(name, justify="right", no_wrap=True)

    def figures(use: RankUse) -> tuple[str, ...]:
        return tuple(f"{gib:.1f}" for gib in (*use.parts_gib.values(), use.total_gib))

    for cells, equal in groupby(memory, key=figures):
        ranks = [use.rank for use in equal]
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        table.add_row(f"rank {span}" if len(memory) > 1 else "a rank", *cells)
    return table


def run_lines(page: Report) -> Iterator[str]:
    """The whole run."""
    days = page.hours.through(lambda hours: hours / 24)
    yield f"The run: {page.steps:,} steps, {amount(page.tokens)} tokens, {ranged(days)} days"
    price = f", {ranged(page.cost)} US dollars" if page.cost else "; no price is known (hardware.price_per_hour)"
    yield f"         {ranged(page.gpu_hours)} device-hours{price}"


def basis(page: Report) -> Iterator[str]:
    """What the figures rest on."""
    yield "Taken for granted:"
    yield from (f"  {text}" for text in page.assumptions)
    yield "Evidence of the machine's constants:"
    yield from (f"  {entry.kind}: {', '.join(entry.of)} ({entry.source})" for entry in page.evidence)
