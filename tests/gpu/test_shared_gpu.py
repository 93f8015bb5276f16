"""Several ranks on one GPU over NCCL: what they compute together is what one process computes.

Skips itself where there is no GPU.
"""

from dataclasses import replace

import pytest
import torch

from dstrain.comm.flat import FlatCollectives
from dstrain.config.schema import Config
from dstrain.engine.loop import Trainer
from dstrain.engine.sharding import ShardedEngine
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect, disconnect, mesh_of
from dstrain.parallel.apply import build_model
from tests.comm.test_flat import noise, own
from tests.dispatch.cases import EXPERTS, ROUTES
from tests.dispatch.test_contract import FORMATS, Outcome, assert_equal, form, reference
from tests.dispatch.test_contract import run as there_and_back
from tests.gpu.nccl import GPU, spawn_on_one_gpu, transport
from tests.gpu.test_alone import carrying
from tests.gpu.test_training import CONFIG
from tests.tiny import alone as on_cpu
from tests.tiny import samples, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Transport, and ranks of a made-up node.
LAYOUTS = {2: [("alltoall", 2), ("rank", 2)], 4: [("rank", 4), ("hierarchical", 2)]}


def across(place: Place, kind: str, per_node: int) -> dict[tuple[str, str], Outcome]:
    """Every case, by format and route."""
    groups = connect(Mesh(ep=place.world), place, 60, ranks_per_node=per_node)
    share, found = EXPERTS // place.world, {}
    held = slice(place.rank * share, (place.rank + 1) * share)
    for name in FORMATS:
        dtype, _ = form(name)
        config = carrying(kind, name)
        dispatcher = transport(replace(config, mesh=replace(config.mesh, ep=place.world)), groups)
        for case, experts_of in ROUTES.items():
            experts_TK = experts_of(place.rank)
            found[name, case] = there_and_back(dispatcher, held, experts_TK, place.rank, dtype, GPU)
        dispatcher.close()
    disconnect()
    return found


@pytest.mark.parametrize(
    ("world", "kind", "per_node"), [(world, *layout) for world, found in LAYOUTS.items() for layout in found]
)
def test_a_transport_equals_loops(world: int, kind: str, per_node: int) -> None:
    found = spawn_on_one_gpu(across, world, kind, per_node)
    for name, case in found[0]:
        for rank, outcomes in enumerate(found):
            assert_equal(outcomes[name, case], reference(case, name, rank), FORMATS[name][0])
        counts = torch.tensor([reference(case, name, rank).counts for rank in range(world)]).sum(0)
        assert [n for outcomes in found for n in outcomes[name, case].counts] == counts.tolist()


def flat_buffers(place: Place) -> list[bool]:
    groups = connect(Mesh(dp=place.world), place, 60, ranks_per_node=2)
    flat, world = FlatCollectives(groups.trace), place.world
    summed = flat.reduce_scatter(noise(place.rank, 48 * world).to(GPU), groups.data, torch.float32, "grad")
    gathered = flat.all_gather(own(place.rank, world, torch.float32).to(GPU), groups.data, "param")
    parts = [noise(rank, 48 * world) for rank in range(world)]
    # Sums inside the nodes first.
    expected = (parts[0] + parts[1]) + (parts[2] + parts[3])
    whole = torch.cat([noise(rank, 48) for rank in range(world)])
    found = summed.wait().cpu(), gathered.wait().flatten().cpu()
    disconnect()
    return [torch.equal(found[0], expected.view(world, -1)[place.rank]), torch.equal(found[1], whole)]


def test_flat_buffers_are_summed_and_gathered() -> None:
    assert spawn_on_one_gpu(flat_buffers, 4) == [[True, True]] * 4


MODEL = vars(CONFIG.model) | {"num_layers": 5}
MESHES = {
    "ep 2": {"mesh": {"ep": 2}, "dispatch": {"kind": "rank"}},
    "dp 2": {"mesh": {"dp": 2}},
    "ep 2, dp 2": {"mesh": {"dp": 2, "ep": 2}, "dispatch": {"kind": "alltoall"}},
    "1f1b": {"mesh": {"pp": 2}, "schedule": {"pipeline": "1f1b"}},
    "zb_v": {"mesh": {"pp": 2}, "schedule": {"pipeline": "zb_v"}},
    "dualpipe, ep 2": {"mesh": {"pp": 2, "ep": 2}, "schedule": {"pipeline": "dualpipe"}},
    "dualpipev, ep 2": {"mesh": {"pp": 2, "ep": 2}, "schedule": {"pipeline": "dualpipev"}},
}


def layout(name: str) -> Config:
    """Eight micro-batches of a whole step, whatever the layout."""
    sections = {"mesh": {}, "schedule": {}, "dispatch": {"kind": "rank"}} | MESHES[name]
    mesh = {"dp": 1} | sections["mesh"]
    return tiny_config(**sections | {"mesh": mesh}, model=MODEL, train={"sequences": 16, "micro_batch": 2})


def trained(place: Place, config: Config, steps: int) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of some steps from the weights that the CPU starts with."""
    groups = connect(mesh_of(config) if place.world > 1 else Mesh(), place, 60)
    model = build_model(config, groups)
    engine = ShardedEngine(model, config, groups)
    first = build_model(config, on_cpu()).state_dict()
    with torch.no_grad():
        for name, shard in engine.state().items():
            kind, _, logical = name.partition("/")
            for offset, part in shard.ranges() if kind == "master" else ():
                part.copy_(first[logical].flatten()[offset : offset + len(part)])
    engine.loaded(0)
    trainer = Trainer(config, groups, model, engine, lambda at, count: samples(config, at, count), Progress())
    found = [trainer.step() for _ in range(steps)]
    engine.settle()
    disconnect()
    return [(report.loss, report.grad_norm) for report in found]


@pytest.mark.parametrize("name", MESHES)
def test_ranks_train_like_one_process(name: str) -> None:
    config = layout(name)
    expected = trained(Place(0, 1, torch.device("cpu")), config, 3)
    for found in spawn_on_one_gpu(trained, mesh_of(config).world, config, 3):
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
        assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-3)
