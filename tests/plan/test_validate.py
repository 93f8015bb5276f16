"""Errors, their summaries and the order of layouts, of outcomes made by hand."""

from dataclasses import replace

import pytest

from dstrain.plan.validate import Outcome, by_group, by_kind, ranking, summary


def timed(name: str, predicted_s: float, measured_s: float, **others) -> Outcome:
    values = {"predicted": predicted_s, "measured": measured_s}
    values |= {"predicted_s": predicted_s, "measured_s": measured_s, "group": "g", "metric": "step_s"}
    return Outcome(id=name, **{**values, **others})


def test_errors_have_a_sign():
    assert timed("slow", 11.0, 10.0).error_pct == pytest.approx(10)
    assert timed("quick", 9.0, 10.0).error_pct == pytest.approx(-10)


def test_a_bias_is_that_of_the_time():
    """More tokens a second than measured are too little time."""
    quick = timed("quick", 8.0, 10.0, metric="tok_s_gpu", predicted=125.0, measured=100.0)
    assert quick.error_pct == pytest.approx(25)
    assert quick.bias_pct == pytest.approx(-20)
    memory = Outcome("m", "g", "mem_gib", predicted=44.0, measured=40.0)
    assert memory.bias_pct == memory.error_pct == pytest.approx(10)


def test_summary():
    outcomes = [timed(str(n), 10.0 + n, 10.0) for n in range(-4, 7)]
    found = summary("all", outcomes)
    # Sizes 0 to 60 percent: 0, 10, 10, 20, 20, 30, 30, 40, 40, 50, 60.
    assert (found.count, found.median, found.p90, found.maximum) == (11, 30, 50, 60)
    assert found.bias == pytest.approx(10)


def test_one_row_is_its_own_percentile():
    found = summary("one", [timed("a", 9.0, 10.0)])
    assert (found.median, found.p90, found.maximum, found.bias) == pytest.approx((10, 10, 10, -10))


def test_memory_stands_by_itself():
    outcomes = [timed("a", 9.0, 10.0), Outcome("a:mem", "g", "mem_gib", 44.0, 40.0), timed("b", 1.0, 1.0, group="h")]
    assert [(found.name, found.count) for found in by_group(outcomes)] == [("g", 1), ("g, memory", 1), ("h", 1)]


def test_kinds():
    outcomes = [
        timed("a", 1.0, 1.0, multi_node=True),
        timed("b", 1.0, 1.0, multi_node=True, is_moe=True),
        timed("c", 1.0, 1.0, is_moe=True),
        Outcome("c:mem", "g", "mem_gib", 44.0, 40.0, is_moe=True),
    ]
    assert [found.name for found in by_kind(outcomes)] == [
        "dense, several nodes",
        "MoE, several nodes",
        "MoE, one node",
        "memory",
    ]


RIVALS = [timed("a", 1.0, 2.0), timed("b", 1.1, 1.9), timed("c", 1.2, 3.0), timed("d", 1.3, 3.01)]


def test_ranking():
    """Predicted a b c d, measured b a c d: of six pairs, only a and b are the wrong way round; c and d are no pair."""
    found = ranking(RIVALS)
    assert (found.right, found.pairs) == (5, 6)
    assert (found.distinct_right, found.distinct) == (4, 5)
    ((chosen, regret),) = found.regrets_pct
    assert chosen == "a"
    assert found.worst_regret_pct == regret == pytest.approx(100 * (2.0 / 1.9 - 1))


def test_only_rivals_are_ranked():
    apart = [replace(outcome, rivals=(outcome.id,)) for outcome in RIVALS]
    memory = Outcome("m", "g", "mem_gib", 44.0, 40.0)
    found = ranking([*apart, memory])
    assert (found.pairs, found.regrets_pct, found.worst_regret_pct) == (0, (), 0.0)
