"""Phases of a pair interleave as in DeepSeek's trace, and every table stays legal."""

from random import Random

import pytest

from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.overlap import expand, pair
from dstrain.schedule.pipeline import Kind, Op
from dstrain.schedule.pipelines.choose import NAMES, make
from dstrain.schedule.table import backward, check_courses, forward, sender

AHEAD, BACK = Op(Kind.FORWARD, 0, 5), Op(Kind.BACKWARD, 1, 3)


def words(actions: list[Action]) -> list[str]:
    """For example `F attend 0`; forward in stage 0, backward in stage 1."""
    assert all(a.course == ((0, 5) if a.work is Pass.FORWARD else (1, 3)) for a in actions)
    return [f"{a.work.value} {a.phase.value} {a.block}" for a in actions]


def test_a_pair_runs_in_the_order_of_the_trace():
    begins = ["B attend 2", "W attend 2", "B shared 1", "W shared 1", "F attend 0", "F shared 0", "B experts 1"]
    goes_on = ["W experts 1", "F experts 0", "B attend 1", "W attend 1", "B shared 0", "W shared 0", "F attend 1"]
    ends = ["F shared 1", "B experts 0", "W experts 0", "F experts 1", "B attend 0", "W attend 0", "F attend 2"]
    assert words(list(pair(AHEAD, BACK, (2, 2)))) == begins + goes_on + ends


@pytest.mark.parametrize("blocks", [(1, 1), (3, 3), (4, 4)])
def test_every_transfer_of_a_pair_has_compute_of_the_other_pass_to_hide_under(blocks: tuple[int, int]):
    table = list(pair(AHEAD, BACK, blocks))
    for at, action in enumerate(table):
        need = sender(action, blocks[action.stage])
        if need is not None:
            between = {other.work is Pass.FORWARD for other in table[table.index(need) + 1 : at]}
            assert (action.work is not Pass.FORWARD) in between, action


@pytest.mark.parametrize("blocks", [(0, 2), (2, 0), (1, 3), (3, 1)])
def test_stages_of_a_pair_may_differ(blocks: tuple[int, int]):
    table = list(pair(AHEAD, BACK, blocks))
    before = [*forward(blocks[1], 3, 1)]
    check_courses([*before, *table, *backward(blocks[0], 5, 0)], {(0, 5): blocks[0], (1, 3): blocks[1]})


def test_a_short_forward_pass_is_not_held_up():
    """Its output leaves as soon as it is there: the next stage waits for it."""
    table = words(list(pair(AHEAD, BACK, (1, 3))))
    assert table[table.index("F attend 1") - 2 :][:4] == ["B attend 2", "W attend 2", "F attend 1", "B shared 1"]
    assert words(list(pair(AHEAD, BACK, (0, 1))))[:4] == ["B attend 1", "W attend 1", "F attend 0", "B shared 0"]


def test_a_pair_may_leave_weight_gradients_for_later():
    table = list(pair(AHEAD, Op(Kind.INPUT, 1, 3), (2, 2)))
    assert [a for a in table if a.work is Pass.WEIGHT] == []
    assert [a for a in pair(AHEAD, BACK, (2, 2)) if a.work is not Pass.WEIGHT] == table


@pytest.mark.parametrize("blocks", [(2, 2), (0, 0)])
def test_without_overlap_or_transfers_a_pair_runs_one_after_the_other(blocks: tuple[int, int]):
    plain = [*forward(blocks[0], 5, 0), *backward(blocks[1], 3, 1)]
    assert expand([(AHEAD, BACK)], blocks, overlap=False) == plain
    assert (expand([(AHEAD, BACK)], blocks, overlap=True) == plain) is (blocks == (0, 0))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_legal_with_any_stages(name: str, overlap: bool):
    made, generator = make(name, 4, 8), Random(name)
    for _ in range(5):
        blocks = [generator.randrange(4) for _ in range(made.layout.num_stages)]
        for rank, slots in enumerate(made.ranks):
            courses = {course: blocks[course[0]] for course, where in made.rank_of.items() if where == rank}
            table = expand(slots, blocks, overlap=overlap)
            check_courses(table, courses)
            assert len(table) == sum(9 * count + 3 for count in courses.values())


def test_the_halves_of_a_backward_pass_expand_apart():
    half = expand([(Op(Kind.INPUT, 1, 3),), (Op(Kind.WEIGHT, 1, 3),)], (0, 1), overlap=False)
    order = [(Phase.ATTEND, 1), (Phase.SHARED, 0), (Phase.EXPERTS, 0), (Phase.ATTEND, 0)]
    assert half == [Action(work, *place, 3, 1) for work in (Pass.BACKWARD, Pass.WEIGHT) for place in order]


def test_weight_gradients_fill_the_transfers_of_the_op_before_them():
    """Of the micro-batch itself, each comes behind the input gradients that it belongs to."""
    own = expand([(Op(Kind.INPUT, 1, 3),), (Op(Kind.WEIGHT, 1, 3),)], (0, 1), overlap=True)
    assert words(own) == [
        *("B attend 1", "W attend 1", "B shared 0", "B experts 0"),
        *("W shared 0", "W experts 0", "B attend 0", "W attend 0"),
    ]
    other = expand([(Op(Kind.FORWARD, 0, 5),), (Op(Kind.WEIGHT, 1, 3),)], (1, 1), overlap=True)
    assert words(other) == [
        *("F attend 0", "W attend 1", "W shared 0", "F shared 0", "F experts 0"),
        *("W experts 0", "W attend 0", "F attend 1"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_weight_gradients_keep_their_order(name: str):
    """From course to course, also of different stages: sums of what they share are formed in one order."""
    made = make(name, 4, 8)
    for slots in made.ranks:
        tables = [expand(slots, [2] * made.layout.num_stages, overlap=overlap) for overlap in (True, False)]
        weights = [[action.course for action in table if action.work is Pass.WEIGHT] for table in tables]
        assert weights[0] == weights[1]
        assert tables[0] != tables[1] or name in ("1f1b", "interleaved")
