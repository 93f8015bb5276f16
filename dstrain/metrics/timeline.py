"""What every rank did in a step, as a timeline for Perfetto: metrics.trace_steps=[10,11].

One file a step in the Trace Event Format (JSON), one process a rank. Its rows: what the main thread computed or waited
for, then the transfers, a row for each kind and more where several of a kind were under way at once. Times are
microseconds since the beginning of the step on rank 0; the clocks of other nodes are set by when a barrier let them go.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from dstrain.comm.trace import CommTotals, Label, Span, Transfer
from dstrain.errors import UserError
from dstrain.mesh.groups import Groups

# Ranks in a timeline: as many as one can look at.
MOST_RANKS = 64
BARRIERS = 7

# A JSON object of the format.
Event = dict[str, Any]


@dataclass(frozen=True)
class RankStep:
    """A rank's part of a timeline, by its own clock."""

    rank: int
    node: int
    # When it left each of several barriers.
    barriers_s: list[float]
    comm: CommTotals


def gather(comm: CommTotals, groups: Groups) -> list[RankStep]:
    """All ranks' accounts of a step, on rank 0; on the others nothing. Every rank calls it."""
    place = groups.place
    own = RankStep(place.rank, groups.topology.node_of_rank[place.rank], [], comm)
    if groups.world is None:
        return [own]
    for _ in range(BARRIERS):
        dist.barrier(groups.world.group)
        own.barriers_s.append(time.perf_counter())
    ranks: list[Any] | None = [None] * place.world if place.rank == 0 else None
    dist.gather_object(own if place.rank < MOST_RANKS else None, ranks, dst=0, group=groups.world.group)
    return [rank for rank in ranks or [] if rank is not None]


def write(path: Path, ranks: list[RankStep]) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        path.write_text(json.dumps({"traceEvents": list(events(ranks)), "displayTimeUnit": "ms"}))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Make room or choose another run.dir.") from error


def events(ranks: list[RankStep]) -> Iterator[Event]:
    ahead = clocks(ranks)
    # Of the first rank to begin: viewers drop what lies before zero.
    origin_s = min(rank.comm.start_s - ahead[rank.node] for rank in ranks)
    for rank in ranks:
        pid, zero_s = rank.rank, origin_s + ahead[rank.node]
        yield _meta("process_name", pid, 0, {"name": f"rank {pid} (node {rank.node})"})
        yield _meta("process_sort_index", pid, 0, {"sort_index": pid})
        for row, (name, boxes) in enumerate(_rows(rank.comm)):
            place = {"cat": name, "ph": "X", "pid": pid, "tid": row}
            yield _meta("thread_name", pid, row, {"name": name})
            yield _meta("thread_sort_index", pid, row, {"sort_index": row})
            for box in boxes:
                start_s, end_s = max(box.start_s, rank.comm.start_s), min(box.end_s, rank.comm.end_s)
                times = {"ts": (start_s - zero_s) * 1e6, "dur": max(0.0, end_s - start_s) * 1e6}
                yield {"name": box.name, **place, **times, "args": box.args}


def clocks(ranks: list[RankStep]) -> dict[int, float]:
    """Seconds that each node's clock is ahead of the first rank's; ranks of a node share a clock."""
    first = ranks[0]
    ahead: dict[int, list[float]] = {}
    for rank in ranks:
        differences = [own - other for own, other in zip(rank.barriers_s, first.barriers_s, strict=True)]
        ahead.setdefault(rank.node, []).extend(differences)
    return {node: 0.0 if node == first.node else median(differences) for node, differences in ahead.items()}


@dataclass(frozen=True)
class _Box:
    """What a timeline shows as a rectangle."""

    name: str
    start_s: float
    end_s: float
    args: dict[str, Any]


def _rows(comm: CommTotals) -> Iterator[tuple[str, list[_Box]]]:
    yield "compute", [_of_span(span) for span in comm.spans]
    kinds: dict[str, list[_Box]] = {}
    for transfer in comm.transfers:
        kinds.setdefault(transfer.kind, []).append(_of_transfer(transfer, comm.end_s))
    for kind, boxes in kinds.items():
        for number, row in enumerate(_side_by_side(boxes), start=1):
            yield kind if number == 1 else f"{kind} {number}", row


def _side_by_side(boxes: Iterable[_Box]) -> list[list[_Box]]:
    """Rows in which nothing overlaps: the format knows nesting only."""
    rows: list[list[_Box]] = []
    for box in sorted(boxes, key=lambda box: box.start_s):
        free = next((row for row in rows if row[-1].end_s <= box.start_s), None)
        if free is None:
            rows.append([box])
        else:
            free.append(box)
    return rows


def _of_span(span: Span) -> _Box:
    return _Box(_named(span.name, span.label), span.start_s, span.end_s, _args(span.label))


def _of_transfer(transfer: Transfer, now_s: float) -> _Box:
    sent = {f"{link.value}_bytes": num_bytes for link, num_bytes in transfer.sent_bytes.items()}
    args = {**_args(transfer.label), "group": transfer.group, **sent, "waited_ms": round(transfer.waited_s * 1e3, 3)}
    if transfer.end_s is None:
        args["still under way"] = True
    end_s = now_s if transfer.end_s is None else transfer.end_s
    return _Box(_named(transfer.kind, transfer.label), transfer.start_s, end_s, args)


def _named(name: str, label: Label) -> str:
    return name if label.direction is None else f"{name} {label.direction}"


def _args(label: Label) -> dict[str, Any]:
    shown = {"stage": label.stage, "layer": label.block, "micro_batch": label.micro_batch, "step": label.step}
    return {name: value for name, value in shown.items() if value is not None}


def _meta(kind: str, pid: int, tid: int, args: dict[str, Any]) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": args}
