"""A table computes what the whole graph computes, bit by bit, and keeps nothing longer than it must."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.comm.trace import Trace
from dstrain.config.schema import Config, MtpConfig, RouterConfig
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.model.loss import StepLoss
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import build_model
from dstrain.parallel.recompute import METHODS
from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.order import fixed
from dstrain.schedule.run import run
from dstrain.schedule.table import IllegalTable, Table, computed_before, sender, sequential
from tests.gloo.spawn import spawn
from tests.tiny import CPU, TINY, alone, samples, tiny_config

Gradients = dict[str, list[Tensor]]

MODELS = {
    "dense": tiny_config(model={"num_dense_layers": 2, "mtp": MtpConfig(0)}),
    "dense with MTP": tiny_config(model={"num_dense_layers": 2}),
    "a block at the end": tiny_config(model={"mtp": MtpConfig(0)}),
    "nothing but blocks": tiny_config(model={"num_dense_layers": 0, "mtp": MtpConfig(0)}),
    "MTP 1": TINY,
    "MTP 2, tied": tiny_config(model={"mtp": MtpConfig(2), "tie_embeddings": True}),
    "no shared expert": tiny_config(model={"num_shared_experts": 0}),
    "all losses": tiny_config(model={"router": RouterConfig(balance_loss_weight=0.1, z_loss_weight=0.1)}),
    "bf16": tiny_config(model={"mtp": MtpConfig(2), "tie_embeddings": True}),
    **{f"recompute {name}": tiny_config(train={"recompute": (name,)}) for name in METHODS},
    "recompute all": tiny_config(train={"recompute": tuple(METHODS)}),
}


def built(name: str, groups: Groups) -> Transformer:
    model = build_model(MODELS[name], groups)
    if name == "bf16":
        for key, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "router" in key else torch.bfloat16)
    return model


def micro_batches(config: Config, count: int, rank: int = 0) -> list[Tensor]:
    """Of different sizes, so that their gradients differ in size, too."""
    return [samples(config, 3 * m + 20 * rank, 1 + m % 3) for m in range(count)]


def collected(model: Transformer, work: Callable[[], Sequence[StepLoss]]) -> tuple[Gradients, Sequence[StepLoss]]:
    """Every gradient that an engine would get, in the order of arrival."""
    found: Gradients = {name: [] for name, _ in model.named_parameters()}

    def arrived(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            found[name].append(parameter.grad)
            parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(partial(arrived, name)) for name, p in model.named_parameters()]
    losses = work()
    for hook in hooks:
        hook.remove()
    return found, losses


def on_the_whole_graph(model: Transformer, batches: list[Tensor]) -> list[StepLoss]:
    losses = []
    for tokens in batches:
        losses.append(model(tokens, 7))
        losses[-1].total.backward()
    return losses


def by_table(
    model: Transformer, batches: list[Tensor], table: Table, trace: Trace | None = None, **options: Any
) -> list[StepLoss]:
    return run(table, [partial(model.walk, tokens, 7) for tokens in batches], trace or Trace(CPU), **options)


def weights_last(blocks: int, count: int) -> list[Action]:
    """All micro-batches forward, then all backward, then all weight gradients."""
    return sorted(sequential(blocks, count), key=lambda action: list(Pass).index(action.work))


def shuffled(blocks: int, count: int, seed: int) -> list[Action]:
    """Any legal order."""
    todo, done, generator = sequential(blocks, count), [], Random(seed)

    def is_next(action: Action) -> bool:
        before = [computed_before(action, blocks), sender(action, blocks)]
        if action.micro_batch and action.work is not Pass.FORWARD:
            before.append(replace(action, micro_batch=action.micro_batch - 1))
        return all(need is None or need in done for need in before)

    while todo:
        action = generator.choice([action for action in todo if is_next(action)])
        todo.remove(action)
        done.append(action)
    return done


def tables(blocks: int, count: int) -> dict[str, Table]:
    found: dict[str, Table] = {"sequential": sequential(blocks, count), "in passes": weights_last(blocks, count)}
    return found | {f"seed {seed}": shuffled(blocks, count, seed) for seed in range(2)}


def differences(found: Gradients, expected: Gradients) -> list[str]:
    """Parameters whose gradients are not the same, bit by bit and in number."""
    assert found.keys() == expected.keys()
    return [
        name
        for name in expected
        if len(found[name]) != len(expected[name])
        or not all(torch.equal(ours, theirs) for ours, theirs in zip(found[name], expected[name], strict=True))
    ]


@pytest.mark.parametrize("name", MODELS)
def test_any_table_gives_the_gradients_of_the_whole_graph(name: str):
    model, batches = built(name, alone()), micro_batches(MODELS[name], 3)
    expected, losses = collected(model, lambda: on_the_whole_graph(model, batches))
    assert {len(gradients) for gradients in expected.values()} == {3}
    for order, table in tables(model.num_blocks, 3).items():
        for defer in (True, False) if order == "sequential" else (True,):
            found, ours = collected(model, lambda: by_table(model, batches, table, defer_weights=defer))  # noqa: B023
            assert differences(found, expected) == [], (order, defer)
            for loss, reference in zip(ours, losses, strict=True):
                assert torch.equal(loss.total, reference.total)
                assert torch.equal(loss.parts_4, reference.parts_4)
                assert [r.load_E.tolist() for r in loss.reports] == [r.load_E.tolist() for r in reference.reports]


@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_micro_batches(count: int):
    model, batches = built("MTP 1", alone()), micro_batches(TINY, count)
    expected, _ = collected(model, lambda: on_the_whole_graph(model, batches))
    for order, table in tables(model.num_blocks, count).items():
        found, _ = collected(model, lambda: by_table(model, batches, table))  # noqa: B023
        assert differences(found, expected) == [], order


def over_two_ranks(rank: int, world: int) -> list[tuple[str, list[str]]]:
    groups = connect(Mesh(ep=world), Place(rank, world, CPU))
    results = []
    for name in ("MTP 1", "recompute layer", "no shared expert"):
        model, batches = built(name, groups), micro_batches(MODELS[name], 4, rank)
        expected, _ = collected(model, lambda: on_the_whole_graph(model, batches))  # noqa: B023
        for order, table in tables(model.num_blocks, 4).items():
            found, _ = collected(model, lambda: by_table(model, batches, table, groups.trace))  # noqa: B023
            results.append((f"{name}, {order}", differences(found, expected)))
    return results


def test_transfers_may_be_under_way_in_any_order():
    for results in spawn(over_two_ranks, 2):
        assert len(results) == 3 * 4
        assert [result for result in results if result[1]] == []


class Marked(torch.autograd.Function):
    """An identity that is there as long as its graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alive: "weakref.WeakKeyDictionary[Any, int]", micro_batch: int) -> Tensor:
        alive[ctx] = micro_batch
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("recompute", [(), ("layer",)])
def test_a_micro_batch_leaves_nothing_behind(in_flight: int, recompute: tuple[str, ...]):
    config = tiny_config(train={"recompute": recompute})
    model, trace = build_model(config, alone()), Trace(CPU)
    alive: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
    seen: list[set[int]] = []

    def mark(module: Any, inputs: Any, out: Tensor) -> Tensor:
        return Marked.apply(out, alive, trace.label.micro_batch)

    for module in (model.embed, model.norm, *(layer.ffn_norm for layer in model.layers), model.mtp[0].proj):
        module.register_forward_hook(mark)

    def start(tokens: Tensor) -> Any:
        seen.append(set(alive.values()))
        return model.walk(tokens, 7)

    gc.collect()
    gc.disable()
    try:
        walks = [partial(start, tokens) for tokens in micro_batches(config, 4)]
        run(fixed(model.num_blocks, 4, in_flight), walks, trace)
        seen.append(set(alive.values()))
    finally:
        gc.enable()
    assert seen == ([set()] * 5 if in_flight == 1 else [set(), {0}, {1}, {2}, set()])


def test_recomputation_happens_once():
    config = tiny_config(train={"recompute": ("layer",)})
    model, calls = build_model(config, alone()), Counter[str]()
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    by_table(model, micro_batches(config, 2), sequential(model.num_blocks, 2))
    inside = {name: count for name, count in calls.items() if "layer" in name and name.count("norm") != 0}
    assert set(inside.values()) == {4}


def test_weight_gradients_wait_for_their_action():
    model, trace = built("MTP 1", alone()), Trace(CPU)
    seen: dict[str, str | None] = {}
    for name, parameter in model.named_parameters():

        def arrived(parameter: Tensor, name: str = name) -> None:
            if parameter.grad is not None:
                seen[name] = trace.label.direction

        parameter.register_post_accumulate_grad_hook(arrived)
    by_table(model, micro_batches(TINY, 1), sequential(model.num_blocks, 1), trace)
    assert {name for name, direction in seen.items() if direction == "backward"} == {
        name for name in seen if "norm" in name or "router" in name
    }
    by_table(model, micro_batches(TINY, 1), sequential(model.num_blocks, 1), trace, defer_weights=False)
    assert set(seen.values()) == {"backward"}


def test_spans_carry_what_was_computed():
    model, trace = built("a block at the end", alone()), Trace(CPU)
    trace.keeps_spans = True
    table = sequential(1, 2)
    by_table(model, micro_batches(TINY, 2), table, trace)
    directions = {"forward": Pass.FORWARD, "backward": Pass.BACKWARD, "weight": Pass.WEIGHT}
    spans = [(s.name, s.label) for s in trace.take().spans]
    assert [
        Action(directions[label.direction], Phase(name), label.block, label.micro_batch) for name, label in spans
    ] == table


def test_a_table_that_forgets_an_action_is_refused():
    model = built("MTP 1", alone())
    table = [a for a in sequential(2, 2) if str(a) != "B experts 1 of 0"]
    with pytest.raises(IllegalTable, match="B experts 1 of 0"):
        by_table(model, micro_batches(TINY, 2), table)


@pytest.mark.parametrize(("blocks", "match"), [(1, "1 MoE blocks, the model more"), (3, "3 MoE blocks, the model 2")])
def test_the_table_of_another_model_is_refused(blocks: int, match: str):
    with pytest.raises(ValueError, match=match):
        by_table(built("MTP 1", alone()), micro_batches(TINY, 1), sequential(blocks, 1))
