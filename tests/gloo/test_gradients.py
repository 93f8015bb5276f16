"""A weight gradient that is computed in FP32 reaches the engine's sum in FP32, though the weight is BF16."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.config.schema import Config, EngineConfig
from dstrain.engine.choose import make_engine
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.parallel.apply import build_model, logical_parameters
from dstrain.precision.weight_gradients import WeightGradients, used
from tests.gloo.spawn import spawn
from tests.tiny import CPU, tiny_config, whole

MICRO_BATCHES = 3
BF16 = tiny_config(precision={"compute_dtype": "bfloat16", "moments_dtype": "bfloat16"}, engine={"bucket_mib": 1})


class Fine(torch.autograd.Function):
    """A use of a weight whose gradient has more digits than the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Tensor, gradients: WeightGradients | None) -> Tensor:
        ctx.weight, ctx.gradient, ctx.gradients = weight, gradient, gradients
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None, None]:
        if ctx.gradients is None:
            return ctx.gradient, None, None
        return ctx.gradients.take(ctx.weight, lambda: ctx.gradient.clone()), None, None


def fine(shape: torch.Size, seed: int) -> Tensor:
    """Sums of a few of these are exact in FP32, and lose most of their digits in BF16."""
    return torch.randint(1, 2**20, shape, generator=torch.Generator().manual_seed(seed)) / 2**10


def backward(weights: list[Tensor], seed: int, *, later: bool) -> None:
    """A micro-batch that uses every weight twice."""
    pieces, jobs = WeightGradients(defers=later), []
    with pieces.active(forward=True):
        uses = [(weight, fine(weight.shape, seed + use), used(weight)) for weight in weights for use in range(2)]
        total = torch.stack([Fine.apply(*use) for use in uses]).sum()
    with pieces.active(later=jobs):
        total.backward()
    for job in jobs:
        job()


def sums(rank: int, world: int, config: Config) -> dict[bool, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Gradients that the engine has after three micro-batches, and what they must be; at once, and later."""
    groups = connect(Mesh(dp=world), Place(rank, world, CPU))
    model = build_model(config, groups)
    engine, found = make_engine(model, config, groups), {}
    logicals = logical_parameters(model)
    for later in (False, True):
        engine.expect({x.name: MICRO_BATCHES for x in logicals})
        for n in range(MICRO_BATCHES):
            backward([x.parameter for x in logicals], 10 * (MICRO_BATCHES * rank + n), later=later)
        engine.reduce()
        ours = {name: x.clone() for name, x in whole(dict(engine.gradients())).items()}
        engine.step(0.0)
        seeds = [10 * micro + use for micro in range(MICRO_BATCHES * world) for use in range(2)]
        exact = {x.name: sum(fine(x.parameter.shape, seed) for seed in seeds).flatten() for x in logicals}
        found[later] = ours, exact
    return found


@pytest.mark.parametrize(
    "engine", [EngineConfig(), EngineConfig("deepspeed", 1), EngineConfig("deepspeed", 2)], ids=str
)
def test_no_digit_of_a_gradient_is_lost(engine: EngineConfig):
    config = replace(BF16, engine=replace(engine, bucket_mib=1))
    for ours, exact in spawn(sums, 2, config)[0].values():
        assert ours.keys() == exact.keys()
        for name, gradient in exact.items():
            assert not torch.equal(gradient, gradient.bfloat16().float())
            assert torch.equal(ours[name], gradient), name
