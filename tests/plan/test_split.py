"""Layers to stages, against trying every split."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from dstrain.config import load
from dstrain.config.schema import Config, ModelConfig, MtpConfig, PartCosts, ScheduleConfig
from dstrain.plan.count import flops_per_token
from dstrain.plan.split import Stage, part_costs, planned, split, stage_cost, whole

MODEL = ModelConfig(vocab_size=320, num_layers=7, num_dense_layers=2, mtp=MtpConfig(depth=1))
CONFIG = Config(model=MODEL)


def every_split(layers: int, stages: int):
    for cuts in combinations(range(1, layers), stages - 1):
        yield tuple(stop - start for start, stop in pairwise((0, *cuts, layers)))


def listed(sizes: tuple[int, ...] | None, config: Config = CONFIG) -> Config:
    return replace(config, schedule=replace(config.schedule, split=sizes))


def stage_costs(sizes: tuple[int, ...], config: Config) -> list[float]:
    costs = part_costs(config)
    return [stage_cost(config.model, costs, stage) for stage in split(listed(sizes, config), len(sizes))]


def test_one_stage():
    assert whole(MODEL) == Stage(range(7), is_first=True, is_last=True)
    assert split(CONFIG, 1) == (whole(MODEL),)


def test_a_listed_split():
    first, middle, last = split(listed((1, 4, 2)), 3)
    assert first == Stage(range(1), is_first=True, is_last=False)
    assert middle == Stage(range(1, 5), is_first=False, is_last=False)
    assert last == Stage(range(5, 7), is_first=False, is_last=True)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize(
    "part_ms",
    [PartCosts(), PartCosts(1, 3, 5, 8, 2), PartCosts(9, 1, 1, 1, 1), PartCosts(0.3, 0.7, 1.1, 5.3, 2.9)],
    ids=["flops", "ms", "heavy_embedding", "heavy_mtp"],
)
def test_no_split_is_better(stages: int, part_ms: PartCosts):
    config = replace(CONFIG, schedule=ScheduleConfig(part_ms=part_ms))
    chosen = planned(MODEL, part_costs(config), stages)
    ranked = {}
    for sizes in every_split(7, stages):
        costs = stage_costs(sizes, config)
        ranked[sizes] = max(costs), sum(cost**2 for cost in costs)
    longest, squares = min(ranked.values())
    assert ranked[chosen][0] == longest
    assert ranked[chosen][1] == pytest.approx(squares, rel=1e-12)


def test_stages_cost_the_model():
    for stages in (1, 2, 5):
        sizes = planned(MODEL, part_costs(CONFIG), stages)
        assert sum(stage_costs(sizes, CONFIG)) == flops_per_token(MODEL, CONFIG.train.seq_len)


def test_measured_costs_decide():
    """Where dense layers take as long as four with experts, both are stages of their own."""
    config = replace(CONFIG, schedule=ScheduleConfig(part_ms=PartCosts(dense=4, moe=1, mtp=0, head=1)))
    assert part_costs(config) == config.schedule.part_ms
    assert [stage.layers for stage in split(config, 4)] == [range(1), range(1, 2), range(2, 5), range(5, 7)]


def test_deepseek_v3_on_16_stages():
    """Head and MTP module, which uses it again, cost as much as four layers: one layer is left for the last stage."""
    config = load.compose("verify", ["model=deepseek_v3", "train.seq_len=4096"])
    sizes = planned(config.model, part_costs(config), 16)
    assert sizes == (4,) * 15 + (1,)
    costs = stage_costs(sizes, config)
    assert max(costs) == costs[-1] == pytest.approx(19.77e9, rel=1e-3)
