"""Every pipeline schedule in real processes: what it computes is what one process computes, and what it runs is its
table."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.comm.trace import Span, Trace
from dstrain.config.schema import Config, MeshConfig
from dstrain.engine.loop import Trainer
from dstrain.engine.plain import PlainEngine
from dstrain.engine.sharding import ShardedEngine
from dstrain.engine.state import Progress
from dstrain.mesh.groups import Place, connect, mesh_of
from dstrain.model.transformer import router_names
from dstrain.parallel.apply import build_model
from dstrain.schedule.action import Action, Phase
from dstrain.schedule.figures import peak_live
from dstrain.schedule.pipelines.choose import NAMES, make
from dstrain.schedule.run import DIRECTIONS
from dstrain.tasks.verify import PlainTrainer
from tests.gloo.spawn import spawn
from tests.tiny import CPU, alone, samples, tiny_config, whole, worst

PASSES = {direction: work for work, direction in DIRECTIONS.items()}


def config_of(pp: int, ep: int, **schedule: Any) -> Config:
    """Nine layers, of which the first is dense, and an MTP module; as many micro-batches as the table asks for."""
    chunks = 2 if schedule["pipeline"] in ("interleaved", "zb_v", "dualpipev") else 1
    made = tiny_config(
        model={"num_layers": pp * chunks + 1, "num_dense_layers": 1},
        train={"sequences": 2 * pp * ep, "micro_batch": 1},
        schedule=schedule,
    )
    return replace(made, mesh=MeshConfig(pp, ep, 1))


def one_process(config: Config) -> dict[str, Any]:
    """The losses of two steps, and the gradients of the first."""
    groups = alone()
    config = replace(config, mesh=MeshConfig(1, 1, 1))
    model = build_model(config, groups)
    engine = PlainEngine(model, config.optim)
    return steps(PlainTrainer(config, groups, model, engine, lambda *at: samples(config, *at), Progress()))


def steps(trainer: Trainer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    reduce = trainer.engine.reduce

    def reduce_and_keep() -> float:
        norm = reduce()
        if not found:
            found["gradients"] = {name: t.clone() for name, t in whole(dict(trainer.engine.gradients())).items()}
        return norm

    trainer.engine.reduce = reduce_and_keep  # type: ignore[method-assign]
    reports = [trainer.step() for _ in range(2)]
    found["figures"] = [x for report in reports for x in (report.loss, report.grad_norm, report.loss_mtp)]
    found["loads"] = {layer.name: (layer.load_E.tolist(), layer.bias_range) for layer in reports[-1].layers}
    found["spans"] = reports[-1].comm.spans
    return found


def pipelined(rank: int, world: int, config: Config) -> dict[str, Any]:
    """What `steps` finds, with the table of the rank, and its most live courses at once."""
    groups = connect(mesh_of(config), Place(rank, world, CPU))
    model = build_model(config, groups)
    engine = ShardedEngine(model, config, groups)
    trainer = Trainer(config, groups, model, engine, lambda *at: samples(config, *at), Progress())
    groups.trace.keeps_spans = True
    live = LiveCourses(groups.trace)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
        found = steps(trainer)
    micro_batches = config.train.sequences // (config.mesh.ep * config.train.micro_batch)
    program = trainer.orders.program(micro_batches)
    executed = [action_of(span, model.blocks) for span in found.pop("spans") if not span.name.startswith("wait")]
    return {
        **found,
        "executed": executed,
        "table": program.table,
        "peak_live": live.peak,
        "order": trainer.orders.reason,
    }


def action_of(span: Span, blocks: tuple[int, ...]) -> Action:
    label = span.label
    before = sum(blocks[: label.stage]) if sum(blocks) and label.block else 0
    return Action(PASSES[label.direction], Phase(span.name), label.block - before, label.micro_batch, label.stage)


class LiveCourses:
    """Counts the courses of which autograd holds a tensor: activations that are really there."""

    def __init__(self, trace: Trace):
        self.trace, self.peak = trace, 0
        self._held: Counter[tuple[int, int]] = Counter()

    def pack(self, x: Tensor) -> "Held":
        label = self.trace.label
        return Held(self, (label.stage, label.micro_batch), x)

    @staticmethod
    def unpack(held: "Held") -> Tensor:
        return held.x

    def change(self, course: tuple[int, int], by: int) -> None:
        self._held[course] += by
        self.peak = max(self.peak, sum(1 for count in self._held.values() if count))


class Held:
    def __init__(self, courses: LiveCourses, course: tuple[int, int], x: Tensor):
        self.courses, self.course, self.x = courses, course, x
        courses.change(course, 1)

    def __del__(self) -> None:
        self.courses.change(self.course, -1)


CASES = [
    *((4, 1, {"pipeline": name}) for name in NAMES),
    (4, 1, {"pipeline": "1f1b", "overlap": True}),
    *((2, 2, {"pipeline": name}) for name in NAMES),
    (2, 2, {"pipeline": "interleaved", "overlap": True}),
]


@pytest.mark.parametrize(("pp", "ep", "schedule"), CASES, ids=str)
def test_a_pipeline_computes_what_one_process_does_and_runs_its_table(pp: int, ep: int, schedule: dict[str, Any]):
    config = config_of(pp, ep, **schedule)
    expected, ranks = one_process(config), spawn(pipelined, pp * ep, config, timeout_s=180)
    made = make(schedule["pipeline"], pp, 2 * pp, overlap=schedule.get("overlap", False))
    for rank, found in enumerate(ranks):
        assert found["figures"] == pytest.approx(expected["figures"], rel=1e-5)
        assert worst(found["gradients"], expected["gradients"]) < 1e-5
        assert found["loads"].keys() == set(router_names(config.model))
        assert {name: load for name, (load, _) in found["loads"].items()} == {
            name: load for name, (load, _) in expected["loads"].items()
        }
        assert found["executed"] == found["table"]
        assert found["peak_live"] == peak_live(made.ranks[rank // ep])


def in_both_orders(rank: int, world: int, config: Config) -> list[dict[str, Any]]:
    """Two steps with pairs interleaved, and with pairs one after the other: figures and weights."""
    found = []
    groups = connect(mesh_of(config), Place(rank, world, CPU))
    for overlap in (True, False):
        # The same table: for a schedule without pairs of its own, `overlap` is what makes them.
        asked = replace(config, schedule=replace(config.schedule, overlap=overlap))
        model = build_model(asked, groups)
        engine = ShardedEngine(model, asked, groups)
        trainer = Trainer(asked, groups, model, engine, lambda *at: samples(config, *at), Progress())
        reports = [trainer.step() for _ in range(2)]
        weights = {name: t.clone() for name, t in whole(trainer.state()).items()}
        found.append(
            {"figures": [(r.loss, r.grad_norm) for r in reports], "weights": weights, "order": reports[0].order}
        )
    return found


@pytest.mark.parametrize("pipeline", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("kind", ["alltoall", "rank"])
def test_overlap_changes_no_bit(pipeline: str, kind: str):
    config = config_of(2, 2, pipeline=pipeline)
    config = replace(config, dispatch=replace(config.dispatch, kind=kind))
    for overlapped, plain in spawn(in_both_orders, 4, config, timeout_s=120):
        assert overlapped["order"] == f"{plain['order']}, transfers under other compute"
        assert overlapped["figures"] == plain["figures"]
        assert all(torch.equal(overlapped["weights"][name], plain["weights"][name]) for name in plain["weights"])
