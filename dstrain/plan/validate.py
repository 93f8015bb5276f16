"""How far predictions are from measurements: signed errors, summed up by group, and layouts in their order.

An error is 100 * (predicted - measured) / measured in the metric of its row. A group says how far its rows are off in
the middle, at the 90th percentile and at most, and which way (the mean of the signed errors, in the metric's own
direction of time: above 0 means that runs took less time than predicted).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, median, quantiles

# Measurements closer to each other than this have no order that a prediction could miss: runs differ by as much from
# day to day.
SAME_PCT = 1.0


@dataclass(frozen=True)
class Outcome:
    """A measured run and what was predicted for it."""

    id: str
    group: str
    # step_s | tok_s_gpu | tflops | gpu_h_per_T | pair_ms | mem_gib, and both values in it.
    metric: str
    predicted: float
    measured: float
    is_moe: bool = False
    multi_node: bool = False
    # Runs that differ in nothing but their layout have the same: model, machine, batch, numbers.
    rivals: tuple[str | float, ...] = ()
    # Of a step, predicted and measured; 0 for memory.
    predicted_s: float = 0.0
    measured_s: float = 0.0

    @property
    def error_pct(self) -> float:
        return 100 * (self.predicted - self.measured) / self.measured

    @property
    def is_memory(self) -> bool:
        return self.metric == "mem_gib"

    @property
    def bias_pct(self) -> float:
        """The error of the time, or of the memory: where a metric falls as time grows, the other way round."""
        if self.predicted_s:
            return 100 * (self.predicted_s - self.measured_s) / self.measured_s
        return self.error_pct


@dataclass(frozen=True)
class Summary:
    """Of the sizes of errors, in percent; `bias` of the signed ones."""

    name: str
    count: int
    median: float
    p90: float
    maximum: float
    bias: float


def summary(name: str, outcomes: Sequence[Outcome]) -> Summary:
    """Raises ValueError without outcomes."""
    sizes = [abs(outcome.error_pct) for outcome in outcomes]
    bias = mean(outcome.bias_pct for outcome in outcomes)
    p90 = quantiles(sizes, n=10, method="inclusive")[8] if len(sizes) > 1 else sizes[0]
    return Summary(name, len(sizes), median(sizes), p90, max(sizes), bias)


def by_group(outcomes: Iterable[Outcome]) -> list[Summary]:
    """In the order of their first rows; the memory of a group stands by itself."""
    groups: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[f"{outcome.group}, memory" if outcome.is_memory else outcome.group].append(outcome)
    return [summary(name, members) for name, members in groups.items()]


def by_kind(outcomes: Sequence[Outcome]) -> list[Summary]:
    """Of what the planner should be good at; kinds without rows are left out."""
    times = [outcome for outcome in outcomes if not outcome.is_memory]
    kinds = {
        "dense, several nodes": [o for o in times if o.multi_node and not o.is_moe],
        "MoE, several nodes": [o for o in times if o.multi_node and o.is_moe],
        "dense, one node": [o for o in times if not o.multi_node and not o.is_moe],
        "MoE, one node": [o for o in times if not o.multi_node and o.is_moe],
        "memory": [outcome for outcome in outcomes if outcome.is_memory],
    }
    return [summary(name, members) for name, members in kinds.items() if members]


@dataclass(frozen=True)
class Ranking:
    """Of layouts of one model on one machine with one batch."""

    # All pairs, and those that were measured further apart than SAME_PCT; of each, how many are in the right order.
    pairs: int
    right: int
    distinct: int
    distinct_right: int
    # By set of rivals: the measured time of the layout that is predicted to be the best, over the best measured one,
    # less 1, in percent; with the id of that layout.
    regrets_pct: tuple[tuple[str, float], ...]

    @property
    def worst_regret_pct(self) -> float:
        return max((regret for _, regret in self.regrets_pct), default=0.0)


def ranking(outcomes: Iterable[Outcome]) -> Ranking:
    sets: defaultdict[tuple[str | float, ...], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.predicted_s:
            sets[outcome.rivals].append(outcome)
    pairs = [pair for members in sets.values() for pair in combinations(members, 2)]
    distinct = [pair for pair in pairs if _apart_pct(*pair) > SAME_PCT]
    regrets = tuple(_regret(members) for members in sets.values() if len(members) > 1)
    return Ranking(len(pairs), sum(map(_in_order, pairs)), len(distinct), sum(map(_in_order, distinct)), regrets)


def _apart_pct(a: Outcome, b: Outcome) -> float:
    return 100 * (max(a.measured_s, b.measured_s) / min(a.measured_s, b.measured_s) - 1)


def _in_order(pair: tuple[Outcome, Outcome]) -> bool:
    a, b = pair
    return (a.predicted_s - b.predicted_s) * (a.measured_s - b.measured_s) > 0


def _regret(rivals: Sequence[Outcome]) -> tuple[str, float]:
    chosen = min(rivals, key=lambda outcome: outcome.predicted_s)
    best_s = min(outcome.measured_s for outcome in rivals)
    return chosen.id, 100 * (chosen.measured_s / best_s - 1)
