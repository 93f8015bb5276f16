"""The sharded engine computes what the plain one does, in every layout.

AdamW hides the scale of gradients, so the gradients themselves are compared, and eps is so large that an update is
nearly proportional to its gradient.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.comm.flat import FlatCollectives
from dstrain.config.schema import Config, MeshConfig, MtpConfig, PrecisionConfig
from dstrain.engine.loop import Trainer
from dstrain.engine.plain import PlainEngine
from dstrain.engine.sharding import ShardedEngine
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect, mesh_of
from dstrain.parallel.apply import build_model, logical_parameters
from dstrain.parallel.recompute import METHODS
from tests.gloo.spawn import spawn
from tests.tiny import CPU, alone, samples, tiny_config, whole, worst

STEPS = 4
LAYOUTS = {"alone": Mesh(), "ep2": Mesh(ep=2), "dp2": Mesh(dp=2), "ep2 dp2": Mesh(dp=2, ep=2)}


def case(**sections: dict[str, Any]) -> Config:
    """A fraction of a MiB, which no user can ask for, gives a tiny model its two dozen buckets."""
    sections = {"engine": {"bucket_mib": 0.004}, **sections}
    sections["optim"] = {"lr": 0.2, "eps": 1.0, "clip_norm": 0.5, **sections.get("optim", {})}
    return tiny_config(**sections)


# Every name, in few runs.
RECOMPUTED = [("norm", "mla_up", "swiglu"), ("attend", "experts"), ("layer",)]

EXACT = {
    "clipped": case(),
    "unclipped": case(optim={"clip_norm": 0.0}),
    "norm below the limit": case(optim={"clip_norm": 1000.0}),
    "one bucket of a kind": case(engine={"bucket_mib": 32}),
    "small micro-batches": case(train={"micro_batch": 1}),
    "tied, no MTP": case(model={"tie_embeddings": True, "mtp": MtpConfig(0)}),
    "tied, MTP 2": case(model={"tie_embeddings": True, "mtp": MtpConfig(2)}),
    **{f"recompute {' '.join(names)}": case(train={"recompute": names}) for names in RECOMPUTED},
}
CLOSE = {
    "usual eps": case(optim={"lr": 1e-3, "eps": 1e-8}),
    "bf16 gradients on the wire": case(precision={"grad_wire_dtype": "bfloat16"}),
    "bf16": case(precision={"compute_dtype": "bfloat16", "moments_dtype": "bfloat16"}),
}
CASES = EXACT | CLOSE


@dataclass
class Run:
    """Tensors are whole and flat, by logical name."""

    losses: list[float]
    norms: list[float]
    # Of the first step and of the last.
    gradients: tuple[dict[str, Tensor], dict[str, Tensor]]
    master: dict[str, Tensor]


def trainer_of(config: Config, groups: Groups, *, plain: bool = False) -> Trainer:
    mesh = groups.mesh
    config = replace(config, mesh=MeshConfig(mesh.pp, mesh.ep, mesh.dp))
    model = build_model(config, groups)
    engine = PlainEngine(model, config.optim) if plain else ShardedEngine(model, config, groups)
    return Trainer(config, groups, model, engine, lambda first, count: samples(config, first, count), Progress())


def run(config: Config, groups: Groups, *, plain: bool = False) -> Run:
    trainer = trainer_of(config, groups, plain=plain)
    reduce, gradients = trainer.engine.reduce, []

    def watched() -> float:
        norm = reduce()
        # Clipping writes into them.
        gradients.append({name: x.clone() for name, x in whole(dict(trainer.engine.gradients())).items()})
        return norm

    trainer.engine.reduce = watched
    reports = [trainer.step() for _ in range(STEPS)]
    master = {name: shard for name, shard in trainer.engine.state().items() if name.startswith("master/")}
    return Run([r.loss for r in reports], [r.grad_norm for r in reports], (gradients[0], gradients[-1]), whole(master))


def run_all(rank: int, world: int, mesh: Mesh) -> dict[str, Run] | None:
    groups = connect(mesh, Place(rank, world, CPU))
    runs = {name: run(config, groups) for name, config in CASES.items()}
    return runs if rank == 0 else None


@pytest.fixture(scope="module")
def plain() -> dict[str, Run]:
    """FP32 without anything clever; recomputation and narrow dtypes are what the others are compared in."""
    simple = {name: replace(c, train=replace(c.train, recompute=())) for name, c in CASES.items()}
    known: dict[Config, Run] = {}
    for config in simple.values():
        wide = replace(
            config, precision=PrecisionConfig("float32", "float32", "float32"), engine=CASES["clipped"].engine
        )
        known[config] = known[wide] if wide in known else known.setdefault(wide, run(wide, alone(), plain=True))
    return {name: known[config] for name, config in simple.items()}


@pytest.fixture(scope="module", params=LAYOUTS)
def sharded(request: pytest.FixtureRequest) -> dict[str, Run]:
    mesh = LAYOUTS[request.param]
    if mesh.world == 1:
        return {name: run(config, alone()) for name, config in CASES.items()}
    return spawn(run_all, mesh.world, mesh)[0]


@pytest.mark.parametrize("name", EXACT)
def test_equals_the_plain_engine(sharded: dict[str, Run], plain: dict[str, Run], name: str):
    found, expected = sharded[name], plain[name]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    for ours, reference in zip(found.gradients, expected.gradients, strict=True):
        assert worst(ours, reference) < 1e-4
    assert worst(found.master, expected.master) < 1e-5


def test_the_cases_clip_and_learn(plain: dict[str, Run]):
    """Otherwise the comparisons above would show less than they claim."""
    assert {name for names in RECOMPUTED for name in names} == METHODS.keys()
    for name, expected in plain.items():
        assert expected.losses[-1] < expected.losses[0]
        assert min(expected.norms) > 1.1 * 0.5, name
    assert worst(plain["clipped"].master, plain["unclipped"].master) > 1e-3
    assert worst(plain["norm below the limit"].master, plain["unclipped"].master) == 0


@pytest.mark.parametrize("name", CLOSE)
def test_is_close_to_the_plain_engine(sharded: dict[str, Run], plain: dict[str, Run], name: str):
    found, expected = sharded[name], plain[name]
    assert found.losses == pytest.approx(expected.losses, rel={"bf16": 1e-2}.get(name, 1e-3))
    assert found.norms == pytest.approx(expected.norms, rel={"bf16": 5e-2}.get(name, 1e-2))
    tolerance = {"bf16": 0.2}.get(name, 0.02)
    assert worst(found.gradients[0], expected.gradients[0]) < tolerance


def test_dtypes():
    engine = trainer_of(CASES["bf16"], alone()).engine
    weights = dict(engine.model.named_parameters())
    assert {n for n, p in weights.items() if p.dtype == torch.float32} == {n for n in weights if "router" in n} != set()
    dtypes = {name.split("/")[0]: set() for name in engine.state()}
    for name, shard in engine.state().items():
        dtypes[name.split("/")[0]].add(shard.local.dtype)
    assert dtypes == {"master": {torch.float32}, "exp_avg": {torch.bfloat16}, "exp_avg_sq": {torch.bfloat16}}


def test_small_updates_are_not_lost_in_bf16():
    """Far below the distance of BF16 numbers, yet the master weights move, and in time what is computed with does."""
    trainer = trainer_of(case(precision={"compute_dtype": "bfloat16"}, optim={"lr": 1e-5, "eps": 1e-8}), alone())
    norm = "master/norm.weight"
    trainer.step()
    moved = (trainer.engine.state()[norm].local - 1).abs()
    assert 0 < moved.max() < 2e-5
    assert torch.equal(trainer.model.norm.weight, torch.ones(16, dtype=torch.bfloat16))
    trainer.engine.state()[norm].local.mul_(1.5)
    trainer.engine.loaded(1)
    assert torch.equal(trainer.model.norm.weight, torch.full((16,), 1.5, dtype=torch.bfloat16))


def reductions(rank: int, world: int) -> list[str]:
    """What happens in the backward passes of a step, in order: reductions that start, and gradients that are done."""
    trainer, events = trainer_of(case(), connect(Mesh(dp=world), Place(rank, world, CPU))), []
    start = FlatCollectives.reduce_scatter

    def watched(*args: Any) -> Any:
        events.append("start")
        return start(*args)

    FlatCollectives.reduce_scatter = watched
    for name in ("layers.1.attn_norm", "layers.0.attn_norm"):
        weight = trainer.model.get_submodule(name).weight
        weight.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    trainer.accumulate()
    before_reduce = len(events)
    trainer.engine.reduce()
    assert events.count("start") == len(trainer.engine.buckets)
    return events[:before_reduce]


def test_reductions_start_under_the_backward_pass():
    for events in spawn(reductions, 2):
        # Two micro-batches: only in the last one may anything leave.
        assert events[:2] == ["layers.1.attn_norm", "layers.0.attn_norm"]
        last = events[2:]
        top, bottom = last.index("layers.1.attn_norm"), last.index("layers.0.attn_norm")
        assert last[:top].count("start") >= 5
        assert last[top:bottom].count("start") >= 3


def gathers(rank: int, world: int) -> list[int]:
    """Buckets under way after a step, after the embedding, after a whole forward pass, and when the state of another
    step is there; and those of the embedding."""
    trainer = trainer_of(case(), connect(Mesh(dp=world), Place(rank, world, CPU)))
    trainer.step()

    def under_way() -> int:
        return sum(bucket.gathering is not None for bucket in trainer.engine.buckets)

    tokens = samples(trainer.config, 0, 2)
    at_first = under_way()
    trainer.model.embed(tokens)
    after_embedding = under_way()
    trainer.model(tokens, 2)
    after_forward = under_way()
    trainer.step()
    trainer.engine.state()
    buckets = [b for b in trainer.engine.buckets if any(s.logical.name == "embed.weight" for s in b.slots)]
    return [at_first, after_embedding, after_forward, under_way(), len(buckets)]


def test_a_module_waits_for_its_own_bucket():
    for at_first, after_embedding, after_forward, with_state, of_embedding in spawn(gathers, 2):
        assert at_first > 10
        assert after_embedding == at_first - of_embedding
        # What a load writes must not be overwritten by a gather that ends later.
        assert (after_forward, with_state) == (0, 0)


def ranges(rank: int, world: int, mesh: Mesh) -> list[tuple[str, tuple[int, ...], int, int]]:
    state = trainer_of(case(), connect(mesh, Place(rank, world, CPU))).state()
    return [(name, x.shape, x.offset, x.local.numel()) for name, x in state.items()]


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=2, ep=2)], ids=str)
def test_the_ranges_of_all_ranks_tile_every_tensor(mesh: Mesh):
    found: dict[tuple[str, tuple[int, ...]], set[tuple[int, int]]] = {}
    for name, shape, offset, length in [piece for pieces in spawn(ranges, mesh.world, mesh) for piece in pieces]:
        found.setdefault((name, shape), set()).add((offset, offset + length))
    weights = dict(build_model(case(), alone()).named_parameters())
    expected = {
        (f"{kind}/{n}", tuple(p.shape)) for kind in ("master", "exp_avg", "exp_avg_sq") for n, p in weights.items()
    }
    assert expected <= found.keys()
    assert {name for name, _ in found.keys() - expected} == {
        f"buffer/{place}.moe.router.bias" for place in ("layers.1", "mtp.0.layer")
    }
    for (name, shape), pieces in found.items():
        begins, ends = zip(*sorted(pieces), strict=True)
        assert (*begins, prod(shape)) == (0, *ends), name


def save(rank: int, world: int, mesh: Mesh) -> tuple[dict[str, Tensor], list[float]]:
    """The state after two steps, and the losses of the two that follow."""
    trainer = trainer_of(MOVING, connect(mesh, Place(rank, world, CPU)))
    for _ in range(2):
        trainer.step()
    state = {name: x.clone() for name, x in whole(trainer.state()).items()}
    return state, [trainer.step().loss for _ in range(2)]


def load(rank: int, world: int, mesh: Mesh, state: dict[str, Tensor]) -> list[float]:
    groups = connect(mesh, Place(rank, world, CPU))
    trainer = trainer_of(replace(MOVING, train=replace(MOVING.train, seed=99)), groups)
    for name, shard in trainer.state().items():
        shard.local.copy_(state[name][shard.offset : shard.offset + len(shard.local)])
    trainer.engine.loaded(2)
    trainer.progress = Progress(2, 16, 16 * 12)
    return [trainer.step().loss for _ in range(2)]


# An ordinary eps, so that moments and the number of updates matter.
MOVING = case(optim={"lr": 3e-3, "eps": 1e-8}, model={"router": replace(case().model.router, bias_update_rate=0.01)})


def test_state_moves_between_layouts():
    state, expected = spawn(save, 4, Mesh(dp=2, ep=2))[0]
    assert load(0, 1, Mesh(), state) == pytest.approx(expected, rel=1e-6)
    assert spawn(load, 2, Mesh(ep=2), state)[0] == pytest.approx(expected, rel=1e-6)
    state, same = save(0, 1, Mesh())
    assert same == pytest.approx(expected, rel=1e-6)
    assert spawn(load, 4, Mesh(ep=4), state)[0] == pytest.approx(expected, rel=1e-6)


def at_both_ends(rank: int, world: int, mirrored: bool) -> list[list[tuple[str, ...]]]:
    """The names in the buckets of the embedding's group, and of all others in the order in which they leave."""
    name = "dualpipe" if mirrored else "1f1b"
    # Large buckets: what may share one does.
    made = case(engine={"bucket_mib": 32}, train={"micro_batch": 1}, schedule={"pipeline": name})
    config = replace(made, mesh=MeshConfig(2, 1, 1))
    groups = connect(mesh_of(config), Place(rank, world, CPU))
    trainer = trainer_of(config, groups)
    buckets = [(bucket.peers, tuple(slot.logical.name for slot in bucket.slots)) for bucket in trainer.engine.buckets]
    trainer.step()
    # Nothing is left over, and nothing is missing: otherwise the next step would say so.
    assert [bucket.missing for bucket in trainer.engine.buckets] == [0] * len(buckets)
    ends = [names for peers, names in buckets if groups.embedding is not None and peers is groups.embedding]
    return [ends, [names for _, names in buckets]]


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_embedding_at_both_ends_leaves_alone_and_last(mirrored: bool):
    found = spawn(at_both_ends, 2, mirrored)
    for ends, order in found:
        assert ends == ([] if mirrored else [("embed.weight",)])
        assert order[-1] == ("embed.weight",)
        assert sum("embed.weight" in names for names in order) == 1
    # Those that reduce together start in the same order.
    assert (found[0][1] == found[1][1]) is mirrored


def test_a_gradient_that_does_not_come_is_missed():
    trainer = trainer_of(case(), alone())
    trainer.engine.expect({x.name: 2 for x in logical_parameters(trainer.model)})
    trainer.model(samples(trainer.config, 0, 2), 2).total.backward()
    with pytest.raises(RuntimeError, match="gradients have not come: of"):
        trainer.engine.reduce()


def test_what_belongs_between_reduce_and_step():
    engine = trainer_of(case(), alone()).engine
    with pytest.raises(RuntimeError, match="without reduce"):
        engine.step(0.1)
    with pytest.raises(RuntimeError, match="between reduce"):
        list(engine.gradients())
