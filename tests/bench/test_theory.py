"""Theory against counts made by hand."""

from dstrain.bench import theory
from dstrain.bench.case import parse
from dstrain.bench.testbed import Fabric
from dstrain.bench.workload import SHARES, Workload, all_routes
from dstrain.plan.traffic import Way
from dstrain.schedule.action import Pass, Phase

WORK = Workload(2, 2, 256, 16, 6, 64, 2, 3)


def rows_to_the_other_node(row_per_expert: bool) -> list[int]:
    """By node, rows of a step that leave it."""
    rows = [0, 0]
    for rank, routes in enumerate(all_routes(WORK)):
        for token in (token for block in routes for route in block for token in route.experts_TK.tolist()):
            there = [expert for expert in token if expert // 8 != rank // 2]
            rows[rank // 2] += len(there) if row_per_expert else bool(there)
    return rows


def test_payload_of_a_flat_and_of_a_hierarchical_step():
    for name, row_per_expert in (("alltoall", True), ("hierarchical", False)):
        out = rows_to_the_other_node(row_per_expert)
        # A node sends rows out, and sends home what came in, forward and backward.
        least = 2 * 512 * (out[0] + out[1])
        most_sent = theory.traffic(WORK, parse(name)).most_sent()
        assert least < most_sent < least * 1.02


def test_fp8_shrinks_rows_out_and_not_home():
    wide, narrow = (theory.traffic(WORK, parse(f"rank/{wire}")) for wire in ("bfloat16", "fp8"))
    assert narrow.busiest(Way.COMBINE) == wide.busiest(Way.COMBINE)
    assert 0.5 < narrow.busiest(Way.COMBINE_GRADIENT) / wide.busiest(Way.COMBINE_GRADIENT) < 0.53


def test_costs_are_those_of_a_micro_batch_and_block():
    case = parse("hierarchical/fp8")
    costs = theory.costs(WORK, case, 10.0, Fabric(2, 100.0))
    assert sum(costs.compute_ms[Pass.WEIGHT, phase, 1] for phase in Phase) == 10.0
    assert costs.compute_ms[Pass.FORWARD, Phase.SHARED, 0] == 10.0 * SHARES[Phase.SHARED]
    whole = sum(costs.transfer_ms.values()) * WORK.micro_batches
    least = theory.line_ms(theory.traffic(WORK, case).busiest(*Way), 100.0, 1500)
    assert least <= whole < 1.05 * least
    # A loopback as slow as that takes longer than the network.
    slow = theory.costs(WORK, case, 10.0, Fabric(2, 100.0, loopback_mbit=50.0))
    assert all(slow.transfer_ms[way] > costs.transfer_ms[way] for way in costs.transfer_ms)
