"""Experts that move take their weights and moments along, and nothing else changes."""

import json
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers
from dstrain.comm.mailbox import GlooMailbox, Pool
from dstrain.comm.trace import Trace
from dstrain.config.schema import Config, DispatchConfig, MeshConfig, PlacementConfig, RouterConfig
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import Trainer
from dstrain.engine.placement import redistribute
from dstrain.engine.state import FlatShard, Progress, Shards
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.parallel.apply import build_model
from tests.gloo.spawn import spawn
from tests.tiny import CPU, TINY, alone, samples, tiny_config, whole, worst

EXPERTS, SIZE = 12, 7
DTYPES = {"master/w": torch.float32, "exp_avg/w": torch.bfloat16, "exp_avg_sq/w": torch.float32}


def layout(rng: random.Random, ranks: int, replicas: int) -> list[tuple[list[int], int, int]]:
    """For each rank: its experts in the order of slots, and the part [begin, end) of them that it owns."""
    order = rng.sample(range(EXPERTS), EXPERTS)
    share = EXPERTS * replicas // ranks
    parts = []
    for rank in range(ranks):
        group, replica = divmod(rank, replicas)
        length = share * SIZE
        cuts = [length * n // replicas for n in range(replicas + 1)]
        parts.append((order[group * share : (group + 1) * share], cuts[replica], cuts[replica + 1]))
    return parts


def shards(storage: dict[str, torch.Tensor], part: tuple[list[int], int, int]) -> Shards:
    experts, begin, end = part
    offsets = [SIZE * expert for expert in experts]
    return {
        name: FlatShard.of_parts((EXPERTS, SIZE), offsets, SIZE, begin, local[: end - begin])
        for name, local in storage.items()
    }


def fill(target: Shards) -> None:
    """Every element its own place in the logical tensor, told apart by kind."""
    for number, shard in enumerate(target.values()):
        for offset, part in shard.ranges():
            part.copy_(torch.arange(offset, offset + len(part)) + number)


def move(rank: int, world: int, replicas: int, seed: int) -> tuple[list[str], int, int]:
    rng, trace = random.Random(seed), Trace(CPU)
    before, after = layout(rng, world, replicas), layout(rng, world, replicas)
    length = before[rank][2] - before[rank][1]
    storage = {name: torch.empty(length, dtype=dtype) for name, dtype in DTYPES.items()}
    wanted = {name: torch.empty(length, dtype=dtype) for name, dtype in DTYPES.items()}
    fill(shards(storage, before[rank]))
    fill(shards(wanted, after[rank]))
    peers = Peers(dist.group.WORLD, trace)
    sent = redistribute(
        shards(storage, before[rank]), shards(storage, after[rank]), GlooMailbox(peers, 0, Pool()), peers
    )
    wrong = [name for name in DTYPES if not torch.equal(storage[name], wanted[name])]
    return wrong, sent, trace.take().sent_bytes.get("placement", 0)


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_every_element_arrives(world: int, replicas: int):
    for wrong, sent, traced in spawn(move, world, replicas, 3):
        assert wrong == []
        assert sent == traced > 0


def stay(rank: int, world: int) -> dict[str, int]:
    """Ranks 0 and 1 exchange an expert; rank 2 has nothing to do with it, and has another tensor."""
    trace = Trace(CPU)
    peers = Peers(dist.group.WORLD, trace)
    storage = {"a": torch.full((2 * SIZE,), float(rank))} if rank < 2 else {"b": torch.zeros(4)}
    if rank < 2:
        before, after = ((2 * rank, 2 * rank + 1), (2 * (1 - rank), 2 * rank + 1))
        old, new = (
            {"a": FlatShard.of_parts((4, SIZE), [SIZE * e for e in held], SIZE, 0, storage["a"])}
            for held in (before, after)
        )
    else:
        old = new = {"b": FlatShard((4,), 0, storage["b"])}
    redistribute(old, new, GlooMailbox(peers, 0, Pool()), peers)
    if rank < 2:
        assert storage["a"].tolist() == [1.0 - rank] * SIZE + [float(rank)] * SIZE
    return trace.take().sent_bytes


def test_only_what_moves_is_sent():
    assert spawn(stay, 3) == [{"placement": 4 * SIZE}, {"placement": 4 * SIZE}, {}]


# -- training ---------------------------------------------------------------------------------------------------------

EVERY_STEP = DispatchConfig(placement=PlacementConfig(every_steps=1, min_gain=0.0))
MOVING = replace(TINY, dispatch=EVERY_STEP)


def trainer_of(config: Config, groups: Groups) -> Trainer:
    config = replace(config, mesh=MeshConfig(1, groups.mesh.ep, groups.mesh.dp))
    model = build_model(config, groups)
    engine = make_engine(model, config, groups)
    return Trainer(config, groups, model, engine, lambda first, count: samples(config, first, count), Progress())


def trained(rank: int, world: int, mesh: Mesh, config: Config) -> tuple[dict[str, Tensor], int]:
    """The whole state after three steps, and how many experts moved on the way."""
    trainer = trainer_of(config, connect(mesh, Place(rank, world, CPU)))
    reports = [trainer.step() for _ in range(3)]
    return whole(trainer.state()), sum(report.moved.experts for report in reports if report.moved)


@cache
def stay_at_home() -> dict[str, Tensor]:
    trainer = trainer_of(TINY, alone())
    assert [trainer.step().moved for _ in range(3)] == [None] * 3
    return whole(trainer.state())


@pytest.mark.parametrize("mesh", [Mesh(ep=2), Mesh(dp=2, ep=2)], ids=str)
def test_a_run_whose_experts_move_computes_what_one_process_does(mesh: Mesh):
    found, moved = spawn(trained, mesh.world, mesh, MOVING)[0]
    assert moved > 0
    assert worst(found, stay_at_home()) < 1e-5


def test_with_the_engine_of_deepspeed():
    pytest.importorskip("deepspeed")
    config = replace(MOVING, engine=replace(MOVING.engine, name="deepspeed"))
    found, moved = spawn(trained, 4, Mesh(dp=2, ep=2), config)[0]
    assert moved > 0
    assert worst(found, stay_at_home()) < 1e-5


def skewed(rank: int, world: int, min_gain: float) -> list[Any]:
    """All tokens choose experts 0 and 1, which begin on rank 0."""
    config = tiny_config(
        model={"router": RouterConfig(bias_update_rate=0.0)},
        dispatch={"placement": PlacementConfig(every_steps=2, min_gain=min_gain)},
    )
    trainer = trainer_of(config, connect(Mesh(ep=world), Place(rank, world, CPU)))
    for _, router in trainer.model.routers():
        router.bias[:2] += 100
    reports = [trainer.step() for _ in range(4)]
    placements = [[layer.placement for layer in report.layers] for report in reports]
    return [[report.moved for report in reports], placements, reports[-1].comm.sent_bytes]


def test_the_busiest_rank_gets_rid_of_an_expert():
    moved, placements, _ = spawn(skewed, 2, 0.05)[0]
    assert (moved[0], moved[2]) == (None, None)
    assert (moved[1].load_before, moved[1].load_after) == (2.0, 1.0)
    # In both layers an expert leaves each rank: its weights and two moments, FP32, of three times 8 x 16 elements.
    assert moved[1].experts == 4
    assert moved[1].sent_bytes == 2 * 3 * 4 * 3 * 8 * 16
    assert placements[1] == [((0, 1), (2, 3))] * 2
    assert all({0, 1} & set(held) and {2, 3} & set(held) for layer in placements[2] for held in layer)
    assert (moved[3].experts, moved[3].sent_bytes, moved[3].load_after) == (0, 0, 1.0)


def test_a_gain_that_is_too_small_moves_nothing():
    moved, placements, sent_bytes = spawn(skewed, 2, 0.6)[0]
    assert (moved[1].experts, moved[1].load_before, moved[1].load_after) == (0, 2.0, 2.0)
    assert placements[3] == placements[0]
    assert "placement" not in sent_bytes


def resumed(rank: int, world: int, mesh: Mesh, every_steps: int) -> tuple[bool, bool]:
    """Whether a run of four steps ends with the same bits if it is saved and resumed after three; whether it moved."""
    config = replace(TINY, dispatch=DispatchConfig(placement=PlacementConfig(every_steps, 0.0)))
    groups = connect(mesh, Place(rank, world, CPU))
    straight = trainer_of(config, groups)
    for _ in range(3):
        straight.step()
    saved, extra = whole(straight.state()), json.loads(json.dumps(straight.placer.state()))
    again = trainer_of(config, groups)
    for name, shard in again.state().items():
        for offset, part in shard.ranges():
            part.copy_(saved[name][offset : offset + len(part)])
    again.progress = straight.progress
    again.placer.restore(extra)
    again.engine.loaded(again.progress.step)
    moved = again.placer.placements != trainer_of(config, groups).placer.placements
    reports = [trainer.step() for trainer in (straight, again)]
    ours, theirs = whole(again.state()), whole(straight.state())
    same = all(torch.equal(ours[name], theirs[name]) for name in theirs) and reports[0].loss == reports[1].loss
    return same and again.placer.state() == straight.placer.state(), moved


@pytest.mark.parametrize("every_steps", [1, 2])
def test_a_resumed_run_finds_its_experts_where_they_were(every_steps: int):
    mesh = Mesh(dp=2, ep=2)
    assert spawn(resumed, 4, mesh, every_steps) == [(True, True)] * 4


def elsewhere(rank: int, world: int) -> bool:
    """A state saved on four ranks, two of them on each node, says nothing about where experts belong on two."""
    trainer = trainer_of(MOVING, connect(Mesh(ep=2), Place(rank, world, CPU)))
    before = trainer.placer.placements
    trainer.placer.restore({"nodes": 2, "experts": [[[3], [2], [1], [0]]] * 2, "loads": None})
    return trainer.placer.placements == before and trainer.step().moved is not None


def test_in_another_layout_experts_begin_in_order():
    assert spawn(elsewhere, 2) == [True] * 2
