"""A model in stages computes what it computes whole, bit by bit, in any legal order, and lets go of what has passed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dstrain.comm.trace import Trace
from dstrain.config.schema import Config, MtpConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.model.init import init_weights
from dstrain.model.layer import End, Walk
from dstrain.model.loss import StepLoss
from dstrain.model.transformer import Transformer
from dstrain.parallel.recompute import apply_recompute
from dstrain.plan.split import Stage
from dstrain.schedule.action import Action, Pass, Phase
from dstrain.schedule.run import NoEdges, run_stages
from dstrain.schedule.table import Table, actions, backward, check_courses, computed_before, forward, sender
from tests.schedule.test_run import collected, differences, micro_batches, on_the_whole_graph
from tests.tiny import CPU, tiny_config

# Layers of the stages.
SIZES, COUNT = (1, 2, 1), 3
MODELS = {
    "no MTP": tiny_config(model={"num_layers": 4, "mtp": MtpConfig(0)}),
    "tied": tiny_config(model={"num_layers": 4, "mtp": MtpConfig(0), "tie_embeddings": True}),
    "tied, MTP 2": tiny_config(model={"num_layers": 4, "mtp": MtpConfig(2), "tie_embeddings": True}),
    "no blocks": tiny_config(model={"num_layers": 4, "num_dense_layers": 4}),
    "recomputed": tiny_config(model={"num_layers": 4}, train={"recompute": ("layer",)}),
}
Edge = tuple[Pass, int, int]


def in_stages(config: Config, sizes: Sequence[int] = SIZES) -> Transformer:
    """A model that holds all of its stages."""
    cuts = [0, *accumulate(sizes)]
    stages = [Stage(range(*cut), cut[0] == 0, cut[1] == cuts[-1]) for cut in pairwise(cuts)]
    experts = config.model.num_experts
    model = Transformer(config.model, range(experts), LocalDispatcher(experts), stages, range(len(stages)))
    init_weights(model, config.train.seed)
    apply_recompute(model, config.train.recompute)
    return model


class Here:
    """Edges between stages of one process, and what of all that has passed them is still there."""

    def __init__(self) -> None:
        self._under_way: dict[Edge, Tensor] = {}
        self._passed: dict[Edge, StorageWeakRef] = {}

    def send(self, work: Pass, edge: int, micro_batch: int, x: Tensor) -> None:
        assert not x.requires_grad
        self._under_way[work, edge, micro_batch] = x

    def take(self, work: Pass, edge: int, micro_batch: int) -> Tensor | None:
        if edge not in range(len(SIZES) - 1):
            return None
        x = self._under_way.pop((work, edge, micro_batch))
        self._passed[work, edge, micro_batch] = StorageWeakRef(x.untyped_storage())
        return x

    def kept(self) -> set[Edge]:
        return {edge for edge, storage in self._passed.items() if not storage.expired()}


def by_stages(
    model: Transformer, batches: list[Tensor], table: Table, trace: Trace, edges: Any, **options: Any
) -> dict[tuple[int, int], StepLoss]:
    """The loss of each course."""
    losses: dict[tuple[int, int], StepLoss] = {}

    def start(stage: int, micro_batch: int, x_BTD: Tensor | None) -> Walk[None]:
        end = yield from model.walk_stage(stage, batches[micro_batch], x_BTD, 7)
        losses[stage, micro_batch] = end.result
        return End(end.roots, None, end.output)

    courses = {(stage, m): model.blocks[stage] for stage in range(len(SIZES)) for m in range(len(batches))}
    check_courses(table, courses)
    run_stages(table, {c: partial(start, *c) for c in courses}, model.blocks, edges, trace, **options)
    return losses


def one_by_one(blocks: Sequence[int], count: int = COUNT) -> list[Action]:
    """Every micro-batch through all stages and back before the next one."""
    stages = range(len(blocks))
    there = [[a for s in stages for a in forward(blocks[s], m, s)] for m in range(count)]
    back = [[a for s in reversed(stages) for a in backward(blocks[s], m, s)] for m in range(count)]
    return [action for m in range(count) for action in (*there[m], *back[m])]


def needs(action: Action, blocks: Sequence[int]) -> Iterator[Action | None]:
    own, course = blocks[action.stage], (action.micro_batch, action.stage)
    yield computed_before(action, own)
    yield sender(action, own)
    if action == Action(Pass.FORWARD, Phase.ATTEND, 0, *course) and action.stage:
        yield Action(Pass.FORWARD, Phase.ATTEND, blocks[action.stage - 1], action.micro_batch, action.stage - 1)
    if action == Action(Pass.BACKWARD, Phase.ATTEND, own, *course) and action.stage + 1 < len(blocks):
        yield Action(Pass.BACKWARD, Phase.ATTEND, 0, action.micro_batch, action.stage + 1)
    if action.micro_batch and action.work is not Pass.FORWARD:
        yield replace(action, micro_batch=action.micro_batch - 1)


def shuffled(blocks: Sequence[int], seed: int) -> list[Action]:
    """Any order that is legal on one process."""
    todo = [action for m in range(COUNT) for stage, own in enumerate(blocks) for action in actions(own, m, stage)]
    done: dict[Action, None] = {}
    generator = Random(seed)
    while todo:
        ready = [a for a in todo if all(need is None or need in done for need in needs(a, blocks))]
        action = generator.choice(ready)
        todo.remove(action)
        done[action] = None
    return list(done)


def collected_by_stage(
    model: Transformer, trace: Trace, work: Callable[[], Any]
) -> tuple[dict[str, dict[int, list[Tensor]]], Any]:
    """Every gradient that an engine would get, by the stage that it comes from."""
    found: dict[str, dict[int, list[Tensor]]] = {name: {} for name, _ in model.named_parameters()}

    def arrived(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            found[name].setdefault(trace.label.stage, []).append(parameter.grad)  # type: ignore[arg-type]
            parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(partial(arrived, name)) for name, p in model.named_parameters()]
    result = work()
    for hook in hooks:
        hook.remove()
    return found, result


def summed(by_stage: dict[int, list[Tensor]]) -> list[Tensor]:
    """For each micro-batch what its stages give, the last stage first, as the backward pass meets them."""
    shares = [by_stage[stage] for stage in sorted(by_stage, reverse=True)]
    return [sum(parts[1:], parts[0]) for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_stages_give_the_gradients_of_the_whole_graph(name: str):
    config, trace = MODELS[name], Trace(CPU)
    batches, model, whole = micro_batches(config, COUNT), in_stages(config), in_stages(config, (4,))
    expected, references = collected(whole, lambda: on_the_whole_graph(whole, batches))
    for table, defers in [
        (one_by_one(model.blocks), True),
        (one_by_one(model.blocks), False),
        *((shuffled(model.blocks, seed), True) for seed in range(2)),
    ]:
        found, losses = collected_by_stage(
            model,
            trace,
            lambda: by_stages(model, batches, table, trace, Here(), defer_weights=defers),  # noqa: B023
        )
        assert {name: sorted(by_stage) for name, by_stage in found.items()} == {
            name: model.users(name) for name in found
        }
        assert differences({name: summed(by_stage) for name, by_stage in found.items()}, expected) == []
        for m, reference in enumerate(references):
            parts = [losses[stage, m] for stage in range(len(SIZES))]
            torch.testing.assert_close(sum(part.total for part in parts), reference.total)
            torch.testing.assert_close(sum(part.parts_4 for part in parts), reference.parts_4)
            loads = [report.load_E.tolist() for part in parts for report in part.reports]
            assert loads == [report.load_E.tolist() for report in reference.reports]


@pytest.mark.parametrize("name", ["no MTP", "no blocks", "recomputed"])
def test_what_has_passed_an_edge_is_gone_after_its_course(name: str):
    config, kept = MODELS[name], []
    batches, model = micro_batches(config, 4), in_stages(config)

    class Looking(Here):
        def take(self, work: Pass, edge: int, micro_batch: int) -> Tensor | None:
            if (work, edge) == (Pass.FORWARD, -1):
                kept.append(self.kept())
            return super().take(work, edge, micro_batch)

    edges = Looking()
    by_stages(model, batches, one_by_one(model.blocks, 4), Trace(CPU), edges)
    assert [*kept, edges.kept()] == [set()] * 5


def test_a_stage_whose_output_nobody_takes_is_refused():
    config = MODELS["no MTP"]
    model = in_stages(config)
    with pytest.raises(ValueError, match="a model in one stage has no output"):
        by_stages(model, micro_batches(config, 1), one_by_one(model.blocks, 1), Trace(CPU), NoEdges())


def test_the_stage_is_in_the_label_and_blocks_have_their_numbers_in_the_model():
    config, trace = MODELS["tied, MTP 2"], Trace(CPU)
    model, trace.keeps_spans = in_stages(config), True
    table = shuffled(model.blocks, 5)
    by_stages(model, micro_batches(config, COUNT), table, trace, Here())
    assert model.blocks == (0, 2, 3)
    labels = [(span.label.stage, span.label.block, span.label.micro_batch) for span in trace.take().spans]
    assert labels == [(a.stage, a.block + (0, 0, 2)[a.stage], a.micro_batch) for a in table]
