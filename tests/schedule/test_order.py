from dataclasses import replace

import pytest

from dstrain.schedule.action import Pass
from dstrain.schedule.order import _play, _Work, fixed, planned
from dstrain.schedule.simulate import even_costs, simulate
from dstrain.schedule.table import check, sequential


@pytest.mark.parametrize("wire", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    ("blocks", "micro_batches", "in_flight"), [(0, 3, 2), (1, 2, 2), (2, 4, 3), (3, 1, 2), (2, 3, 8), (2, 2, 1)]
)
def test_plans_are_legal(blocks: int, micro_batches: int, in_flight: int, wire: float):
    check(planned(blocks, micro_batches, in_flight, even_costs(blocks, wire)), blocks, micro_batches, in_flight)


def test_plan_is_a_function_of_its_arguments():
    costs = even_costs(1, 0.8)
    assert planned(1, 3, 2, costs) == planned(1, 3, 2, costs)
    assert fixed(1, 2, 2) == tuple(planned(1, 2, 2, replace(even_costs(1), latency_ms=0.05)))


@pytest.mark.parametrize(
    ("wire", "micro_batches", "in_flight", "goal"),
    # No order is shorter than 1.1125 at wire 1 with 4 micro-batches, and 1.05 with 8 (proven by a constraint solver).
    [(0.4, 4, 2, 1.01), (0.7, 4, 2, 1.03), (1.0, 4, 2, 1.135), (1.0, 8, 3, 1.075), (1.5, 4, 2, 1.045)],
)
def test_plans_come_close_to_the_bound(wire: float, micro_batches: int, in_flight: int, goal: float):
    costs = even_costs(2, wire)
    timeline = simulate(planned(2, micro_batches, in_flight, costs), costs)
    assert timeline.bound_ms <= timeline.makespan_ms + 1e-9
    assert timeline.makespan_ms <= goal * timeline.bound_ms


def test_planner_and_simulator_agree():
    costs = replace(even_costs(2, 0.9, fp8=True, last=0.3), latency_ms=0.07)
    work = _Work.of(2, 3, 2, costs)
    makespan_ms, table = _play(work, work.searched())
    assert simulate([work.actions[i] for i in table], costs).makespan_ms == pytest.approx(makespan_ms)


def test_weight_gradients_are_not_put_off_for_nothing():
    costs = even_costs(4, 0.3)
    assert simulate(planned(4, 8, 2, costs), costs).peak_pending_weights <= 8


@pytest.mark.parametrize("wire", [0.5, 1.0])
def test_no_more_is_held_than_micro_batches_in_flight_have(wire: float):
    held = peak = 0
    for action in planned(3, 6, 2, even_costs(3, wire)):
        held += {Pass.FORWARD: 1, Pass.WEIGHT: -1}.get(action.work, 0)
        peak = max(peak, held)
    assert peak <= 2 * (3 * 3 + 1)


def test_overlap_beats_the_sequential_order():
    costs = even_costs(2)
    assert simulate(planned(2, 4, 2, costs), costs).makespan_ms < 0.7 * simulate(sequential(2, 4), costs).makespan_ms


def test_large_models_are_planned():
    costs = even_costs(61, 0.8)
    table = planned(61, 8, 2, costs)
    check(table, 61, 8, 2)
    timeline = simulate(table, costs)
    assert timeline.makespan_ms < 1.05 * timeline.bound_ms
