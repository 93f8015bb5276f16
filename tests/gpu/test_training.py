"""Training on GPUs against training on the CPU; skips itself where there is no GPU."""

from dataclasses import replace

import pytest
import torch
from torch import multiprocessing as mp

from dstrain.config.schema import Config
from dstrain.engine.loop import StepReport, Trainer
from dstrain.engine.sharding import ShardedEngine
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect, disconnect
from dstrain.parallel.apply import build_model
from tests.tiny import CPU, samples, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# The kernels want rows of whole 16 bytes.
CONFIG = tiny_config(
    model={"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "kv_lora_rank": 32},
    train={"sequences": 8, "micro_batch": 2},
)


def train(config: Config, place: Place, mesh: Mesh = Mesh(), steps: int = 3) -> list[StepReport]:  # noqa: B008
    groups = connect(mesh, place)
    model = build_model(config, groups)
    engine = ShardedEngine(model, config, groups)
    batches = lambda first, count: samples(config, first, count)  # noqa: E731
    trainer = Trainer(config, groups, model, engine, batches, Progress())
    # Initial weights come from the device's own generator: both sides start from the CPU's.
    start = build_model(config, connect(Mesh(), Place(0, 1, CPU))).state_dict()
    held = model.state_dict()
    shared = {name: value for name, value in start.items() if held[name].shape == value.shape}
    assert mesh.ep > 1 or len(shared) == len(held)
    with torch.no_grad():
        for name, shard in engine.state().items():
            kind, _, logical = name.partition("/")
            if kind == "master":
                flat = start[logical].flatten()
                shard.local.copy_(flat[shard.offset : shard.offset + shard.local.numel()])
    engine.loaded(0)
    return [trainer.step() for _ in range(steps)]


def test_one_gpu_trains_like_the_cpu() -> None:
    gpu, cpu = train(CONFIG, Place(0, 1, torch.device("cuda", 0))), train(CONFIG, Place(0, 1, CPU))
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
    assert gpu[-1].memory_gib > 0


def test_bf16_stays_close_to_fp32() -> None:
    place = Place(0, 1, torch.device("cuda", 0))
    narrow = replace(CONFIG, precision=replace(CONFIG.precision, compute_dtype="bfloat16"))
    for ours, theirs in zip(train(narrow, place), train(CONFIG, place), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.02)


def _rank(rank: int, world: int, port: int, queue: "mp.SimpleQueue[list[float]]") -> None:
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    reports = train(CONFIG, Place(rank, world, device), Mesh(ep=world))
    if rank == 0:
        queue.put([report.loss for report in reports])
        assert any(report.comm.exposed_ms > 0 for report in reports)
    disconnect()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_over_nccl_train_like_the_cpu() -> None:
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (2, 29517, queue), nprocs=2)
    expected = [report.loss for report in train(CONFIG, Place(0, 1, CPU))]
    assert queue.get() == pytest.approx(expected, rel=1e-4)
