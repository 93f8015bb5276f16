"""A predicted step as a timeline for Perfetto, in the Trace Event Format (JSON): a process for each pipeline rank.

Beside its slots, it has the rows of a measured step (metrics/timeline.py): what is computed, the transfers of tokens,
gradients and weights. What is inside the slots is shown of as many ranks as a browser opens with ease.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from dstrain.plan.simulation import Played, RankPlay, Run
from dstrain.schedule.action import Action, Pass
from dstrain.schedule.simulate import Interval
from dstrain.schedule.timeline import CATEGORY, UNIT_US, Event

MOST_EVENTS = 100_000
# By number, which is also their order.
ROWS = ("slots", "compute", "dispatch, combine", "grad", "update, param")
SLOTS, COMPUTE, TOKENS, GRADIENTS, END = range(len(ROWS))
DIRECTIONS = {Pass.FORWARD: "forward", Pass.BACKWARD: "backward", Pass.WEIGHT: "weight"}


def trace(played: Played, title: str, software: str) -> dict[str, Any]:
    """The content of a file; `software` says who has made it."""
    about = {"made by": software, "step": title}
    return {"otherData": about, "traceEvents": list(events(played)), "displayTimeUnit": "ms"}


def events(played: Played, most_events: int = MOST_EVENTS) -> Iterator[Event]:
    """In microseconds from the beginning of the step."""
    room = most_events - sum(len(rank.runs) for rank in played.ranks)
    for number, rank in enumerate(played.ranks):
        room -= sum(len(run.inside.timeline.computes) + len(run.inside.timeline.transfers) for run in rank.runs)
        rows = ROWS if room >= 0 else (ROWS[SLOTS], "", "", *ROWS[GRADIENTS:])
        yield from _names(number, played.layout.held[number], rows)
        for run in rank.runs:
            yield _slot(number, run)
            if rows[COMPUTE]:
                yield from _phases(number, COMPUTE, run, run.inside.timeline.computes)
                yield from _phases(number, TOKENS, run, run.inside.timeline.transfers)
        yield from _end(number, rank, played)


def _names(rank: int, held: Sequence[int], rows: Sequence[str]) -> Iterator[Event]:
    """`rows`: "" where there is none."""
    yield _meta("process_name", rank, 0, {"name": f"rank {rank} (stages {', '.join(map(str, held))})"})
    yield _meta("process_sort_index", rank, 0, {"sort_index": rank})
    for row, name in enumerate(rows):
        if name:
            yield _meta("thread_name", rank, row, {"name": name})
            yield _meta("thread_sort_index", rank, row, {"sort_index": row})


def _slot(rank: int, run: Run) -> Event:
    args = {CATEGORY[op.kind]: f"stage {op.stage}, micro-batch {op.micro_batch}" for op in run.slot}
    waits = {"waits_for_transfers_ms": round(run.inside.exposed_ms, 4)}
    return _box(" & ".join(map(str, run.slot)), rank, SLOTS, (run.start_ms, run.end_ms), {**args, **waits})


def _phases(rank: int, row: int, run: Run, intervals: Sequence[Interval]) -> Iterator[Event]:
    """What happens in a slot; numbers in a timeline are those of its kind, here they become real."""
    for x in intervals:
        stage, micro_batch = run.course(x.work.micro_batch)
        name = x.work.phase.value if isinstance(x.work, Action) else x.work.name
        args = {"stage": stage, "block": x.work.block, "micro_batch": micro_batch}
        times_ms = run.start_ms + x.start_ms, run.start_ms + x.end_ms
        yield _box(f"{name} {DIRECTIONS[x.work.work]}", rank, row, times_ms, args)


def _end(number: int, rank: RankPlay, played: Played) -> Iterator[Event]:
    """Gradients, update, and weights as far as the next step waits for them."""
    reduced_ms = played.makespan_ms + played.reduce_ms
    updated_ms = reduced_ms + played.update_ms
    if rank.reduce_end_ms > rank.reduce_start_ms:
        yield _box("grad", number, GRADIENTS, (rank.reduce_start_ms, rank.reduce_end_ms), {})
    if updated_ms > reduced_ms:
        yield _box("update", number, END, (reduced_ms, updated_ms), {})
    if played.gather_ms:
        yield _box("param", number, END, (updated_ms, played.step_ms), {})


def _box(name: str, rank: int, row: int, times_ms: tuple[float, float], args: dict[str, Any]) -> Event:
    start_ms, end_ms = times_ms
    # Nanoseconds are enough, and half as long to read.
    times = {"ts": round(start_ms * UNIT_US, 3), "dur": round((end_ms - start_ms) * UNIT_US, 3)}
    place = {"cat": ROWS[row], "ph": "X", "pid": rank, "tid": row}
    return {"name": name, **place, **times, "args": args}


def _meta(kind: str, rank: int, row: int, args: dict[str, Any]) -> Event:
    return {"name": kind, "ph": "M", "pid": rank, "tid": row, "args": args}
