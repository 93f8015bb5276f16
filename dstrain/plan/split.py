"""Layers to pipeline stages: contiguous runs, as the config lists them or so that the costliest stage costs least.

The first stage also embeds; the last one also holds the final norm, the head and the MTP modules. A stage takes as long
as its parts, and a pipeline as long as its slowest stage: that one is made as quick as it can be, and of all splits
that reach this, the most even one is taken (the least sum of squares).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

from dstrain.config.schema import Config, ModelConfig, PartCosts
from dstrain.plan.count import part_flops


@dataclass(frozen=True)
class Stage:
    """What a stage holds. The first one embeds; the last one has the final norm, the head and the MTP modules."""

    layers: range
    is_first: bool
    is_last: bool


def whole(model: ModelConfig) -> Stage:
    """The model as one stage."""
    return Stage(range(model.num_layers), True, True)


def embeds_at_end(model: ModelConfig) -> bool:
    """Whether the last stage uses the embedding, too: as the head, or for multi-token prediction."""
    return model.tie_embeddings or model.mtp.depth > 0


def moe_blocks(model: ModelConfig, stage: Stage) -> int:
    """MoE blocks of a stage, those of MTP modules included, which are built like the last layer."""
    layers = len(range(max(stage.layers.start, model.num_dense_layers), stage.layers.stop))
    mtp_moe = stage.is_last and model.num_dense_layers < model.num_layers
    return layers + (model.mtp.depth if mtp_moe else 0)


def split(config: Config, num_stages: int) -> tuple[Stage, ...]:
    """The stages of a checked config, in the order in which a micro-batch passes them."""
    sizes = config.schedule.split or planned(config.model, part_costs(config), num_stages)
    cuts = [0, *accumulate(sizes)]
    return tuple(Stage(range(*cut), cut[0] == 0, cut[1] == cuts[-1]) for cut in pairwise(cuts))


def part_costs(config: Config) -> PartCosts:
    """What the parts of the model cost: measured ms where the config has them, otherwise FLOPs of a token."""
    if config.schedule.part_ms != PartCosts():
        return config.schedule.part_ms
    return part_flops(config.model, config.train.seq_len)


def stage_cost(model: ModelConfig, costs: PartCosts, stage: Stage) -> float:
    """The sum of a stage's parts, in the unit of `costs`."""
    dense = len(range(stage.layers.start, min(stage.layers.stop, model.num_dense_layers)))
    layers = dense * costs.dense + (len(stage.layers) - dense) * costs.moe
    return layers + stage.is_first * costs.embedding + stage.is_last * (costs.head + model.mtp.depth * costs.mtp)


def planned(model: ModelConfig, costs: PartCosts, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage; the model has at least as many layers as there are stages.

    Of equally good answers the one with the smallest early stages, which keep activations longest.
    """
    limit, _ = _best_cuts(model, costs, num_stages, inf, max)
    _, sizes = _best_cuts(model, costs, num_stages, limit, lambda before, cost: before + cost * cost)
    return sizes


def _best_cuts(
    model: ModelConfig, costs: PartCosts, num_stages: int, limit: float, add: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The least sum, as `add` adds, over stages that cost at most `limit`, with the layers of each stage."""
    # By the number of layers that the stages so far hold.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for number in range(1, num_stages + 1):
        is_last = number == num_stages
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (before, sizes) in best.items():
            stops = [model.num_layers] if is_last else range(start + 1, model.num_layers - num_stages + number + 1)
            for stop in stops:
                cost = stage_cost(model, costs, Stage(range(start, stop), number == 1, is_last))
                if cost <= limit:
                    found = add(before, cost), (*sizes, stop - start)
                    longer[stop] = min(found, longer.get(stop, found))
        best = longer
    return best[model.num_layers]
