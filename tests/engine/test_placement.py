"""Experts that move take their weights and moments along, and nothing else changes."""

import json
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dstrain.comm.collectives import Peers
from dstrain.comm.mailbox import GlooMailbox, Pool
from dstrain.comm.trace import Trace
from dstrain.config.schema import Config, MeshConfig, PlacementConfig, RouterConfig
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import Trainer
from dstrain.engine.placement import Moved, redistribute
from dstrain.engine.state import FlatShard, Progress, Shards
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.parallel.apply import build_model
from dstrain.plan.placement import Placement
from tests.gloo.spawn import spawn
from tests.tiny import CPU, samples, tiny_config, whole, worst

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


def trainer_of(config: Config, groups: Groups) -> Trainer:
    config = replace(config, mesh=MeshConfig(1, groups.mesh.ep, groups.mesh.dp))
    model = build_model(config, groups)
    engine = make_engine(model, config, groups)
    return Trainer(config, groups, model, engine, lambda first, count: samples(config, first, count), Progress())


def trained(
    rank: int, world: int, mesh: Mesh, config: Config, ranks_per_node: int = 2
) -> tuple[float, int, list[Placement]]:
    """After three steps: the worst error against experts that stay, how many moved on the way, and to where."""
    groups = connect(mesh, Place(rank, world, CPU), ranks_per_node=ranks_per_node)
    moving = trainer_of(replace(config, dispatch=replace(config.dispatch, placement=PlacementConfig(1, 0.0))), groups)
    staying = trainer_of(config, groups)
    moved = sum(moving.step().moved.experts for _ in range(3))
    assert [staying.step().moved for _ in range(3)] == [None] * 3
    return worst(whole(moving.state()), whole(staying.state())), moved, moving.placer.placements


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_moving_changes_the_order_of_additions_only(engine: str):
    pytest.importorskip(engine)
    config = tiny_config(engine={"name": engine}, dispatch={"kind": "rank"})
    error, moved, _ = spawn(trained, 4, Mesh(dp=2, ep=2), config, timeout_s=120)[0]
    assert moved > 0
    assert error < 1e-5


def test_where_tokens_visit_few_nodes_groups_stay_whole_in_a_node():
    router = RouterConfig(num_groups=4, groups_per_token=2)
    config = tiny_config(model={"num_experts": 8, "router": router}, dispatch={"kind": "hierarchical"})
    error, moved, placements = spawn(trained, 4, Mesh(ep=4), config)[0]
    assert moved > 0
    assert error < 1e-5
    assert all(len({expert // 2 for expert in (*a, *b)}) == 2 for a, b, *_ in placements)


def test_ranks_decide_alike_where_groups_lie_differently_over_the_nodes():
    router = RouterConfig(num_groups=4, groups_per_token=2)
    config = tiny_config(model={"num_experts": 8, "router": router}, dispatch={"kind": "rank"})
    # The first group is on one node, the second one on two.
    results = spawn(trained, 4, Mesh(dp=2, ep=2), config, 3)
    assert all(error < 1e-5 for error, _, _ in results)
    assert all((moved, placements) == results[0][1:] for _, moved, placements in results)
    assert results[0][1] > 0


def skewed(rank: int, world: int, gains: list[float]) -> list[tuple[list[Moved | None], list[list[Placement]]]]:
    """Four steps with a look at every second; all tokens choose experts 0 and 1, which begin on rank 0."""
    groups, results = connect(Mesh(ep=world), Place(rank, world, CPU)), []
    for min_gain in gains:
        config = tiny_config(
            model={"router": RouterConfig(bias_update_rate=0.0)},
            dispatch={"placement": PlacementConfig(every_steps=2, min_gain=min_gain)},
        )
        trainer = trainer_of(config, groups)
        for _, router in trainer.model.routers():
            router.bias[:2] += 100
        reports = [trainer.step() for _ in range(4)]
        placements = [[layer.placement for layer in report.layers] for report in reports]
        results.append(([report.moved for report in reports], placements))
    return results


def test_the_busiest_rank_gets_rid_of_an_expert():
    (moved, placements), (refused, unmoved) = spawn(skewed, 2, [0.05, 0.6])[0]
    assert (moved[0], moved[2]) == (None, None)
    assert (moved[1].load_before, moved[1].load_after) == (2.0, 1.0)
    # In both layers an expert leaves each rank: its weights and two moments, FP32, of three times 8 x 16 elements.
    assert moved[1].experts == 4
    assert moved[1].sent_bytes == 2 * 3 * 4 * 3 * 8 * 16
    assert placements[1] == [((0, 1), (2, 3))] * 2
    assert all({0, 1} & set(held) and {2, 3} & set(held) for layer in placements[2] for held in layer)
    assert (moved[3].experts, moved[3].sent_bytes, moved[3].load_after) == (0, 0, 1.0)
    # A gain of half the load is less than what is asked for.
    assert (refused[1].experts, refused[1].sent_bytes, refused[1].load_after) == (0, 0, 2.0)
    assert unmoved[3] == unmoved[0]


# Weights that travel in FP8, and moments in blocks that lie in two experts.
NARROW = {"compute_dtype": "bfloat16", "moments_dtype": "int8", "products": "fp8", "gather": "fp8"}


def resumed(rank: int, world: int, mesh: Mesh, precision: dict[str, str]) -> tuple[bool, bool]:
    """Whether a run of four steps ends with the same bits if it is saved and resumed after three, of which the second
    looked at the placement; whether it moved."""
    config = tiny_config(dispatch={"placement": PlacementConfig(2, 0.0)}, precision=precision)
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


@pytest.mark.parametrize("precision", [{}, NARROW], ids=["fp32", "narrow"])
def test_a_resumed_run_finds_its_experts_where_they_were(precision: dict[str, str]):
    assert spawn(resumed, 4, Mesh(dp=2, ep=2), precision) == [(True, True)] * 4


def elsewhere(rank: int, world: int) -> bool:
    """A state saved on four ranks, two of them on each node, says nothing about where experts belong on two."""
    config = tiny_config(dispatch={"placement": PlacementConfig(1, 0.0)})
    trainer = trainer_of(config, connect(Mesh(ep=2), Place(rank, world, CPU)))
    before = trainer.placer.placements
    trainer.placer.restore({"nodes": 2, "experts": [[[3], [2], [1], [0]]] * 2, "loads": None})
    return trainer.placer.placements == before and trainer.step().moved is not None


def test_in_another_layout_experts_begin_in_order():
    assert spawn(elsewhere, 2) == [True] * 2
