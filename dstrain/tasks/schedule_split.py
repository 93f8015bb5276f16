"""`dstrain schedule split`: which layers each stage of a pipeline holds, and what they cost."""

import sys
from dataclasses import fields, replace

from rich.console import Console
from rich.table import Table

from dstrain.bench.parts import measure
from dstrain.config.commands import SplitRoot
from dstrain.config.schema import PartCosts
from dstrain.data.tokenizer import embedding_rows, load_tokenizer
from dstrain.mesh.groups import Place
from dstrain.plan.split import Stage, part_costs, split, stage_cost
from dstrain.schedule.pipelines.choose import layout

# A pipe has no width of its own.
PIPE_WIDTH = 120


def run(config: SplitRoot) -> None:
    """Prints the stages; with measure=true, times the parts first and prints the key that keeps the times."""
    if config.model.vocab_size is None:
        rows = embedding_rows(load_tokenizer(config.data.tokenizer))
        config = replace(config, model=replace(config.model, vocab_size=rows))
    if config.measure:
        measured = rounded(measure(config, Place.from_environment().device, config.rounds))
        config = replace(config, schedule=replace(config.schedule, part_ms=measured))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    console.print(stage_table(config))
    for line in notes(config):
        console.print(line, soft_wrap=True, markup=False)


def rounded(costs: PartCosts) -> PartCosts:
    """To four digits: no measurement is better."""
    return PartCosts(**{entry.name: float(f"{getattr(costs, entry.name):.4g}") for entry in fields(PartCosts)})


def stages_of(config: SplitRoot) -> tuple[Stage, ...]:
    schedule = config.schedule
    return split(config, layout(schedule.pipeline, config.mesh.pp, schedule.chunks).num_stages)


def costs_of(config: SplitRoot) -> list[float]:
    """Of every stage, in ms or, where nothing is measured, in GFLOP of a token."""
    costs, unit = part_costs(config), 1.0 if is_measured(config) else 1e9
    return [stage_cost(config.model, costs, stage) / unit for stage in stages_of(config)]


def is_measured(config: SplitRoot) -> bool:
    return config.schedule.part_ms != PartCosts()


def stage_table(config: SplitRoot) -> Table:
    costs, schedule = costs_of(config), config.schedule
    held = layout(schedule.pipeline, config.mesh.pp, schedule.chunks).held
    table = Table()
    for name in ("stage", "rank", "layers", "parts"):
        table.add_column(name, no_wrap=True)
    for name in ("ms" if is_measured(config) else "GFLOP", "share", "/ mean"):
        table.add_column(name, justify="right", no_wrap=True)
    mean = sum(costs) / len(costs)
    for number, (stage, cost) in enumerate(zip(stages_of(config), costs, strict=True)):
        ranks = ", ".join(str(rank) for rank, stages in enumerate(held) if number in stages)
        shares = f"{cost / sum(costs):.1%}", f"{cost / mean:.2f}"
        table.add_row(str(number), ranks, layers_of(stage), parts_of(config, stage), f"{cost:.4g}", *shares)
    return table


def layers_of(stage: Stage) -> str:
    first, last = stage.layers.start, stage.layers.stop - 1
    return str(first) if first == last else f"{first}-{last}"


def parts_of(config: SplitRoot, stage: Stage) -> str:
    """What a stage holds, in words."""
    model = config.model
    dense = sum(layer < model.num_dense_layers for layer in stage.layers)
    counts = [(dense, "dense"), (len(stage.layers) - dense, "MoE"), (stage.is_last * model.mtp.depth, "MTP")]
    counted = [f"{count} {name}" for count, name in counts if count]
    return ", ".join(["embedding"] * stage.is_first + counted + ["head"] * stage.is_last)


def notes(config: SplitRoot) -> list[str]:
    """How even the split is, where it comes from, and the key that keeps it."""
    costs, sizes = costs_of(config), [len(stage.layers) for stage in stages_of(config)]
    source = "as schedule.split lists them" if config.schedule.split else "planned"
    basis = "schedule.part_ms" if is_measured(config) else "FLOPs of a token; measure=true times the parts here"
    ratio = max(costs) * len(costs) / sum(costs)
    lines = [f"{source}, costs by {basis}; the costliest stage takes {ratio:.2f} of the mean"]
    if config.measure:
        parts = ", ".join(
            f"{entry.name}: {getattr(config.schedule.part_ms, entry.name):g}" for entry in fields(PartCosts)
        )
        lines.append(f"keep the times with: 'schedule.part_ms={{{parts}}}'")
    return [*lines, f"keep the split with: 'schedule.split={sizes}'"]
