"""`dstrain dryrun`: every pipeline rank of a layout, built and run without memory and without the other ranks.

One rank of each pipeline index goes through engine/dryrun.py; those with other data indices differ from it in nothing
that is shown. What all of them hold together must be the model as its dimensions count it.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from dstrain.config.check import resolve
from dstrain.config.commands import DryrunRoot
from dstrain.data.tokenizer import embedding_rows, load_tokenizer
from dstrain.engine.dryrun import RankRun, Sent, StageRun, micro_batches, run_rank
from dstrain.errors import UserError
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import mesh_of
from dstrain.plan.count import Parameters, parameters
from dstrain.schedule.figures import Figures, StageCosts, figures
from dstrain.schedule.pipelines.choose import make
from dstrain.tasks.output import claim, write_json

# What the tables need; squeezed into less, they would cut figures off.
TABLE_WIDTH = 170
KINDS = ("dispatch", "combine", "pipe", "grad", "param")
ASSUMED = (
    "Balanced routing: equally many rows come to every expert.",
    "TFLOP are those of matrix products: attention with all S x S scores, of which a causal kernel needs half; what is "
    "recomputed is part of the input gradients.",
)


@dataclass(frozen=True)
class LayoutRun:
    """All pipeline ranks."""

    config: DryrunRoot
    mesh: Mesh
    ranks: tuple[RankRun, ...]
    counted: Parameters
    # None without a pipeline.
    figures: Figures | None

    @property
    def stages(self) -> list[StageRun]:
        """Each once, in the order of the model."""
        return [stage for _, stage in sorted({s.number: s for rank in self.ranks for s in rank.stages}.items())]


def run(config: DryrunRoot) -> None:
    """Prints the tables and writes `out`. Raises RuntimeError if the ranks do not add up to the model."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("dstrain dryrun plays all ranks itself: run it as one process, without torchrun.")
    if config.out:
        claim(config.out)
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    with console.status("building every stage"):
        layout = run_layout(config)
    for line in headline(layout):
        console.print(line, soft_wrap=True, markup=False)
    console.print("", stage_table(layout), "", rank_table(layout), sep="\n")
    for line in (*summary(layout), *ASSUMED):
        console.print(line, soft_wrap=True, markup=False)
    if config.out:
        write(layout, Path(config.out))
        console.print(f"Written: {config.out}", soft_wrap=True, markup=False)


def run_layout(config: DryrunRoot) -> LayoutRun:
    """`config` has passed its checks."""
    config = prepare(config)
    ranks = tuple(run_rank(config, pp) for pp in range(config.mesh.pp))
    counted = parameters(config.model)
    held = sum({name: numel for rank in ranks for name, numel in rank.tensors.items()}.values())
    if held != counted.trained:
        raise RuntimeError(f"the stages hold {held:,} parameters, and the model has {counted.trained:,}")
    return LayoutRun(config, mesh_of(config), ranks, counted, play(config, ranks))


def prepare(config: DryrunRoot) -> DryrunRoot:
    """With numbers as mesh.dp and, from the tokenizer, as model.vocab_size."""
    resolved = resolve(config, config.ranks)
    config = replace(config, mesh=resolved.mesh)
    if config.model.vocab_size is None:
        rows = embedding_rows(load_tokenizer(config.data.tokenizer))
        config = replace(config, model=replace(config.model, vocab_size=rows))
    return config


def play(config: DryrunRoot, ranks: Sequence[RankRun]) -> Figures | None:
    """The pipeline's table with stages that take as long as their operations and transfers that take no time."""
    if config.mesh.pp == 1:
        return None
    schedule, stages = config.schedule, {stage.number: stage for rank in ranks for stage in rank.stages}
    table = make(schedule.pipeline, config.mesh.pp, micro_batches(config), schedule.chunks, schedule.overlap is True)
    times = [(s.forward_flops, s.input_flops, s.weight_flops) for _, s in sorted(stages.items())]
    forward, inputs, weights = (tuple(flops / 1e12 for flops in column) for column in zip(*times, strict=True))
    return figures(table, StageCosts(forward, inputs, weights))


# -- what is shown ----------------------------------------------------------------------------------------------------


def headline(layout: LayoutRun) -> list[str]:
    """The layout, and why it works as it does."""
    mesh, train, first, counted = layout.mesh, layout.config.train, layout.ranks[0], layout.counted
    mtp = f" and {counted.mtp / 1e6:,.1f}M of MTP modules" if counted.mtp else ""
    ranks = f"{mesh.world} rank{'s' * (mesh.world > 1)}, {layout.config.hardware.devices_per_node} to a node"
    tokens = f"{train.micro_batch} x {train.seq_len} tokens"
    lines = [
        f"{ranks}: pp={mesh.pp} ep={mesh.ep} dp={mesh.dp}; {micro_batches(layout.config)} micro-batches of {tokens} "
        "for every rank and step",
        f"parameters: {counted.total / 1e6:,.1f}M{mtp}, which all stages together hold",
        f"schedule: {first.schedule}",
        f"dispatch: {first.dispatch}",
    ]
    if layout.figures:
        copies = f", every stage on {layout.figures.copies} pipeline ranks" if layout.figures.copies > 1 else ""
        lines[2] += f"{copies}; {layout.figures.bubble_share:.1%} of the time is bubble"
    return [*lines, "Every rank's table is legal."]


def stage_table(layout: LayoutRun) -> Table:
    right = [Column(name, justify="right") for name in ("forward", "input", "weight", "dispatch GB", "combine GB")]
    table = Table("stage", "layers", "also", "from", "to", *right, title="A micro-batch in every stage: shapes, TFLOP")
    for stage in layout.stages:
        flops = (stage.forward_flops, stage.input_flops, stage.weight_flops)
        table.add_row(
            str(stage.number),
            _span(stage),
            ", ".join(stage.others),
            _shape(stage.input_shape),
            _shape(stage.output_shape),
            *(_figure(number / 1e12) for number in flops),
            *(_gigabytes(stage.sent, kind) for kind in KINDS[:2]),
        )
    return table


def rank_table(layout: LayoutRun) -> Table:
    names = ("dense M", "experts M", "weights GiB", "gradients GiB", "optimizer GiB", *KINDS, "live")
    right = [Column(name, justify="right") for name in names]
    title = "A rank of every pipeline index: parameters and their state; GB sent in a step, between nodes + inside"
    table = Table("pp", "stages", *right, title=title)
    for rank in layout.ranks:
        table.add_row(
            str(rank.pp),
            ", ".join(str(stage.number) for stage in rank.stages),
            *(f"{number / 1e6:,.1f}" for number in (rank.dense_parameters, rank.expert_parameters)),
            *(_figure(n / 2**30) for n in (rank.parameter_bytes, rank.gradient_bytes, rank.optimizer_bytes)),
            *(_gigabytes(rank.sent, kind) for kind in KINDS),
            str(rank.peak_live),
        )
    return table


def summary(layout: LayoutRun) -> list[str]:
    """Of all ranks: those that are not shown send and compute as much as those that are."""
    totals = total_sent(layout)
    parts = [f"{kind} {sent}" for kind in KINDS if (sent := _gigabytes(totals, kind))]
    flops = sum(s.forward_flops + s.input_flops + s.weight_flops for s in layout.stages)
    passes = micro_batches(layout.config) * layout.mesh.data
    sent = f"GB between nodes + inside: {', '.join(parts)}" if parts else "nothing is sent"
    return [
        f"All ranks in a step: {_figure(flops * passes / 1e12)} TFLOP; {sent}",
        "live: passes through a stage that have begun and not ended, at most. The bubble is that of stages which take "
        "as long as their TFLOP, with all transfers hidden.",
    ]


def total_sent(layout: LayoutRun) -> Sent:
    total: Sent = Sent()
    for rank in layout.ranks:
        total.update({place: num_bytes * layout.mesh.data for place, num_bytes in rank.sent.items()})
    return total


def _span(stage: StageRun) -> str:
    first, last = stage.layers.start, stage.layers.stop - 1
    return str(first) if first == last else f"{first}-{last}"


def _shape(shape: Iterable[int] | None) -> str:
    return "" if shape is None else " x ".join(map(str, shape))


def _gigabytes(sent: Sent, kind: str) -> str:
    network, node = (sent[kind, link] / 1e9 for link in ("network", "node"))
    return f"{_figure(network)} + {_figure(node)}" if network or node else ""


def _figure(value: float) -> str:
    """Four digits that count, without an exponent."""
    rounded = float(f"{value:.4g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:.4g}"


def write(layout: LayoutRun, path: Path) -> None:
    """All figures as JSON. UserError where it can't be written."""
    content = {
        "mesh": {"pp": layout.mesh.pp, "ep": layout.mesh.ep, "dp": layout.mesh.dp, "ranks": layout.mesh.world},
        "devices_per_node": layout.config.hardware.devices_per_node,
        "micro_batches": micro_batches(layout.config),
        "parameters": asdict(layout.counted) | {"total": layout.counted.total, "trained": layout.counted.trained},
        "pipeline": layout.config.schedule.pipeline if layout.figures else None,
        "bubble_share": layout.figures.bubble_share if layout.figures else 0.0,
        "sent_bytes": _by_kind(total_sent(layout)),
        "assumed": ASSUMED,
        "ranks": [_plain(rank) for rank in layout.ranks],
    }
    write_json(content, path)


def _plain(run: RankRun | StageRun) -> dict[str, Any]:
    """A run as JSON knows it."""
    content = {entry.name: getattr(run, entry.name) for entry in fields(run) if entry.repr}
    content["sent_bytes"] = _by_kind(content.pop("sent"))
    if isinstance(run, RankRun):
        content["stages"] = [_plain(stage) for stage in run.stages]
    else:
        content["layers"] = list(run.layers)
    return content


def _by_kind(sent: Sent) -> dict[str, dict[str, int]]:
    return {kind: {link: sent[kind, link] for link in ("node", "network")} for kind in KINDS}
