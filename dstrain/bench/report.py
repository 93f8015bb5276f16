"""The figures of a bench as a table, and as JSON."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dstrain.bench.case import PEERS, Case
from dstrain.bench.fabric import CaseFigures, PointFigures
from dstrain.bench.peers.contract import Facts
from dstrain.bench.played import Played

BASELINE = Case("alltoall").name
# Pipelines whose passes don't hide each other's transfers: compute stands still, or goes on with its own pass.
PIPELINE_BASELINES = ("1f1b+block", "1f1b")
# How far bytes may be from theory.
MOST_BYTES_OFF = 0.01


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on."""

    processor: str
    cores: int
    kernel: str
    torch: str
    # Mean number of processes that wanted a core in the minute before.
    load: float

    @staticmethod
    def here() -> "Machine":
        return Machine(_processor(), os.cpu_count() or 1, platform.release(), torch.__version__, os.getloadavg()[0])


@dataclass
class Report:
    """A whole bench; points are added as they are measured."""

    machine: Machine
    peers: dict[str, Facts]
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    points: list[PointFigures] = field(default_factory=list)

    def as_json(self) -> str:
        content = asdict(self)
        for point, figures in zip(content["points"], self.points, strict=True):
            point["is_void"] = figures.is_void
            for case, own in zip(point["cases"], figures.cases, strict=True):
                case |= {"over_bound": own.over_bound, "over_theory": own.over_theory}
                case |= {"exposed_share": own.exposed_share, "over_simulated": own.over_simulated}
                case["times_as_fast_as"] = speedups(own, figures)
        return json.dumps(content, indent=2) + "\n"

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(self.as_json())


def about_peers(report: Report) -> list[str]:
    """What ran, and what of it did not, by peer."""
    lines = []
    for facts in report.peers.values():
        versions = ", ".join(f"{package} {version}" for package, version in facts.versions.items())
        lines.append(f"{facts.name} ({versions}): {'; '.join(facts.limits)}.")
    return lines


def speedups(case: CaseFigures, point: PointFigures) -> dict[str, float]:
    """How many times as fast as the own baselines and the peers."""
    others = {other.name: other.step_ms for other in point.cases if _is_baseline(other.name)}
    return {name: step_ms / case.step_ms for name, step_ms in others.items() if name != case.name}


def _is_baseline(name: str) -> bool:
    return name in (BASELINE, *PEERS) or name.rpartition("/")[2] in PIPELINE_BASELINES


def title(point: PointFigures) -> str:
    """The network."""
    config = point.config
    parts = [
        f"{config.nodes} nodes x {config.ranks_per_node} ranks",
        f"{config.rate_mbit:g} Mbit",
        f"burst {config.burst_kib} KiB",
        f"MTU {config.mtu}" if config.mtu != 1500 else "",
        f"{config.loopback_mbit:g} Mbit inside" if config.loopback_mbit else "",
        f"pipelines of {config.pp} ranks inside nodes, experts spread over all nodes" if config.pp > 1 else "",
    ]
    return ", ".join(filter(None, parts))


def about_routes(point: PointFigures) -> str:
    """What travels on it."""
    config = point.config
    parts = [
        f"{config.num_blocks} block{'s' * (config.num_blocks > 1)}",
        f"{config.micro_batches} micro-batches of {config.tokens} tokens a rank",
        f"hidden size {config.hidden_size}",
        f"top {config.experts_per_token} of {config.num_experts} experts",
        f"at most {config.route_nodes} nodes a token" if config.route_nodes else "",
        f"skew {config.route_skew:g}" if config.route_skew else "",
    ]
    return ", ".join(filter(None, parts))


def about_compute(point: PointFigures) -> str:
    """Emulated or real, and how it compares with the traffic that a flat dispatcher sends."""
    flat = f"flat BF16 traffic {point.flat_wire_ms:.0f} ms on the line"
    if point.config.compute == "emulated":
        took = f"slept {point.slept_ms:.0f} ms, alone {point.compute_ms:.0f} ms"
        return f"emulated compute {point.nominal_compute_ms:.0f} ms ({took}) a step, {flat}"
    if point.config.compute == "real":
        return f"real compute {point.compute_ms:.0f} ms a step, {flat}"
    return f"no compute, {flat}"


def show(point: PointFigures, machine: Machine, console: Console) -> None:
    """The table of a point, and what must be known to read it."""
    console.print(f"\n[bold]{title(point)}[/]", highlight=False)
    load = f"{machine.processor}, {machine.cores} cores, load {machine.load:.1f} at the start"
    for line in (about_routes(point), about_compute(point), load):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_table(point))
    if point.config.pp > 1:
        console.print("", _pipeline_table(point), sep="\n")
    if len(point.cases) > 1 and any(speedups(case, point) for case in point.cases):
        console.print("", _speedup_table(point), sep="\n")
    for name, reason in point.left_out.items():
        console.print(f"{name} is left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    for line in verdicts(point):
        console.print(line, highlight=False, soft_wrap=True)


def verdicts(point: PointFigures) -> list[str]:
    """Whether bytes are right and times are worth anything."""
    shares = {case.name: case.over_theory for case in point.cases if case.over_theory is not None}
    wrong = {name: share for name, share in shares.items() if abs(share - 1) > MOST_BYTES_OFF}
    lines = [f"[bold yellow]{name} sent {share:.4f} times what its routes demand.[/]" for name, share in wrong.items()]
    if shares and not wrong:
        lines.append(f"Bytes are within {MOST_BYTES_OFF:.0%} of theory in every case of ours.")
    if point.is_void:
        slept, alone = (ms / point.nominal_compute_ms - 1 for ms in (point.slept_ms, point.compute_ms))
        words = f"sleeps took {slept:.1%} longer than they should, a step without transfers {alone:.1%}"
        cure = "Stop other programs, let the bench go first (`chrt -r 1 dstrain bench ...`), or give it more tokens."
        lines.append(f"[bold yellow]These figures are void:[/] {words}. {cure}")
    return lines


def _table(point: PointFigures) -> Table:
    heads = ["case", "step ms", "range", "wire ms", "step/bound", "exposed ms", "%", "waited ms", "host ms", "cpu ms"]
    rows = [_cells(case) for case in point.cases]
    return _aligned([*heads, "MB", "of theory"], rows)


def _cells(case: CaseFigures) -> list[str]:
    sent = case.line_bytes if case.sent_bytes is None else case.sent_bytes
    return [
        case.name,
        f"{case.step_ms:.0f}",
        f"{case.fastest_ms:.0f}-{case.slowest_ms:.0f}",
        f"{case.wire_ms:.0f}",
        f"{case.over_bound:.3f}",
        f"{case.exposed_ms:.0f}",
        f"{case.exposed_share * 100:.1f}",
        _number(case.waited_ms, 0),
        _number(case.host_ms, 0),
        f"{case.cpu_ms:.0f}",
        f"{sent / 1e6:.2f}",
        _number(case.over_theory, 4),
    ]


def _speedup_table(point: PointFigures) -> Table:
    rivals = [case.name for case in point.cases if _is_baseline(case.name)]
    rows = []
    for case in point.cases:
        ratios = speedups(case, point)
        rows.append([case.name, *(_number(ratios.get(name), 2) for name in rivals)])
    return _aligned(["times as fast as", *rivals], rows)


def _pipeline_table(point: PointFigures) -> Table:
    """Steps against their own tables, played with measured times."""
    rows = []
    for case in point.cases:
        if case.played is not None:
            own = case.played
            lives = [", ".join(map(str, peaks)) for peaks in (own.peak_live, own.table_peak_live)]
            times = [_number(ms, digits) for ms, digits in _times(own)]
            log = "equals table" if own.as_table else "differs from table"
            rows.append([case.name, *times, _number(case.over_simulated, 3), log, *lives])
    heads = ["pipeline", "simulated ms", "phases ms", "latency ms", "message ms", "step/simulated", "executed log"]
    return _aligned([*heads, "peak live", "of table"], rows)


def _times(own: Played) -> list[tuple[float | None, int]]:
    return [(own.simulated_ms, 0), (own.phases_ms, 0), (own.latency_ms, 1), (own.message_ms, 1)]


def _aligned(heads: list[str], rows: list[list[str]]) -> Table:
    """Names to the left, figures to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _processor() -> str:
    """The model of the processor, as the kernel names it."""
    path = Path("/proc/cpuinfo")
    lines: Any = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
