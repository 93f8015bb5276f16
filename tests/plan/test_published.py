"""The rows that come with dstrain as jobs, and what a row leaves open. test_row_rules.py has rows that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.errors import UserError
from dstrain.plan.job import Job
from dstrain.plan.published import RECOMPUTE, Row, job_of_row, machine_of, read
from dstrain.plan.step import predict

ROWS = {row.id: row for row in read()}
CONFIG = {"prec": "bf16", "seq": 4096, "gbs": 64, "mbs": 1, "pp": 2}
ROW = {"id": "a", "model": "dsv3", "gpu": "H800", "n_gpu": 64, "metric": "step_s", "value": 3.0}


def row(tmp_path: Path, config: dict[str, Any] | None = None, **changes: object) -> Row:
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"rows": [{**ROW, "config": {**CONFIG, **(config or {})}, **changes}]}))
    (found,) = read(file)
    return found


def job(tmp_path: Path, config: dict[str, Any] | None = None, **changes: object) -> Job:
    return job_of_row(row(tmp_path, config, **changes))


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_job(name: str):
    """That a step of can be predicted; all of its devices read the tokens that it says."""
    found = ROWS[name]
    made, machine = job_of_row(found), machine_of(found)
    assert made.gpus == found.n_gpu
    assert made.dp * made.tp * made.cp * made.pp == made.gpus
    assert made.micro_batches * made.micro_batch * made.dp == made.sequences
    assert made.sequences == found.config.get("gbs", made.sequences)
    assert machine.devices_per_node <= made.gpus
    assert 0 < predict(made, machine).mfu < 1


def test_rows_are_many():
    assert len(ROWS) >= 125
    assert {found.metric for found in ROWS.values()} == {"step_s", "tok_s_gpu", "tflops", "gpu_h_per_T", "pair_ms"}
    assert sum(found.memory_gib is not None for found in ROWS.values()) >= 40


def test_what_a_row_does_not_say(tmp_path: Path):
    """Missing axes are 1; 1F1B, or interleaved stages where a rank has several."""
    made = job(tmp_path)
    assert (made.tp, made.cp, made.ep, made.etp, made.chunks) == (1, 1, 1, 1, 1)
    assert (made.pipeline, made.zero, made.overlap, made.splits_weights) == ("1f1b", 1, False, False)
    assert made.recompute == frozenset()
    assert job(tmp_path, {"vp": 4}).pipeline == "interleaved"
    assert job(tmp_path, {"zero": None}).zero == 1


@pytest.mark.parametrize(
    ("sched", "pipeline", "overlap", "splits"),
    [
        ("1f1b", "1f1b", False, False),
        ("zb1p", "zb_1p", False, True),
        ("zbv", "zb_v", False, True),
        ("dualpipe", "dualpipe", True, True),
        ("dualpipev", "dualpipev", True, True),
    ],
)
def test_schedules(tmp_path: Path, sched: str, pipeline: str, overlap: bool, splits: bool):
    made = job(tmp_path, {"sched": sched})
    assert (made.pipeline, made.overlap, made.splits_weights) == (pipeline, overlap, splits)


def test_layers_of_stages(tmp_path: Path):
    """As many on each where that is possible, or as the row says; otherwise the planner spreads them. ZB-V has two
    stages on a rank."""
    assert job(tmp_path, model="llama3-8b").split == (16, 16)
    assert job(tmp_path, {"sched": "zbv"}, model="llama3-8b").split == (8, 8, 8, 8)
    assert job(tmp_path, {"vp": 4}, model="llama3-8b").split == (4,) * 8
    assert job(tmp_path, {"split": [30, 31]}).split == (30, 31)
    assert job(tmp_path).split == ()


@pytest.mark.parametrize(
    ("prec", "products"), [("bf16", "bf16"), ("fp8", "fp8_tensor"), ("fp8blk", "fp8_block"), ("mxfp8", "mxfp8")]
)
def test_numbers(tmp_path: Path, prec: str, products: str):
    assert job(tmp_path, {"prec": prec}).products == products


def test_recomputation(tmp_path: Path):
    assert job(tmp_path, {"recompute": "full"}).recompute == {"layer"}
    assert job(tmp_path, {"recompute": "attn"}).recompute == {"core"}
    assert job(tmp_path, {"recompute": "norm,act"}).recompute == {"norm", "swiglu"}
    assert job(tmp_path, {"recompute": "mla_up, mlp"}).recompute == {"mla_up", "moe"}
    assert all(job(tmp_path, {"recompute": word}).recompute for word in RECOMPUTE if word != "none")


def test_what_is_not_known_is_said(tmp_path: Path):
    """Rather than dropped without a word."""
    found = row(tmp_path, {"recompute": "norm,dropout", "colour": "red"})
    assert found.unknown == {"recompute=dropout", "colour"}
    assert job_of_row(found).recompute == {"norm"}
    assert row(tmp_path).unknown == frozenset()


def test_routers(tmp_path: Path):
    """Tokens go where they like, but for a limit, and DeepSeek's own runs of V3 have one."""
    assert job(tmp_path).model.groups_per_token == 1
    limited = job(tmp_path, {"node_limit": 3}).model
    assert (limited.groups, limited.groups_per_token) == (8, 3)
    own = job(tmp_path, group="deepseek").model
    assert (own.groups, own.groups_per_token) == (8, 4)


def test_machines(tmp_path: Path):
    """Of the GPU, with the row's nodes and cards; on one node no more devices than there are."""
    found = machine_of(row(tmp_path, gpus_per_node=4, nic_GBps_per_gpu=12.5))
    assert (found.name, found.devices_per_node, found.inter_node_gbytes_per_s) == ("h800_sxm", 4, 12.5)
    assert machine_of(row(tmp_path)).inter_node_gbytes_per_s == 50
    assert machine_of(row(tmp_path, n_gpu=4)).devices_per_node == 4


def test_models_of_a_file(tmp_path: Path):
    """Beside those that come with dstrain; one of the same name is meant instead."""
    dims = {"num_layers": 4, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_dim": 256}
    file = tmp_path / "runs.json"
    rows = [{**ROW, "id": name, "model": name, "config": CONFIG} for name in ("mine", "dsv3", "llama3-8b")]
    models = {"mine": {**dims, "vocab_size": 100}, "dsv3": {**dims, "vocab_size": 200, "gated_ffn": False}}
    file.write_text(json.dumps({"rows": rows, "models": models}))
    mine, other, llama = (found.model for found in read(file))
    weights = 2 * 64 * 64 + 2 * 64 * 2 * 16
    assert mine.total == 4 * (weights + 3 * 64 * 256 + 2 * 64) + 2 * 100 * 64 + 64
    assert other.total == 4 * (weights + 2 * 64 * 256 + 2 * 64) + 2 * 200 * 64 + 64
    assert llama.total == pytest.approx(8.03e9, rel=1e-3)


def test_files_that_can_not_be_read(tmp_path: Path):
    with pytest.raises(UserError, match=r"none.json cannot be read: No such file"):
        read(tmp_path / "none.json")
    file = tmp_path / "runs.json"
    file.write_text("{")
    with pytest.raises(UserError, match=r"runs.json is not JSON: "):
        read(file)
    file.write_text('{"rows": []}')
    with pytest.raises(UserError, match=r"runs.json: there are no rows"):
        read(file)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prec": "fp4"}, "Row a: prec='fp4' is not one of bf16, "),
        ({"dispatcher": "pigeon"}, "Row a: dispatcher='pigeon' is not one of a2a, "),
        ({"tp": 3, "pp": 1}, "Row a: n_gpu=64 must be a multiple of tp * cp * pp=3."),
        ({"ep": 64}, "Row a: n_gpu=64 must be a multiple of ep * etp * pp=128."),
        ({"mbs": 3}, "Row a: gbs=64 must be a multiple of mbs * n_gpu / (tp * cp * pp)=96."),
        ({"node_limit": 9}, "Row a: node_limit=9 must be at most 8"),
        (
            {"node_limit": 1, "model": "mixtral-8x7b"},
            "Row a: node_limit=1 must be at most 8, and at least 2 for topk=2",
        ),
        ({"split": [30, 30]}, "Row a: split=[30, 30] must be 2 whole numbers that add up to 61"),
        ({"split": [61]}, "Row a: split=[61] must be 2 whole numbers that add up to 61"),
        ({"split": "even"}, "Row a: split='even' must be 2 whole numbers that add up to 61"),
    ],
)
def test_words_and_layouts_that_are_none(tmp_path: Path, config: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        job(tmp_path, config, model=config.get("model", "dsv3"))
    assert str(caught.value).startswith(message)
