"""A predicted step for Perfetto."""

import json
from collections import defaultdict

import pytest

from dstrain.plan import timeline
from dstrain.plan.simulation import play_step
from dstrain.plan.times import Reduction, StepTimes
from dstrain.schedule.simulate import even_costs
from tests.plan.test_simulation import job_with, played


def boxes(found: list[timeline.Event]) -> dict[tuple[int, str], list[timeline.Event]]:
    """By rank and row, in the order of their starts."""
    rows: defaultdict[tuple[int, str], list[timeline.Event]] = defaultdict(list)
    for event in sorted((event for event in found if event["ph"] == "X"), key=lambda event: event["ts"]):
        rows[event["pid"], event["cat"]].append(event)
    return rows


def test_rows_of_a_step():
    """Slots, phases within them, transfers that do not overlap on their link, gradients, update, weights."""
    job = job_with("dualpipe", 4, 8, overlap=True)
    end = Reduction(30.0, 20.0, 5.0)
    step = play_step(job, StepTimes((even_costs(2),) * 4, 0.1, 0.0, (end,) * 4))
    found = json.loads(json.dumps(timeline.trace(step, "A title", "dstrain")))["traceEvents"]
    names = {event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert names == set(timeline.ROWS)
    rows = boxes(found)
    for number, rank in enumerate(step.ranks):
        slots, computes = rows[number, "slots"], rows[number, "compute"]
        assert [slot["ts"] for slot in slots] == pytest.approx([1000 * run.start_ms for run in rank.runs])
        assert sum(compute["dur"] for compute in computes) == pytest.approx(1000 * rank.compute_ms, rel=1e-6)
        for row in (slots, computes, rows[number, "dispatch, combine"]):
            ends = [event["ts"] + event["dur"] for event in row]
            assert all(end <= after["ts"] + 2e-3 for end, after in zip(ends, row[1:], strict=False))
        assert [box["name"] for box in rows[number, "update, param"]] == ["update", "param"]
        assert rows[number, "grad"][0]["dur"] >= 30_000
    last = max(event["ts"] + event["dur"] for event in found if event["ph"] == "X")
    assert last == pytest.approx(1000 * step.step_ms)


@pytest.mark.parametrize(("name", "changes"), [("zb_v", {}), ("1f1b", {"in_flight": 2})])
def test_phases_bear_the_numbers_of_their_step(name: str, changes: dict[str, int]):
    """Every stage of every micro-batch is forward once."""
    job = job_with(name, 2 if name == "zb_v" else 1, 12, overlap=True, **changes)
    rows = boxes(list(timeline.events(played(job, even_costs(2)))))
    computes = [box for (_, row), own in rows.items() if row == "compute" for box in own]
    seen = [
        (box["args"]["stage"], box["args"]["micro_batch"])
        for box in computes
        if box["name"] == "experts forward" and box["args"]["block"] == 1
    ]
    assert sorted(seen) == [(stage, number) for stage in range(job.num_stages) for number in range(12)]


def test_large_steps_are_shown_as_slots():
    step = played(job_with("1f1b", 4, 8), even_costs(2))
    inside = sum(len(run.inside.timeline.computes) + len(run.inside.timeline.transfers) for run in step.ranks[0].runs)
    rows = boxes(list(timeline.events(step, most_events=2 * inside + 100)))
    assert [(rank, "compute") in rows for rank in range(4)] == [True, True, False, False]
    assert all((rank, "slots") in rows for rank in range(4))
