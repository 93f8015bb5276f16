"""Tables played by hand, and pipelines against the stage-level player."""

from dataclasses import replace
from itertools import pairwise

import pytest

from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.figures import StageCosts, play
from dstrain.schedule.overlap import expand
from dstrain.schedule.pipeline import Kind
from dstrain.schedule.pipelines.choose import make
from dstrain.schedule.simulate import Costs, Timeline, even_costs, simulate, simulate_ranks
from dstrain.schedule.table import IllegalTable, sequential

KINDS = {Kind.FORWARD: Pass.FORWARD, Kind.BACKWARD: Pass.BACKWARD, Kind.INPUT: Pass.BACKWARD, Kind.WEIGHT: Pass.WEIGHT}


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


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_1p", "zb_v"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 12)])
def test_stages_without_experts_are_played_as_slots_are(name: str, ranks: int, micro_batches: int):
    """A full backward pass gives its output at the end of the slot, a table between its two halves: W is 0 there."""
    weight_ms = 1.5 if name.startswith("zb") else 0.0
    made = make(name, ranks, micro_batches)
    stages = range(made.layout.num_stages)
    slots_ms = StageCosts(
        tuple(1 + 0.1 * s for s in stages), tuple(2 + 0.1 * s for s in stages), (weight_ms,) * len(stages), 1.0, 0.25
    )
    times = zip(slots_ms.forward_ms, slots_ms.input_ms, slots_ms.weight_ms, strict=True)
    costs = [Costs({(w, Phase.ATTEND, 0): ms for w, ms in zip(Pass, each, strict=True)}, {}) for each in times]
    tables = [expand(slots, [0] * len(stages), overlap=False) for slots in made.ranks]
    timelines = simulate_ranks(tables, costs, range(ranks), pipe_ms=0.25)
    for timeline, spans in zip(timelines, play(made, slots_ms), strict=True):
        found = {interval.work: (interval.start_ms, interval.end_ms) for interval in timeline.computes}
        for span in spans:
            op = span.slot[0]
            action = Action(KINDS[op.kind], Phase.ATTEND, 0, op.micro_batch, op.stage)
            assert found[action] == pytest.approx((span.start_ms, span.end_ms))


def two_stages(links: list[int], micro_batches: int) -> list[Timeline]:
    made = make("1f1b", 2, micro_batches)
    tables = [expand(slots, [1, 1], overlap=False) for slots in made.ranks]
    return simulate_ranks(tables, [even_costs(1), even_costs(1)], links, pipe_ms=2.0)


def test_a_stage_begins_when_the_one_before_has_ended():
    first, second = two_stages([0, 0], 1)
    whole = simulate(sequential(2, 1), even_costs(2))
    (end_ms,) = (i.end_ms for i in whole.computes if i.work == Action(Pass.FORWARD, Phase.ATTEND, 2, 0))
    (own_ms,) = (i.end_ms for i in second.computes if i.work == Action(Pass.FORWARD, Phase.ATTEND, 1, 0, 1))
    assert own_ms == pytest.approx(end_ms + 2.0)
    back = {i.work: i.end_ms for i in second.computes}[Action(Pass.BACKWARD, Phase.ATTEND, 0, 0, 1)]
    turn = {i.work: i.start_ms for i in first.computes}[Action(Pass.BACKWARD, Phase.ATTEND, 1, 0)]
    assert turn == pytest.approx(back + 2.0)


@pytest.mark.parametrize(("links", "shares"), [([0, 0], True), ([0, 1], False)])
def test_ranks_of_a_node_take_turns_on_its_link(links: list[int], shares: bool):
    timelines = two_stages(links, 6)
    transfers = sorted((i.start_ms, i.end_ms) for timeline in timelines for i in timeline.transfers)
    assert len(transfers) == 2 * 6 * 4
    in_turn = all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(transfers))
    assert in_turn is shares


def test_ranks_that_wait_for_each_other():
    ahead, back = (expand(slots, [1, 1], overlap=False) for slots in make("1f1b", 2, 1).ranks)
    backward_first = sorted(ahead, key=lambda action: action.work is Pass.FORWARD)
    with pytest.raises(IllegalTable) as caught:
        simulate_ranks([backward_first, back], [even_costs(1)] * 2, [0, 0])
    assert caught.value.rule == "deadlock"
    assert "rank 0 waits in B attend 1 of 0 for B attend 0 of 0 in 1" in str(caught.value)
    assert "rank 1 waits in F attend 0 of 0 in 1 for F attend 1 of 0" in str(caught.value)
