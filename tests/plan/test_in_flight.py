"""Peaks that are walked once stand for steps of any length."""

import pytest

from dstrain.plan.in_flight import peaks
from dstrain.schedule.pipelines.choose import NAMES, make, rule_broken


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overlap", [False, True])
def test_short_steps_show_the_peaks_of_long_ones(name: str, overlap: bool) -> None:
    for ranks in (2, 3, 4, 6):
        for micro_batches in (1, 2, 5, 2 * ranks, 4 * ranks + 1, 6 * ranks, 7 * ranks + 2):
            if not rule_broken(name, ranks, micro_batches, 2):
                quick = peaks(name, ranks, 2, micro_batches, overlap)
                exact = peaks(name, ranks, 2, micro_batches, overlap, exact=True)
                assert [set(rank) for rank in quick] == [set(rank) for rank in exact]


def test_1f1b_holds_a_micro_batch_for_each_stage_behind() -> None:
    found = peaks("1f1b", 4, 1, 16, False)
    assert [max(sum(moment.live) for moment in rank) for rank in found] == [4, 3, 2, 1]


def test_dualpipe_holds_one_more_than_it_has_ranks() -> None:
    """As published (DeepSeek-V3, table 2), on the ranks where both streams meet longest."""
    found = peaks("dualpipe", 8, 1, 40, False)
    assert max(sum(moment.live) for rank in found for moment in rank) == 9


def test_put_off_gradients_are_counted_where_the_table_has_them() -> None:
    found = peaks("zb_1p", 4, 1, 16, False)
    most = [max(sum(moment.pending) for moment in rank) for rank in found]
    # Rank p stays p weight gradients behind (zero_bubble.py); at the start of the next one it has one more.
    assert most == [1, 2, 3, 4]
    slots = make("zb_1p", 4, 16).ranks[3]
    assert [op.kind.value for slot in slots[:4] for op in slot] == ["F", "I", "F", "I"]
