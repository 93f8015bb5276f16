from dataclasses import replace

import pytest

from dstrain.schedule.action import Pass, Phase
from dstrain.schedule.simulate import Costs, even_costs, simulate
from dstrain.schedule.table import sequential


def test_one_block_by_hand():
    """Forward 2 + 3 | transfer 10, shared 1 in its shadow | experts 4 | transfer 20 | last stretch 5, and back."""
    times = {Phase.ATTEND: 2.0, Phase.SHARED: 1.0, Phase.EXPERTS: 4.0}
    compute_ms = {(work, phase, 0): times[phase] for phase in Phase for work in Pass}
    compute_ms |= {(work, Phase.ATTEND, 1): 5.0 for work in Pass}
    transfer_ms = {
        (Pass.FORWARD, "dispatch", 0): 10.0,
        (Pass.FORWARD, "combine", 0): 20.0,
        (Pass.BACKWARD, "combine", 0): 30.0,
        (Pass.BACKWARD, "dispatch", 0): 40.0,
    }
    timeline = simulate(sequential(1, 1), Costs(compute_ms, transfer_ms))
    ends = {str(interval.work): interval.end_ms for interval in timeline.computes + timeline.transfers}
    assert ends["F dispatch 0 of 0"] == 2 + 10
    assert ends["F shared 0 of 0"] == 2 + 1
    assert ends["F combine 0 of 0"] == 12 + 4 + 20
    assert ends["B combine 0 of 0"] == 36 + 5 + 5 + 30
    assert ends["B experts 0 of 0"] == 76 + 4
    assert ends["B dispatch 0 of 0"] == 80 + 40
    assert timeline.makespan_ms == ends["W attend 0 of 0"] == 120 + 2 + 2
    assert timeline.compute_ms == 3 * (2 + 1 + 4 + 5)
    assert timeline.wire_ms == timeline.bound_ms == 100
    assert timeline.exposed_ms == 124 - 36


def test_latency_delays_who_waits_and_not_the_link():
    costs = even_costs(2)
    late = simulate(sequential(2, 1), replace(costs, latency_ms=0.25))
    assert late.makespan_ms == pytest.approx(simulate(sequential(2, 1), costs).makespan_ms + 4 * 2 * 0.25)
    assert late.wire_ms == pytest.approx(2 * 3)


def test_link_is_first_in_first_out():
    timeline = simulate(sequential(2, 3), even_costs(2, wire=4.0))
    ends = [interval.end_ms for interval in timeline.transfers]
    starts = [interval.start_ms for interval in timeline.transfers]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


@pytest.mark.parametrize("fp8", [False, True])
def test_even_costs(fp8: bool):
    timeline = simulate(sequential(3, 2), even_costs(3, wire=0.5, fp8=fp8, last=0.4))
    assert timeline.compute_ms == pytest.approx(2 * 3 * (3 + 0.4))
    assert timeline.wire_ms == pytest.approx(0.5 * timeline.compute_ms)
