"""`dstrain bench fabric`: dispatchers, ours and others', on a network with limited links."""

import os
import sys
from datetime import datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.status import Status

from dstrain.bench import picture
from dstrain.bench.case import Case, parse
from dstrain.bench.fabric import measure
from dstrain.bench.peers.choose import PEERS
from dstrain.bench.peers.contract import Facts
from dstrain.bench.report import Machine, Report, about_peers, show
from dstrain.bench.testbed import require_root
from dstrain.config.bench import FabricRoot, points
from dstrain.config.rules import need
from dstrain.errors import ConfigError, UserError
from dstrain.schedule.pipelines.choose import rule_broken

PIPE_WIDTH = 150


def run(config: FabricRoot) -> None:
    """Measures every point and prints its table; result.json and picture.svg grow with each."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("dstrain bench fabric starts its ranks itself: run it as one process, without torchrun.")
    cases = list(dict.fromkeys(map(parse, config.cases)))
    for point in points(config):
        for case in cases:
            _check_pipeline(case, point)
    require_root()
    facts, left_out = _peers(cases)
    kept = [case for case in cases if case.kind not in left_out]
    if not kept:
        raise ConfigError("cases", ", ".join(config.cases), "none of these can run here", " ".join(left_out.values()))
    report, folder = Report(Machine.here(), facts), Path(config.out or f"bench/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    # A pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for number, point in enumerate(todo := points(config), start=1):
        of = f"point {number} of {len(todo)}" if len(todo) > 1 else "bench"
        with console.status(of) as status:
            able, unable = _able(kept, point)
            figures = measure(point, able, left_out | unable, partial(_tell, status, of))
        report.points.append(figures)
        show(figures, report.machine, console)
        report.save(folder)
        (folder / "picture.svg").write_text(picture.draw(report))
    for line in about_peers(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n{folder / 'result.json'}, {folder / 'picture.svg'}", highlight=False, soft_wrap=True)


def _check_pipeline(case: Case, point: FabricRoot) -> None:
    name = ("cases", case.name)
    if not case.pipeline:
        need(
            point.pp == 1, name, f"pp={point.pp} cuts the model into stages", "Give it a pipeline's order, or set pp=1."
        )
        return
    need(point.pp > 1, name, "a pipeline has several ranks", "Set pp=2 and ranks_per_node to a multiple of it.")
    broken = rule_broken(case.pipeline, point.pp, point.micro_batches)
    if broken is not None:
        raise ConfigError(*name, broken.rule, f"{broken.cure}.")


def _tell(status: Status, of: str, what: str) -> None:
    status.update(f"{of}, {what}")


def _able(cases: list[Case], point: FabricRoot) -> tuple[list[Case], dict[str, str]]:
    """Cases that make sense at a point; why the others don't."""
    unable = {}
    for case in cases:
        if case.kind == "hierarchical" and point.ranks_per_node == 1:
            unable[case.name] = "with one rank on each node there is no hop inside a node, and rank does the same"
        elif (case.in_flight or 0) > point.micro_batches:
            unable[case.name] = f"a step has micro_batches={point.micro_batches}, no more can be in flight"
    return [case for case in cases if case.name not in unable], unable


def _peers(cases: list[Case]) -> tuple[dict[str, Facts], dict[str, str]]:
    """What is known about the peers that are asked for; why the others can't run."""
    facts, left_out = {}, {}
    for case in cases:
        if case.is_peer:
            try:
                facts[case.name] = PEERS[case.kind].facts()
            except UserError as error:
                left_out[case.name] = str(error)
    return facts, left_out
