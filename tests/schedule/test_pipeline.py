"""The checker: what it lets pass is in the tests of the schedules; here is what it finds."""

from dataclasses import replace

import pytest

from dstrain.schedule.pipeline import Kind, Layout, Op, Pipeline, Products, Slot, check, walk
from dstrain.schedule.pipelines.choose import make
from dstrain.schedule.table import IllegalTable


def op(text: str) -> Op:
    stage, _, micro_batch = text[1:].partition(".")
    return Op(Kind(text[0]), int(stage), int(micro_batch))


def line(text: str) -> tuple[Slot, ...]:
    """Slots apart by spaces, the ops of a pair by &."""
    return tuple(tuple(op(name) for name in slot.split("&")) for slot in text.split())


def pipeline(*lines: str, micro_batches: int = 2, layout: Layout | None = None) -> Pipeline:
    ranks = tuple(line(text) for text in lines)
    return Pipeline("test", layout or Layout.looped(len(lines), 1), micro_batches, ranks)


FIRST, SECOND = "F0.0 F0.1 B0.0 B0.1", "F1.0 B1.0 F1.1 I1.1 W1.1"


def test_legal():
    check(pipeline(FIRST, SECOND))


@pytest.mark.parametrize(
    ("rule", "reason", "lines"),
    [
        ("complete", "stage 0 sees F of micro-batch 1, instead of F B or F I W", ["F0.0 F0.1 B0.0", SECOND]),
        ("complete", "stage 1 sees F I of micro-batch 1", [FIRST, "F1.0 B1.0 F1.1 I1.1"]),
        ("complete", "stage 1 sees nothing of micro-batch 1", [FIRST, "F1.0 B1.0"]),
        ("complete", "F0.2 on rank 0: there are 2 micro-batches", [FIRST + " F0.2", SECOND]),
        ("once", "F0.1 on rank 0", ["F0.0 F0.1 B0.0 F0.1 B0.1", SECOND]),
        ("once", "W1.1 on rank 1", [FIRST, SECOND + " W1.1"]),
        ("once", "I1.0 on rank 1", [FIRST, "F1.0 B1.0 I1.0 F1.1 B1.1"]),
        ("once", "B1.1 on rank 1", [FIRST, SECOND + " B1.1"]),
        ("once", "B0.1 on rank 0", [FIRST + " B0.1", SECOND]),
        ("once", "W0.1 on rank 0", [FIRST + " W0.1", SECOND]),
        ("home", "rank 1 runs F0.1, but holds stages (1,)", ["F0.0 B0.0", SECOND + " F0.1"]),
        ("order", "W1.0 on rank 1 comes after micro-batch 1", [FIRST, "F1.0 I1.0 F1.1 I1.1 W1.1 W1.0"]),
        ("order", "B1.0 on rank 1 comes after micro-batch 1", [FIRST, "F1.0 F1.1 B1.1 B1.0"]),
        ("slot", "(F0.1&B0.1)", ["F0.0 B0.0 F0.1&B0.1", SECOND]),
        ("slot", "(B0.0&F0.1)", ["F0.0 B0.0&F0.1 B0.1", SECOND]),
        ("slot", "(F1.1&W1.0)", [FIRST, "F1.0 I1.0 F1.1&W1.0 B1.1"]),
    ],
)
def test_broken_rule_is_named(rule: str, reason: str, lines: list[str]):
    table = pipeline(*lines)
    with pytest.raises(IllegalTable) as error:
        check(table)
    assert error.value.rule == rule
    assert reason in str(error.value).replace(" & ", "&")


@pytest.mark.parametrize(
    ("lines", "waits"),
    [
        # Rank 1 wants the micro-batches the other way round.
        (
            ["F0.0 B0.0 F0.1 B0.1", "F1.1 B1.1 F1.0 B1.0"],
            [
                "rank 0 waits in B0.0 for the input gradient of stage 1 for micro-batch 0",
                "rank 1 waits in F1.1 for the output of stage 0 for micro-batch 1",
            ],
        ),
        # A rank that stands in its own way.
        ([FIRST, "B1.0 F1.0 F1.1 B1.1"], ["rank 1 waits in B1.0 for the output of stage 1 for micro-batch 0"]),
        ([FIRST, "F1.0 W1.0 I1.0 F1.1 B1.1"], ["rank 1 waits in W1.0 for the input gradient of stage 1"]),
        # A pair begins when both of its inputs are there: either rank's pair needs what the other's would give.
        (
            ["F0.0 F0.1&B0.0 B0.1", "F1.0 F1.1&B1.0 B1.1"],
            ["rank 0 waits in F0.1 & B0.0 for the input", "rank 1 waits in F1.1 & B1.0 for the output"],
        ),
    ],
)
def test_deadlock_says_who_waits_for_what(lines: list[str], waits: list[str]):
    table = pipeline(*lines)
    # `check` would name the order of weight gradients first in one of them.
    with pytest.raises(IllegalTable, match="^deadlock:") as error:
        list(walk(table))
    for wait in waits:
        assert wait in str(error.value)


def test_deadlock_is_part_of_the_check():
    with pytest.raises(IllegalTable, match="^deadlock: .*rank 1 waits in B1.0"):
        check(pipeline("F0.0 B0.0", "B1.0 F1.0", micro_batches=1))


def test_a_micro_batch_stays_on_the_rank_where_its_stage_began():
    layout = Layout.bidirectional(2)
    lines = ["F0.0 F0.1 F1.1 B1.1 B0.0 B0.1", "F1.0 B1.0"]
    check(pipeline(*lines, layout=layout))
    with pytest.raises(IllegalTable, match=r"home: rank 1 runs B1.1, whose stage rank 0 runs for it"):
        check(pipeline("F0.0 F0.1 F1.1 B0.0 B0.1", "F1.0 B1.0 B1.1", layout=layout))


def test_a_slot_is_never_empty():
    table = pipeline(FIRST, SECOND)
    with pytest.raises(IllegalTable, match="^slot:"):
        check(replace(table, ranks=((*table.ranks[0], ()), table.ranks[1])))


def test_ranks_are_those_of_the_layout():
    with pytest.raises(IllegalTable, match="home: 1 ranks run, 2 hold stages"):
        check(pipeline(FIRST, layout=Layout.looped(2, 1)))


def test_walk_gives_every_slot_behind_its_needs():
    table = make("dualpipe", 4, 8)
    products = Products(table.layout.num_stages, table.micro_batches)
    made: set[int] = set()
    walked: list[list[Slot]] = [[] for _ in table.ranks]
    for rank, slot in walk(table):
        assert made.issuperset(need for op in slot for need in products.needs(op))
        made |= {products.of(op) for op in slot}
        walked[rank].append(slot)
    assert [tuple(slots) for slots in walked] == list(table.ranks)


def test_rank_of():
    table = make("zb_v", 3, 5)
    assert [table.rank_of[stage, 4] for stage in range(6)] == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize(
    ("layout", "held", "copies"),
    [
        (Layout.looped(2, 1), ((0,), (1,)), 1),
        (Layout.looped(2, 3), ((0, 2, 4), (1, 3, 5)), 1),
        (Layout.folded(3), ((0, 5), (1, 4), (2, 3)), 1),
        (Layout.bidirectional(4), ((0, 3), (1, 2), (2, 1), (3, 0)), 2),
    ],
)
def test_layouts(layout: Layout, held: tuple[tuple[int, ...], ...], copies: int):
    assert (layout.held, layout.copies) == (held, copies)
    assert layout.num_stages == 1 + max(max(stages) for stages in held)
