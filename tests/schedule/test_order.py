import pytest

from dstrain.schedule.order import fixed, planned
from dstrain.schedule.simulate import even_costs, simulate
from dstrain.schedule.table import check, sequential


@pytest.mark.parametrize("wire", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    ("blocks", "micro_batches", "in_flight"), [(0, 3, 2), (1, 2, 2), (2, 4, 3), (3, 1, 2), (2, 3, 8)]
)
def test_plans_are_legal(blocks: int, micro_batches: int, in_flight: int, wire: float):
    check(planned(blocks, micro_batches, in_flight, even_costs(blocks, wire)), blocks, micro_batches, in_flight)


def test_plan_is_a_function_of_its_arguments():
    costs = even_costs(2, 0.8)
    assert planned(2, 4, 2, costs) == planned(2, 4, 2, costs)
    assert fixed(2, 4, 2) is fixed(2, 4, 2)


@pytest.mark.parametrize(
    ("wire", "micro_batches", "in_flight", "goal"),
    [(0.4, 4, 2, 1.02), (0.7, 4, 2, 1.04), (1.0, 4, 2, 1.17), (1.0, 8, 3, 1.09), (1.5, 4, 2, 1.05), (3.0, 4, 2, 1.03)],
)
def test_plans_come_close_to_the_bound(wire: float, micro_batches: int, in_flight: int, goal: float):
    costs = even_costs(2, wire)
    timeline = simulate(planned(2, micro_batches, in_flight, costs), costs)
    assert timeline.bound_ms <= timeline.makespan_ms <= goal * timeline.bound_ms


def test_overlap_beats_the_sequential_order():
    costs = even_costs(2)
    assert simulate(planned(2, 4, 2, costs), costs).makespan_ms < 0.7 * simulate(sequential(2, 4), costs).makespan_ms
