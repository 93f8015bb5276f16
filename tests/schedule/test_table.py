from dataclasses import replace

import pytest

from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.table import IllegalTable, check, from_text, peak_in_flight, sequential, to_text


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


@pytest.mark.parametrize("line", ["F attend 0", "F rest 0 of 1", "F attend x of 1", "F attend 0 in 1"])
def test_bad_text(line: str):
    with pytest.raises(IllegalTable, match="text:"):
        from_text(line)
