"""Configs as jobs: counts that follow from the mesh, and what a config leaves open."""

from dataclasses import replace

import pytest

from dstrain.config.load import compose
from dstrain.config.schema import Config
from dstrain.errors import ConfigError
from dstrain.plan.architecture import Architecture
from dstrain.plan.job import Job, job_of
from dstrain.plan.split import split

MODEL = Architecture("test", 32000, 2048, 32, 0, 16, 16, 128, 128, 0, 0, 128, 8192, True)


def config(*changes: str) -> Config:
    made = compose("plan", ["+experiment=tiny_cpu", "hardware=h100_sxm", "train.sequences=64", *changes])
    return replace(made, model=replace(made.model, vocab_size=320))


def test_counts_of_a_job():
    """1024 devices: 4 * 2 * 8 of a replica of the dense weights, and 8 * 32 * 1 of one of the experts."""
    job = Job(MODEL, 1024, 8192, 512, micro_batch=2, tp=4, cp=2, pp=8, ep=32)
    assert (job.dp, job.expert_dp, job.micro_batches, job.tokens) == (16, 4, 16, 8192)
    assert Job(MODEL, 64, 4096, 64, ep=8, etp=2).expert_dp == 4


def test_stages_of_a_pipeline():
    job = Job(MODEL, 8, 4096, 32, pp=8)
    stages = {"1f1b": 8, "zb_1p": 8, "zb_v": 16, "dualpipe": 8, "dualpipev": 16}
    assert {name: replace(job, pipeline=name).num_stages for name in stages} == stages
    assert replace(job, pipeline="interleaved", chunks=3).num_stages == 24
    assert replace(job, pp=1).num_stages == 1


def test_deepseek_v3():
    """The recipe, with the layout of arXiv:2412.19437: 2048 devices, PP16, EP64, DualPipe, FP8 in blocks."""
    made = compose("plan", ["+experiment=deepseek_v3"])
    job = job_of(replace(made, model=replace(made.model, vocab_size=129280)))
    assert (job.gpus, job.pp, job.ep, job.dp, job.expert_dp) == (2048, 16, 64, 128, 2)
    assert (job.pipeline, job.overlap, job.products, job.wire) == ("dualpipe", True, "fp8_block", "fp8")
    assert (job.moment_bytes, job.master_bytes, job.gather_bytes) == (2, 4, 1)
    assert sum(job.split) == 61
    assert len(job.split) == 16
    assert job.model.total == 671_026_404_352


def test_the_split_is_that_of_the_trainer():
    made = config("mesh.pp=2", "mesh.ep=1", "mesh.dp=1", "schedule.pipeline=zb_v", "model.num_layers=6")
    job = job_of(made)
    assert list(job.split) == [len(stage.layers) for stage in split(made, 4)]
    assert job.num_stages == 4
    assert (job.overlap, job.dispatcher) == (False, "local")


def test_what_a_config_leaves_open():
    """Micro-batches in flight, transfers under compute, and the format of rows follow from the layout."""
    spread = job_of(config("mesh.ep=4", "mesh.pp=1", "mesh.dp=1"))
    assert (spread.in_flight, spread.overlap) == (2, True)
    alone = job_of(config("mesh.ep=1", "mesh.pp=1", "mesh.dp=1"))
    assert (alone.in_flight, alone.overlap) == (1, False)
    one_by_one = job_of(config("mesh.ep=4", "mesh.pp=1", "mesh.dp=1", "schedule.in_flight=1"))
    assert (one_by_one.in_flight, one_by_one.overlap) == (1, False)
    piped = job_of(config("mesh.ep=2", "mesh.pp=2", "mesh.dp=1", "schedule.pipeline=1f1b"))
    assert (piped.in_flight, piped.overlap) == (1, False)
    asked = job_of(config("mesh.ep=2", "mesh.pp=2", "mesh.dp=1", "schedule.pipeline=1f1b", "schedule.overlap=true"))
    assert asked.overlap


@pytest.mark.parametrize(
    ("changes", "products", "wire", "master_bytes"),
    [
        (["precision.compute_dtype=float32"], "float32", "float32", 0),
        (["precision.compute_dtype=bfloat16"], "bf16", "bfloat16", 4),
        (["precision.compute_dtype=bfloat16", "precision.products=fp8"], "fp8_block", "fp8", 4),
        (["precision.compute_dtype=bfloat16", "precision.products=mxfp8"], "mxfp8", "mxfp8", 4),
        (["precision.compute_dtype=bfloat16", "dispatch.wire=logfmt8"], "bf16", "logfmt8", 4),
    ],
)
def test_numbers(changes: list[str], products: str, wire: str, master_bytes: int):
    job = job_of(config("mesh.ep=2", "mesh.dp=1", *changes))
    assert (job.products, job.wire, job.master_bytes) == (products, wire, master_bytes)


def test_weights_are_gathered_in_fp8_where_all_products_of_them_are():
    """And in the compute dtype where it is asked for."""
    narrow = ["mesh.ep=2", "mesh.dp=1", "precision.compute_dtype=bfloat16", "precision.products=fp8"]
    assert job_of(config(*narrow, "precision.gather=auto")).gather_bytes == 1
    assert job_of(config(*narrow, "precision.gather=compute")).gather_bytes == 2
    assert job_of(config("mesh.ep=1", "mesh.dp=1", "precision.compute_dtype=float32")).gather_bytes == 4


def test_a_batch_in_tokens():
    made = config("mesh.ep=1", "mesh.dp=1")
    length = made.train.seq_len
    by_tokens = replace(made, train=replace(made.train, sequences=None, batch_tokens=32 * length))
    by_sequences = replace(made, train=replace(made.train, sequences=32, batch_tokens=None))
    assert job_of(by_tokens) == job_of(by_sequences)
    assert job_of(by_tokens).sequences == 32


def test_replicas_fill_the_machine():
    """dp=null takes all that is left."""
    made = config("mesh.ep=2", "mesh.dp=null", "hardware.nodes=2")
    assert (job_of(made).gpus, job_of(made).dp) == (16, 16)


def test_a_layout_that_does_not_fit_the_machine_is_refused():
    made = config("mesh.ep=2", "mesh.dp=2", "hardware.nodes=2")
    with pytest.raises(ConfigError, match=r"hardware.nodes=2: 16 devices are not the 4 ranks of mesh.pp=1"):
        job_of(made)
