"""A rank that runs without memory and alone says what the same rank does in a real run."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from dstrain.config.hardware import HardwareConfig
from dstrain.config.schema import Config, MeshConfig
from dstrain.engine.dryrun import RankRun, run_rank
from dstrain.engine.loop import Trainer
from dstrain.engine.sharding import ShardedEngine
from dstrain.engine.state import Progress
from dstrain.mesh.groups import Place, connect, mesh_of
from dstrain.parallel.apply import build_model, logical_parameters
from dstrain.plan.count import flops_per_token, parameters
from tests.gloo.spawn import spawn
from tests.tiny import CPU, samples, tiny_config

WORLD = 4


def config_of(
    mesh: MeshConfig, kind: str = "auto", pipeline: str = "1f1b", wire: str = "auto", **precision: str
) -> Config:
    """Two ranks to a node. Every token visits all four experts, so that routing is balanced whatever the weights."""
    made = tiny_config(
        model={"num_layers": 5, "experts_per_token": 4, "hidden_size": 32},
        train={"sequences": 16, "micro_batch": 1},
        dispatch={"kind": kind, "wire": wire},
        schedule={"pipeline": pipeline},
        precision=precision,
    )
    return replace(made, mesh=mesh, hardware=HardwareConfig(devices_per_node=2))


CASES = {
    "no pipeline": config_of(MeshConfig(1, 4, 1), "rank"),
    "a row for each pair": config_of(MeshConfig(1, 4, 1), "alltoall", wire="fp8"),
    "over nodes": config_of(MeshConfig(1, 4, 1), "hierarchical", compute_dtype="bfloat16"),
    "replicas": config_of(MeshConfig(1, 2, 2), "rank", moments_dtype="bfloat16", grad_wire_dtype="bfloat16"),
    "in fp8": config_of(
        MeshConfig(1, 2, 2), "rank", compute_dtype="bfloat16", moments_dtype="int8", products="fp8", gather="fp8"
    ),
    "1f1b": config_of(MeshConfig(2, 2, 1), "rank"),
    "a V": config_of(MeshConfig(2, 2, 1), "rank", "dualpipev"),
    "mirrored": config_of(MeshConfig(2, 1, 2), "rank", "dualpipe"),
    # The last one: gloo counts the groups that a process has made, and here not all are in one for the embedding.
    "four stages": config_of(MeshConfig(4, 1, 1), compute_dtype="bfloat16"),
}


def real(rank: int, world: int, configs: dict[str, Config]) -> dict[str, dict[str, Any]]:
    """One step of every config, in the words of a dry run."""
    return {name: step_of(rank, world, config) for name, config in configs.items()}


def step_of(rank: int, world: int, config: Config) -> dict[str, Any]:
    groups = connect(mesh_of(config), Place(rank, world, CPU), ranks_per_node=config.hardware.devices_per_node)
    model = build_model(config, groups)
    engine = ShardedEngine(model, config, groups)
    trainer = Trainer(config, groups, model, engine, lambda *at: samples(config, *at), Progress())
    transfers = trainer.step().comm.transfers
    # The gather of the new parameters has begun in the step and may end behind it.
    engine.settle()
    dist.barrier()
    transfers += [t for t in groups.trace.take().transfers if t not in transfers]
    sent: Counter[tuple[str, str]] = Counter()
    for transfer in transfers:
        for link, num_bytes in transfer.sent_bytes.items():
            sent[transfer.kind, link.value] += num_bytes
    states = [(b.adam.exp_avg, b.adam.exp_avg_sq) for b in engine.buckets]
    masters = [b.adam.master for b in engine.buckets if b.compute.dtype != b.adam.master.dtype]
    logicals = logical_parameters(model)
    return {
        "pp": groups.coordinate.pp,
        "dense": sum(x.parameter.numel() for x in logicals if not x.is_expert),
        "experts": sum(x.parameter.numel() for x in logicals if x.is_expert),
        "parameter_bytes": sum(bucket.compute.nbytes for bucket in engine.buckets),
        "gradient_bytes": sum(bucket.grad.nbytes for bucket in engine.buckets),
        "optimizer_bytes": sum(t.nbytes for pair in states for t in pair) + sum(t.nbytes for t in masters),
        # Losses and norms: a few numbers.
        "sent": {place: n for place, n in sent.items() if place[0] != "reduce"},
    }


@pytest.fixture(scope="module")
def steps() -> list[dict[str, dict[str, Any]]]:
    return spawn(real, WORLD, CASES, timeout_s=150)


def runs_of(config: Config) -> list[RankRun]:
    return [run_rank(config, pp) for pp in range(config.mesh.pp)]


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_and_sends_what_it_does_in_a_real_run(steps: list, name: str):
    for run in runs_of(CASES[name]):
        found = steps[run.rank][name]
        assert run.pp == found["pp"]
        assert run.dense_parameters == found["dense"]
        assert run.expert_parameters == found["experts"]
        assert run.parameter_bytes == found["parameter_bytes"]
        assert run.gradient_bytes == found["gradient_bytes"]
        assert run.optimizer_bytes == found["optimizer_bytes"]
        assert {place: n for place, n in run.sent.items() if n} == found["sent"]
        assert found["sent"]


@pytest.mark.parametrize("name", CASES)
def test_the_stages_are_the_model(name: str):
    config = CASES[name]
    runs = runs_of(config)
    held = {name: numel for run in runs for name, numel in run.tensors.items()}
    assert sum(held.values()) == parameters(config.model).trained
    stages = {stage.number: stage for run in runs for stage in run.stages}
    assert [layer for number in sorted(stages) for layer in stages[number].layers] == list(range(5))
    shapes = [(stages[number].input_shape, stages[number].output_shape) for number in sorted(stages)]
    inside = (config.train.micro_batch, config.train.seq_len, config.model.hidden_size)
    assert [shape for both in shapes for shape in both] == [None, *[inside] * 2 * (len(stages) - 1), None]
    assert (stages[0].others[0], stages[len(stages) - 1].others[-1]) == ("embedding", "mtp")


@pytest.mark.parametrize("name", ["no pipeline", "a V", "mirrored"])
def test_operations_are_those_of_the_dimensions(name: str):
    config = CASES[name]
    model, seq_len = config.model, config.train.seq_len
    stages = {stage.number: stage for run in runs_of(config) for stage in run.stages}
    flops = sum(s.forward_flops + s.input_flops + s.weight_flops for s in stages.values())
    keys, values = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    # Both products of attention are as wide as the keys and see all positions, not those up to their own.
    counted, computed = (keys + values) * (seq_len + 1) / 2, 2 * keys * seq_len
    attention = 6 * model.num_heads * (computed - counted) * (model.num_layers + model.mtp.depth)
    assert flops == seq_len * (flops_per_token(model, seq_len) + attention)


def test_recomputation_costs_operations_of_the_backward_pass():
    config = CASES["no pipeline"]
    again = replace(config, train=replace(config.train, recompute=("mla_up",)))
    (kept,), (repeated,) = run_rank(config, 0).stages, run_rank(again, 0).stages
    assert repeated.forward_flops == kept.forward_flops
    assert repeated.weight_flops == kept.weight_flops
    assert kept.input_flops < repeated.input_flops < kept.input_flops + kept.forward_flops


def test_a_large_world_needs_one_process():
    config = replace(config_of(MeshConfig(4, 4, 512), "rank"), train=replace(CASES["a V"].train, sequences=1 << 14))
    run = run_rank(config, 3)
    assert run.rank == 3 * 4 * 512
    assert run.stages[0].micro_batches == 8
    assert not dist.is_initialized()
