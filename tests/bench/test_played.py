"""A step of a pipeline in real processes against its own table."""

from functools import cache

import pytest

from dstrain.bench.case import Case, parse
from dstrain.bench.chain import Chain, Layer
from dstrain.bench.emulate import Clock, Emulated
from dstrain.bench.pipeline import Staged
from dstrain.bench.played import Played, executed, played
from dstrain.bench.worker import drawn
from dstrain.bench.workload import SHARES, Workload
from dstrain.comm.trace import CommTotals, Label, Span
from dstrain.config.schema import Config, DispatchConfig, ModelConfig
from dstrain.dispatch.choose import make_dispatcher
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.simulate import Costs, even_costs
from tests.gloo.spawn import spawn
from tests.tiny import CPU

ORDERS = ("1f1b+block", "1f1b+overlap", "zb_v", "dualpipev+overlap")
MESH, WORK, BLOCK_MS = Mesh(pp=2, ep=2), Workload(2, 1, 64, 4, 2, 16, 4, 4), 6.0
Accounts = dict[tuple[Case, bool], CommTotals]


def recorded(rank: int, world: int) -> Accounts:
    groups = connect(MESH, Place(rank, world, CPU), ranks_per_node=1)
    model = ModelConfig(hidden_size=64, num_experts=4, experts_per_token=2)
    dispatcher = make_dispatcher(Config(model=model, dispatch=DispatchConfig(kind="alltoall")), groups)
    compute, found = Emulated(Clock(), BLOCK_MS, WORK.blocks), {}
    chain = Chain([Layer(dispatcher, compute, block) for block in range(4)], WORK.routes(groups.coordinate.ep))
    for case in map(parse, (f"alltoall/bfloat16/{order}" for order in ORDERS)):
        staged = Staged(case, groups, WORK, chain)
        for alone in (True, False):
            groups.trace.keeps_spans = True
            staged.step(drawn(WORK, rank), staged.alone if alone else None)
            found[case, alone] = groups.trace.take()
    return found


@cache
def accounts() -> list[Accounts]:
    return spawn(recorded, 4, timeout_s=120)


def of(order: str, line: Costs) -> Played:
    case = parse(f"alltoall/bfloat16/{order}")
    alone, usual = ([account[case, serial] for account in accounts()] for serial in (True, False))
    return played(case, MESH, WORK, line, alone, usual)


@pytest.mark.parametrize(
    ("order", "peaks"), [("1f1b+overlap", [4, 2]), ("zb_v", [4, 4]), ("dualpipev+overlap", [5, 5])]
)
def test_a_step_runs_its_table(order: str, peaks: list[int]):
    found = of(order, even_costs(4, wire=0.0))
    assert found.as_table
    assert found.peak_live == found.table_peak_live == peaks


def test_phases_are_those_that_were_slept():
    found = of("zb_v", even_costs(4, wire=0.0))
    assert found.simulated_ms is not None
    # Two blocks of each rank, three passes, four micro-batches.
    least_ms = 2 * 3 * 4 * BLOCK_MS * sum(SHARES.values())
    assert least_ms <= found.phases_ms < found.simulated_ms
    # A bubble of two stages, and no rank waits for more than all that the other does.
    assert found.simulated_ms < 2 * (found.phases_ms + 4 * 16 * found.latency_ms + 16 * found.message_ms)
    assert found.message_ms > 0


def test_a_line_that_takes_longer_delays_all_who_share_it():
    """All of a transfer is then on the line, and lines are what the step waits for."""
    free, narrow = of("zb_v", even_costs(4, wire=0.0)), of("zb_v", even_costs(4, wire=1e6))
    assert free.latency_ms > 0
    assert narrow.latency_ms == 0
    assert narrow.simulated_ms > free.simulated_ms


def test_what_stands_still_is_not_simulated():
    found = of("1f1b+block", even_costs(4, wire=0.0))
    assert found.simulated_ms is None
    assert found.as_table


def test_a_log_is_in_the_order_of_beginnings_and_has_no_waits():
    label = Label(block=3, micro_batch=2, direction="backward", stage=1)
    spans = [Span("experts", label, 5.0, 9.0), Span("wait dispatch", label, 3.0, 4.0), Span("attend", label, 1.0, 2.0)]
    account = CommTotals(0.0, 0.0, {}, {}, [], spans)
    stages = [range(2), range(2, 4)]
    expected = [Action(Pass.BACKWARD, phase, 1, 2, 1) for phase in (Phase.ATTEND, Phase.EXPERTS)]
    assert executed(account, stages) == expected
