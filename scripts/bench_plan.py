"""How quick the planner is, by DeepSeek-V3's own layout on 2048 H800.

    python scripts/bench_plan.py [--seconds 3]

Each figure is the best of as many calls as fit into the time; the first one, which also writes the table of the
pipeline, is told apart. A prediction uses nothing that an earlier one has found out. Exits with 1 where a goal is
missed: a prediction in closed form under 1 ms, a simulated step under 100 ms with its table, a search at 15 s for
10,000 layouts, the steps that it plays included.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from math import inf

from rich.console import Console
from rich.table import Table

from dstrain.config import load
from dstrain.config.hardware import HardwareConfig
from dstrain.plan.job import Job, job_of
from dstrain.plan.search import search
from dstrain.plan.simulation import play_step, simulate
from dstrain.plan.stages import step_times
from dstrain.plan.step import predict

# For 10,000 layouts.
GOAL_S = 15.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    config = load.compose("plan", ["+experiment=deepseek_v3"])
    job, hardware = job_of(config), config.hardware
    times = step_times(job, hardware)
    # Ever another machine, if only by a trifle.
    machines = (replace(hardware, kernel_us=hardware.kernel_us * (1 + n * 1e-9)) for n in count())
    # What is asked for once must be quick at once; what a search asks for thousands of times, from then on.
    rows: list[tuple[str, Callable[[], object], tuple[float, float]]] = [
        ("a step simulated", lambda: simulate(job, hardware), (100.0, inf)),
        ("the same, its times given", lambda: play_step(job, times), (inf, inf)),
        ("a prediction in closed form", lambda: predict(job, next(machines)), (inf, 1.0)),
    ]
    table = Table(title=f"DeepSeek-V3, {job.pp} ranks of {job.pipeline}, {job.micro_batches} micro-batches")
    for column in ("", "first ms", "goal", "best ms", "goal"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    missed = False
    for name, call, goals_ms in rows:
        found_ms = timed_ms(call, arguments.seconds)
        pairs = list(zip(found_ms, goals_ms, strict=True))
        missed |= any(found > goal for found, goal in pairs)
        table.add_row(name, *(text for ms, goal in pairs for text in (f"{ms:.2f}", f"{goal:g}" if goal < inf else "")))
    Console().print(table)
    return int(missed | (searched_s(job, hardware) > GOAL_S))


def searched_s(job: Job, hardware: HardwareConfig) -> float:
    """Seconds of a search, for 10,000 layouts; says what it has found."""
    start_s = time.perf_counter()
    found = search(job, hardware)
    seconds = time.perf_counter() - start_s
    share_s = seconds * 10_000 / found.looked_at
    print(f"{found.looked_at:,} layouts searched in {seconds:.1f} s: {share_s:.1f} s for 10,000 (goal: {GOAL_S:g})")
    print(f"{found.fitting:,} fit; the best: {' '.join(found.keys)}")
    return share_s


def timed_ms(call: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Of the first call and of the quickest one."""
    times_ms: list[float] = []
    while sum(times_ms) < seconds * 1e3 or len(times_ms) < 2:
        start_s = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - start_s) * 1e3)
    return times_ms[0], min(times_ms)


if __name__ == "__main__":
    sys.exit(main())
