"""The timeline of a step: rules of the format, and what it shows."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.comm.trace import CommTotals, Label, Span, Trace, Transfer
from dstrain.errors import UserError
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.mesh.topology import Link
from dstrain.metrics.timeline import RankStep, clocks, events, gather, write
from tests.gloo.spawn import spawn


def account(start_s: float) -> CommTotals:
    """A step of one second."""
    label = Label(block=2, micro_batch=1, direction="forward", step=10)
    sent = {Link.NETWORK: 70, Link.NODE: 30}
    transfers = [
        Transfer("dispatch", "ep", label, start_s + 0.1, start_s + 0.4, 0.05, sent),
        Transfer("dispatch", "ep", Label(), start_s + 0.2, start_s + 0.5),
        Transfer("dispatch", "ep", Label(), start_s + 0.45, start_s + 0.6),
        # From the step before, and into the next one.
        Transfer("param", "data", Label(), start_s - 0.3, start_s + 0.1),
        Transfer("param", "data", Label(), start_s + 0.9),
    ]
    spans = [
        Span("attend", label, start_s + 0.1, start_s + 0.3),
        Span("wait param", Label(), start_s + 0.1, start_s + 0.2),
    ]
    return CommTotals(50.0, 600.0, {}, {}, transfers, spans, start_s, start_s + 1.0)


def two_nodes() -> list[RankStep]:
    """The clock of node 1 is 1000 s ahead; its ranks leave barriers a little late, once very late."""
    return [
        RankStep(0, 0, [4.0, 5.0, 6.0], account(7.0)),
        RankStep(1, 0, [4.1, 5.1, 6.1], account(7.0)),
        RankStep(2, 1, [1004.001, 1005.002, 1009.0], account(1007.5)),
    ]


def check_format(shown: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    """The rules of the Trace Event Format; the names of the rows."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in shown if e["name"] == "thread_name"}
    assert {e["pid"] for e in shown if e["name"] == "process_name"} == {pid for pid, _ in names}
    for event in shown:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
    for row in names:
        boxes = [e for e in shown if e["ph"] == "X" and (e["pid"], e["tid"]) == row]
        times = sorted((e["ts"], -e["dur"]) for e in boxes)
        for (start, minus_length), (next_start, next_minus_length) in pairwise(times):
            # Side by side or inside, to the nanosecond.
            end, next_end = start - minus_length, next_start - next_minus_length
            assert next_start >= end - 1e-3 or next_end <= end + 1e-3
    assert {(e["pid"], e["tid"]) for e in shown if e["ph"] == "X"} <= names.keys()
    return names


def test_nothing_lies_before_zero():
    early = two_nodes()
    early[1] = RankStep(1, 0, early[1].barriers_s, account(6.8))
    assert min(event["ts"] for event in events(early) if event["ph"] == "X") == pytest.approx(0.0, abs=1e-3)


def test_format():
    names = check_format(list(events(two_nodes())))
    rows = ["compute", "dispatch", "dispatch 2", "param"]
    assert names == {(rank, row): name for rank in range(3) for row, name in enumerate(rows)}


def test_what_is_shown():
    boxes = [e for e in events(two_nodes()) if e["ph"] == "X" and e["pid"] == 0]
    first = next(e for e in boxes if e["name"] == "dispatch forward")
    assert (first["ts"], first["dur"]) == pytest.approx((100_000, 300_000))
    where = {"layer": 2, "micro_batch": 1, "step": 10}
    assert first["args"] == {**where, "group": "ep", "network_bytes": 70, "node_bytes": 30, "waited_ms": 50.0}
    assert {e["name"] for e in boxes if e["cat"] == "compute"} == {"attend forward", "wait param"}
    before, after = (e for e in boxes if e["name"] == "param")
    # Only what lies in the step.
    assert (before["ts"], before["dur"]) == pytest.approx((0, 100_000))
    assert (after["ts"], after["dur"], after["args"]["still under way"]) == pytest.approx((900_000, 100_000, True))


def test_clocks_of_other_nodes_are_set():
    assert clocks(two_nodes()) == {0: 0.0, 1: pytest.approx(1000.002)}
    start = {e["pid"]: e["ts"] for e in events(two_nodes()) if e["name"] == "attend forward"}
    assert start == pytest.approx({0: 100_000, 1: 100_000, 2: 598_000})


def test_unwritable(tmp_path: Path):
    with pytest.raises(UserError, match=r"trace-step-3.json cannot be written: No such file or directory"):
        write(tmp_path / "absent" / "trace-step-3.json", two_nodes())


def test_a_single_process(tmp_path: Path):
    groups = connect(Mesh(), Place(0, 1, torch.device("cpu")))
    groups.trace.keeps_spans = True
    with groups.trace.computing("attend"):
        pass
    write(tmp_path / "trace.json", gather(groups.trace.take(), groups))
    names = check_format(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    assert names == {(0, 0): "compute"}


def traced(rank: int, world: int) -> list[dict[str, Any]]:
    groups = connect(Mesh(dp=world), Place(rank, world, torch.device("cpu")))
    trace: Trace = groups.trace
    trace.end(trace.begin("grad", "data"))
    return list(events(found)) if (found := gather(trace.take(), groups)) else []


def test_rank_0_gets_all_ranks():
    first, *others = spawn(traced, 3)
    assert check_format(first) == {
        (rank, row): name for rank in range(3) for row, name in enumerate(["compute", "grad"])
    }
    assert others == [[], []]
