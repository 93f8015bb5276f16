"""What a rank is said to hold is what the engine holds."""

from dataclasses import replace

import pytest

from dstrain.config.schema import Config, MeshConfig
from dstrain.engine.dryrun import RankRun, run_rank
from dstrain.plan.job import job_of
from dstrain.plan.memory import GIB, rank_memory
from tests.plan.test_memory import GPU, config_of


@pytest.mark.parametrize(
    "config",
    [
        config_of(MeshConfig(1, 4, 1), compute_dtype="bfloat16"),
        config_of(MeshConfig(1, 2, 2), moments_dtype="bfloat16"),
        config_of(MeshConfig(2, 2, 1)),
        config_of(MeshConfig(2, 1, 2), "dualpipe"),
        config_of(MeshConfig(2, 2, 1), "dualpipev", compute_dtype="bfloat16"),
        config_of(MeshConfig(4, 1, 1), compute_dtype="bfloat16"),
    ],
    ids=["experts spread", "replicas", "1f1b", "mirrored", "a V", "four stages"],
)
def test_every_rank_holds_what_the_engine_holds(config: Config) -> None:
    found = rank_memory(job_of(config), GPU)
    for pp in range(config.mesh.pp):
        run = run_rank(config, pp)
        # Buckets are padded to multiples of 16 elements on each of their ranks (engine/sharding.py): here one of dense
        # parameters, one of experts and, between stages, one of the embedding.
        spare = 3 * 16 * config.mesh.ep * (config.mesh.dp or 1) * 2 * 4
        assert 0 <= run.parameter_bytes - found[pp].weights_gib * GIB <= spare
        assert 0 <= run.gradient_bytes - found[pp].gradients_gib * GIB <= spare
        assert 0 <= run.optimizer_bytes - found[pp].optimizer_gib * GIB <= 3 * spare
        assert exact_parameters(run) * 4 == pytest.approx(found[pp].gradients_gib * GIB, abs=1e-3)


def exact_parameters(run: RankRun) -> int:
    return run.dense_parameters + run.expert_parameters


def test_fp8_weights_stand_beside_those_in_bf16() -> None:
    job = job_of(config_of(MeshConfig(1, 4, 1), compute_dtype="bfloat16"))
    plain, narrow = (rank_memory(replace(job, products=p), GPU)[0] for p in ("bf16", "fp8_block"))
    # Two bytes more for all but embedding, head, router and norms.
    products = (narrow.weights_gib - plain.weights_gib) * GIB / 2
    model, layers = job.model, job.model.layers + job.model.mtp
    moe = job.model.moe_layers + job.model.mtp
    one = 3 * model.hidden
    expected = layers * model.attention_weights + model.dense_layers * one * model.ffn
    expected += moe * one * (model.shared_ffn + model.experts // 4 * model.expert_ffn) + model.mtp * 2 * model.hidden**2
    assert products == pytest.approx(expected)
