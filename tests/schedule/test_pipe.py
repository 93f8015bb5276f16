"""What passes the edges of a pipeline: both ends read one order from the table, and every tensor finds its stage."""

import pytest
import torch
from torch import Tensor

from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.schedule.action import Pass
from dstrain.schedule.pipe import PASSES, Pipe, Traffic, departures
from dstrain.schedule.pipeline import Op, Pipeline
from dstrain.schedule.pipelines.choose import NAMES, make
from tests.gloo.spawn import spawn
from tests.tiny import CPU

RANKS, MICRO_BATCHES = 4, 8


@pytest.mark.parametrize("name", NAMES)
def test_what_leaves_one_rank_is_expected_by_another(name: str):
    made = make(name, RANKS, MICRO_BATCHES)
    traffics = [Traffic.of(made, rank) for rank in range(RANKS)]
    edges = (made.layout.num_stages - 1) * MICRO_BATCHES
    assert sum(len(traffic.targets) for traffic in traffics) == 2 * edges
    for rank, traffic in enumerate(traffics):
        assert all(traffics[target].sources[edge] == rank for edge, target in traffic.targets.items())
        for target, there in enumerate(traffics):
            for work in (Pass.FORWARD, Pass.BACKWARD):
                sent = [edge for edge, to in departures(made, rank) if to == target and edge[0] is work]
                assert there.coming.get((rank, work), []) == ([] if rank == target else sent)


def value(work: Pass, edge: int, micro_batch: int) -> float:
    return micro_batch + edge / 16 + (1000 if work is Pass.FORWARD else 2000)


def play(pipe: Pipe, made: Pipeline, op: Op) -> list[str]:
    """An op that computes nothing but which tensor it ought to get, and what went wrong."""
    work = PASSES.get(op.kind)
    if work is None:
        return []
    before, behind = (op.stage - 1, op.stage) if work is Pass.FORWARD else (op.stage, op.stage - 1)
    x, wrong = pipe.take(work, before, op.micro_batch), []
    is_end = op.stage == (0 if work is Pass.FORWARD else made.layout.num_stages - 1)
    if is_end != (x is None):
        wrong.append(f"{made.name}: {op} got {x}")
    if x is not None and x.flatten().tolist() != [value(work, before, op.micro_batch)] * 6:
        wrong.append(f"{made.name}: {op} got {x.flatten()[0]}")
    if 0 <= behind < made.layout.num_stages - 1:
        pipe.send(work, behind, op.micro_batch, torch.full((2, 3), value(work, behind, op.micro_batch)))
    return wrong


def step(pipe: Pipe, groups: Groups, made: Pipeline) -> list[str]:
    rank = groups.coordinate.pp
    pipe.begin(Traffic.of(made, rank), torch.empty(1).expand(2, 3))
    return [wrong for slot in made.ranks[rank] for op in slot for wrong in play(pipe, made, op)]


def every_schedule(rank: int, world: int) -> tuple[list[str], list[int]]:
    """What went wrong, and the bytes that were sent in each step."""
    groups = connect(Mesh(pp=world), Place(rank, world, CPU))
    pipe, wrong, sent = Pipe(groups), [], []
    # The number of micro-batches changes between steps, and nothing waits in between.
    for name in NAMES:
        for count in (MICRO_BATCHES, 2 * MICRO_BATCHES):
            wrong += step(pipe, groups, make(name, world, count))
            sent.append(groups.trace.take().sent_bytes.get("pipe", 0))
    return wrong, sent


def test_every_tensor_reaches_its_stage():
    results = spawn(every_schedule, RANKS)
    assert [wrong for wrong, _ in results] == [[]] * RANKS
    tables = [make(name, RANKS, count) for name in NAMES for count in (MICRO_BATCHES, 2 * MICRO_BATCHES)]
    for rank, (_, sent) in enumerate(results):
        crossing = [sum(target != rank for _, target in departures(made, rank)) for made in tables]
        assert sent == [24 * number for number in crossing]


def test_what_stays_on_a_rank_is_handed_over():
    """Stages 1 and 2 of a V over two ranks are on rank 1."""
    assert spawn(turn, 2) == [None, True]


def turn(rank: int, world: int) -> bool | None:
    groups = connect(Mesh(pp=world), Place(rank, world, CPU))
    if rank == 0:
        return None
    pipe, x = Pipe(groups), torch.ones(2, 3)
    traffic = Traffic.of(make("zb_v", world, 4), rank)
    pipe.begin(Traffic(traffic.targets, traffic.sources, {}), x)
    pipe.send(Pass.FORWARD, 1, 2, x)
    found: Tensor | None = pipe.take(Pass.FORWARD, 1, 2)
    return found is x
