"""All ranks run the same table, planned for what the config says or for what a step has shown."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dstrain.comm.trace import CommTotals, Label, Span, Transfer
from dstrain.config.schema import MeshConfig
from dstrain.engine.loop import Trainer
from dstrain.engine.sharding import ShardedEngine
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect, mesh_of
from dstrain.parallel.apply import build_model
from dstrain.schedule.choose import Orders, Program, in_flight, overlaps, timed
from dstrain.schedule.pipelines.choose import NAMES, make
from dstrain.schedule.run import DIRECTIONS
from dstrain.schedule.simulate import even_costs
from dstrain.schedule.table import IllegalTable, check, sequential, starts, to_text
from tests.gloo.spawn import spawn
from tests.tiny import CPU, alone, samples, tiny_config

SPREAD: Any = object()


@pytest.mark.parametrize(
    ("asked", "ep", "stage", "micro_batches", "expected"),
    [
        (None, SPREAD, 1, 4, 2),
        (None, SPREAD, 1, 1, 1),
        (None, None, 1, 4, 1),
        (None, SPREAD, 2, 4, 1),
        (3, SPREAD, 1, 4, 3),
        (3, SPREAD, 1, 2, 2),
        (2, None, 1, 4, 2),
    ],
)
def test_how_many_are_in_flight(asked: int | None, ep: Any, stage: int, micro_batches: int, expected: int):
    config = tiny_config(schedule={"in_flight": asked}, engine={"zero_stage": stage})
    assert in_flight(config, replace(alone(), ep=ep), micro_batches) == expected


def test_what_has_no_transfers_runs_in_sequence():
    orders = Orders(tiny_config(schedule={"in_flight": 2, "order": "measured"}), alone(), (0,))
    assert [orders.table(2) for _ in range(3)] == [sequential(0, 2)] * 3


def test_times_are_means_over_micro_batches():
    """Three blocks whose costs are known: a span or transfer for each, twice, a quarter off either way."""
    costs = even_costs(3, wire=2.0, last=1.0)
    spans, transfers = [], []
    for began, action in enumerate(sequential(3, 2)):
        label = Label(action.block, action.micro_batch, DIRECTIONS[action.work])
        factor = 1.25 - 0.5 * action.micro_batch
        # One wait before, one inside.
        spans.append(Span("wait combine", label, began + 0.1, began + 0.2))
        spans.append(Span("wait dispatch", label, began + 0.2, began + 0.6))
        spans.append(Span(action.phase.value, label, began + 0.2, began + 0.6 + costs.of(action) * factor / 1e3))
        if (way := starts(action, 3)) is not None:
            label = Label(way.block, action.micro_batch, DIRECTIONS[way.work])
            transfers.append(Transfer(way.name, "ep", label, 2.0, 2.0 + costs.of(way) * factor / 1e3))
    transfers.append(Transfer("grad", "data", Label(), 0.0))
    found = timed(CommTotals(0.0, 0.0, {}, {}, transfers, spans), 3)
    assert found.compute_ms == pytest.approx(costs.compute_ms)
    assert found.transfer_ms == pytest.approx(costs.transfer_ms)


def measuring(rank: int, world: int) -> tuple[list[str], str, list[bool]]:
    """The table of each of four steps, how the last one came about, and when spans were kept."""
    groups = connect(Mesh(ep=world), Place(rank, world, CPU))
    config = tiny_config(train={"micro_batch": 1}, schedule={"order": "measured"})
    trainer = trainer_of(replace(config, mesh=MeshConfig(ep=world)), groups)
    tables, kept, ask = [], [], trainer.orders.table

    def table(micro_batches: int) -> Any:
        found = ask(micro_batches)
        tables.append(to_text(found))
        kept.append(groups.trace.keeps_spans)
        return found

    trainer.orders.table = table
    for _ in range(4):
        # Ranks that differ in speed have to agree all the same.
        torch.randn(200 * rank, 200).sum()
        trainer.step()
    check(ask(4), trainer.model.num_blocks, 4, in_flight=2)
    return tables, trainer.orders.reason, kept


def trainer_of(config: Any, groups: Groups) -> Trainer:
    model = build_model(config, groups)
    engine = ShardedEngine(model, config, groups)
    return Trainer(config, groups, model, engine, lambda first, count: samples(config, first, count), Progress())


def test_a_timed_step_decides_for_all_ranks():
    (tables, reason, kept), other = spawn(measuring, 2)
    assert (tables, kept) == (other[0], other[2])
    assert tables[0] == tables[1] == to_text(sequential(2, 4))
    assert tables[2] == tables[3] != tables[0]
    assert kept == [False, True, False, False]
    assert reason.startswith("2 of 4 micro-batches in flight, planned from the times of step 2: ")
    assert reason == other[1]


# -- pipelines --------------------------------------------------------------------------------------------------------


def programs(micro_batches: int, **schedule: Any) -> tuple[list[Program], str]:
    """Of four pipeline ranks whose stages have a block each, and how they came about."""
    config = tiny_config(schedule=schedule)
    mesh = mesh_of(replace(config, mesh=MeshConfig(4, 2, 1)))
    found = []
    for pp in range(4):
        groups = replace(alone(), mesh=mesh, coordinate=mesh.coordinate(2 * pp))
        orders = Orders(replace(config, mesh=MeshConfig(4, 2, 1)), groups, (1,) * mesh.stages.num_stages)
        found.append(orders.program(micro_batches))
        assert orders.program(micro_batches) is found[-1]
        assert orders.program(2 * micro_batches) != found[-1]
        assert orders.program(micro_batches) == found[-1]
    return found, orders.reason


@pytest.mark.parametrize("pipeline", NAMES)
def test_the_programs_of_all_ranks_are_the_step(pipeline: str):
    found, reason = programs(8, pipeline=pipeline)
    stages = make(pipeline, 4, 8).layout.num_stages
    courses = [course for program in found for course in program.courses]
    assert sorted(courses) == [(stage, number) for stage in range(stages) for number in range(8)]
    for program in found:
        assert {action.course for action in program.table} == set(program.courses)
        assert len(program.table) == 12 * len(program.courses)
        assert program.traffic is not None
    paired = "" if pipeline in ("1f1b", "interleaved") else ", transfers under other compute"
    assert reason == f"{pipeline}, 8 micro-batches over {stages} stages{paired}"


@pytest.mark.parametrize("pipeline", ["1f1b", "interleaved"])
def test_pairs_where_they_are_asked_for(pipeline: str):
    apart, _ = programs(8, pipeline=pipeline)
    paired, reason = programs(8, pipeline=pipeline, overlap=True)
    assert reason.endswith(", transfers under other compute")
    assert [set(program.table) for program in paired] == [set(program.table) for program in apart]
    assert [program.table for program in paired] != [program.table for program in apart]


@pytest.mark.parametrize(
    ("pipeline", "ep", "overlap", "expected"),
    [
        ("1f1b", 2, None, False),
        ("1f1b", 2, True, True),
        ("zb_v", 2, None, True),
        ("zb_1p", 1, None, False),
        ("dualpipe", 2, None, True),
        ("dualpipev", 1, None, False),
        ("dualpipev", 1, True, True),
        ("dualpipe", 2, False, False),
    ],
)
def test_when_passes_overlap(pipeline: str, ep: int, overlap: bool | None, expected: bool):
    config = replace(tiny_config(schedule={"pipeline": pipeline, "overlap": overlap}), mesh=MeshConfig(2, ep))
    assert overlaps(config) == expected


def test_a_program_is_checked_when_it_is_made():
    made = make("1f1b", 2, 4)
    broken = replace(made, ranks=(made.ranks[0][1:], made.ranks[1]))
    with pytest.raises(IllegalTable, match="^complete|^after"):
        Program.of(broken, 0, (1, 1), overlap=False)
