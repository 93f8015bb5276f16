"""How long it takes to write, check and play the table of a large pipeline, for every schedule.

    python scripts/bench_tables.py [--ranks 64] [--micro-batches 512] [--limit-s 2]

Every stage takes 1 ms for forward, input gradient and weight gradient each, so the bubble beside the times shows what
the table is good for. Times are the best of a few. Exits with 1 if writing and checking a table takes longer than the
limit.
"""

import argparse
import sys
import time

from rich.console import Console
from rich.table import Table

from dstrain.schedule.figures import StageCosts, figures
from dstrain.schedule.pipeline import check
from dstrain.schedule.pipelines.choose import NAMES, make

REPEATS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=512)
    parser.add_argument("--limit-s", type=float, default=2.0)
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.ranks} ranks, {arguments.micro_batches} micro-batches")
    for column in ("schedule", "slots", "write s", "check s", "play s", "bubble %", "live", "later"):
        table.add_column(column, justify="left" if column == "schedule" else "right", no_wrap=True)
    slowest_s = 0.0
    for name in NAMES:
        times_s = []
        for _ in range(REPEATS):
            make.cache_clear()
            start_s = time.perf_counter()
            pipeline = make(name, arguments.ranks, arguments.micro_batches)
            written_s = time.perf_counter()
            check(pipeline)
            checked_s = time.perf_counter()
            known = figures(pipeline, StageCosts.even(pipeline.layout.num_stages, 1, 1, 1))
            times_s.append((written_s - start_s, checked_s - written_s, time.perf_counter() - checked_s))
        write_s, check_s, play_s = map(min, zip(*times_s, strict=True))
        slots = sum(len(rank) for rank in pipeline.ranks)
        figures_text = (f"{100 * known.bubble_share:.1f}", str(max(known.peak_live)), str(max(known.peak_pending)))
        times_text = (f"{time_s:.2f}" for time_s in (write_s, check_s, play_s))
        table.add_row(name, str(slots), *times_text, *figures_text)
        slowest_s = max(slowest_s, write_s + check_s)
    Console().print(table)
    print(f"slowest to write and check: {slowest_s:.2f} s, limit {arguments.limit_s} s")
    return int(slowest_s > arguments.limit_s)


if __name__ == "__main__":
    sys.exit(main())
