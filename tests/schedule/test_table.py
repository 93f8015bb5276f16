from dataclasses import replace

import pytest

from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.table import (
    IllegalTable,
    actions,
    backward,
    check,
    check_courses,
    forward,
    from_text,
    peak_in_flight,
    sequential,
    to_text,
)


@pytest.mark.parametrize(("blocks", "micro_batches"), [(0, 1), (1, 1), (2, 3)])
def test_sequential_is_legal(blocks: int, micro_batches: int):
    table = sequential(blocks, micro_batches)
    check(table, blocks, micro_batches, in_flight=1)
    assert len(table) == micro_batches * (9 * blocks + 3)
    assert peak_in_flight(table) == 1


def swapped(table: list[Action], a: Action, b: Action) -> list[Action]:
    other = {a: b, b: a}
    return [other.get(action, action) for action in table]


ATTEND, EXPERTS = Phase.ATTEND, Phase.EXPERTS
BROKEN = {
    "complete": lambda table: table[:-1],
    "once": lambda table: [*table, table[0]],
    "after": lambda table: [table[1], table[0], *table[2:]],
    "order": lambda table: swapped(table, Action(Pass.WEIGHT, EXPERTS, 0, 0), Action(Pass.WEIGHT, EXPERTS, 0, 1)),
    "in_flight": lambda table: [table[21], *table[:21], *table[22:]],
}


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_rule_is_named(rule: str):
    table = sequential(2, 2)
    if rule == "order":  # both weight actions at the end, so that only their order is wrong
        last = [action for action in table if action.work is Pass.WEIGHT]
        table = [action for action in table if action.work is not Pass.WEIGHT] + last
    with pytest.raises(IllegalTable, match=f"^{rule}:") as error:
        check(BROKEN[rule](table), 2, 2, in_flight=1)
    assert error.value.rule == rule


def test_foreign_actions_are_refused():
    table = sequential(1, 1)
    with pytest.raises(IllegalTable, match="F attend 7 of 0, is no part"):
        check([replace(table[0], block=7), *table[1:]], 1, 1)


def test_transfers_come_before_those_who_wait():
    table = sequential(1, 1)
    early = swapped(table, Action(Pass.FORWARD, EXPERTS, 0, 0), Action(Pass.FORWARD, ATTEND, 1, 0))
    with pytest.raises(IllegalTable, match="F attend 1 of 0, comes before F experts 0 of 0"):
        check(early, 1, 1)


def test_text_round_trip():
    table = sequential(2, 2)
    text = to_text(table)
    assert text.splitlines()[2] == "F experts 0 of 0"
    assert from_text(f"# a comment\n\n{text}") == table


def test_the_text_names_the_stages_above_0():
    table = [*forward(1, 4, 2), *backward(1, 4, 2)]
    assert to_text(table).splitlines()[0] == "F attend 0 of 4 in 2"
    assert from_text(to_text(table)) == table


BAD_LINES = ["F attend 0", "F rest 0 of 1", "F attend x of 1", "F attend 0 in 1", "F attend 0 of 1 at 2"]


@pytest.mark.parametrize("line", [*BAD_LINES, "F attend 0 of 1 in", "F attend 0 of 1 in x", "F attend 0 of 1 in 2 3"])
def test_bad_text(line: str):
    with pytest.raises(IllegalTable, match="text:"):
        from_text(line)


# -- several stages ---------------------------------------------------------------------------------------------------

# A rank with stages 1 and 4, of two blocks and of none, and one micro-batch of each.
COURSES = {(1, 0): 2, (4, 0): 0, (1, 1): 2, (4, 1): 0}


def stages_in_turn() -> list[Action]:
    return [action for (stage, number), blocks in COURSES.items() for action in actions(blocks, number, stage)]


def test_courses_of_several_stages():
    check_courses(stages_in_turn(), COURSES)
    # Their forward passes first: all of them are there at once.
    table = sorted(stages_in_turn(), key=lambda action: action.work is not Pass.FORWARD)
    check_courses(table, COURSES)
    assert (peak_in_flight(stages_in_turn()), peak_in_flight(table)) == (1, 4)


def test_the_order_of_micro_batches_is_that_of_each_stage():
    """Stage 4 may end with micro-batch 1 before stage 1 begins, but neither may turn its own around."""
    parts = {course: [*actions(blocks, course[1], course[0])] for course, blocks in COURSES.items()}
    check_courses([*parts[4, 0], *parts[4, 1], *parts[1, 0], *parts[1, 1]], COURSES)
    with pytest.raises(IllegalTable, match="^order: line 5, B attend 0 of 0 in 4, comes after micro-batch 1"):
        check_courses([*parts[4, 1], *parts[4, 0], *parts[1, 0], *parts[1, 1]], COURSES)


def test_a_stage_of_another_rank_is_foreign():
    table = stages_in_turn()
    with pytest.raises(IllegalTable, match="^complete: line 1, F attend 0 of 0 in 2, is no part"):
        check_courses([replace(table[0], stage=2), *table[1:]], COURSES)
    with pytest.raises(IllegalTable, match="^complete: F attend 0 of 1 in 4 is missing"):
        check_courses([action for action in table if action.course != (4, 1)], COURSES)
