"""Measured runs played, in the metrics of their rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.errors import UserError
from dstrain.plan.outcomes import in_metric, outcomes, pair_s
from dstrain.plan.published import job_of_row, machine_of, read
from dstrain.plan.simulation import simulate

ROWS = {row.id: row for row in read()}
DENSE, PAIR = ROWS["dgxc-llama3-8b-bf16-16"], ROWS["dsv3-trace-pair"]


def test_metrics():
    """256 sequences of 8192 tokens on 16 devices in 10 s."""
    job = job_of_row(DENSE)
    tokens = 256 * 8192
    assert in_metric("step_s", job, 10.0) == 10.0
    assert in_metric("pair_ms", job, 10.0) == 10_000
    assert in_metric("tok_s_gpu", job, 10.0) == pytest.approx(tokens / 16 / 10)
    assert in_metric("gpu_h_per_T", job, 10.0) == pytest.approx(10 / 3600 * 16 / tokens * 1e12)
    # 6 for each of 7.5B parameters that multiply, and causal attention: 6 * 32 layers * 32 heads * 256 * 4096.5.
    flops = 6 * 7_504_658_432 + 6 * 32 * 32 * 256 * 4096.5
    assert in_metric("tflops", job, 10.0) == pytest.approx(flops * tokens / 16 / 10 / 1e12, rel=1e-3)


@pytest.mark.parametrize("metric", ["step_s", "tok_s_gpu", "tflops", "gpu_h_per_T"])
def test_an_outcome_has_the_times_behind_its_metric(metric: str):
    """Measured as a step of 13 s, told in any metric."""
    job = job_of_row(DENSE)
    row = replace(DENSE, metric=metric, value=in_metric(metric, job, 13.0))
    (found,) = outcomes([row])
    assert found.predicted_s == simulate(job, machine_of(row)).prediction.step_s
    assert found.predicted == pytest.approx(in_metric(metric, job, found.predicted_s))
    assert found.measured_s == pytest.approx(13.0)
    assert (found.is_moe, found.multi_node) == (False, True)


def test_memory_is_an_outcome_of_its_own():
    row = next(row for row in ROWS.values() if row.memory_gib)
    time, memory = outcomes([row])
    assert (memory.id, memory.metric, memory.measured) == (f"{row.id}:mem", "mem_gib", row.memory_gib)
    assert not memory.predicted_s
    assert time.id == row.id


def test_the_pair_of_the_trace():
    """Four layers, forward and backward, with their transfers hidden: near what one after the other computes."""
    (found,) = outcomes([PAIR])
    assert found.predicted == pytest.approx(1e3 * pair_s(job_of_row(PAIR), machine_of(PAIR)))
    assert found.predicted == pytest.approx(129.0, rel=0.1)


def test_rivals_are_runs_of_one_batch():
    layouts = ("tp1_pp2_dp4_mbc4", "tp2_pp1_dp4_mbc4")
    a, b = (next(outcomes([ROWS[f"b200-llama3_405b_l4_{layout}_cef"]])) for layout in layouts)
    assert a.rivals == b.rivals
    assert a.rivals != next(outcomes([DENSE])).rivals


def test_a_run_that_cannot_be_played_is_named():
    row = replace(DENSE, config={**DENSE.config, "cp": 1, "pp": 4, "sched": "dualpipe", "gbs": 16})
    with pytest.raises(UserError, match=r"Row dgxc-llama3-8b-bf16-16: job.micro_batches=4: "):
        next(outcomes([row]))
    with pytest.raises(UserError, match=r"Row dsv3-trace-pair: ep=1: "):
        next(outcomes([replace(PAIR, config={**PAIR.config, "ep": 1})]))


def test_own_models(tmp_path: Path):
    """A file may bring its models along, and rows may come as a bare list."""
    model = json.loads((Path(__file__).parents[2] / "dstrain/plan/data/published_models.json").read_text())["llama3-8b"]
    row = {"id": "own", "model": "mine", "gpu": "H100", "n_gpu": 8, "metric": "step_s", "value": 1.0}
    row["config"] = {"prec": "bf16", "seq": 4096, "gbs": 8, "mbs": 1, "tp": None, "mem_gib": None}
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"rows": [row], "models": {"mine": {**model, "num_layers": 4}}}))
    (found,) = outcomes(read(file))
    file.write_text(json.dumps([{**row, "model": "llama3-8b"}]))
    (whole,) = outcomes(read(file))
    assert 4 < whole.predicted / found.predicted < 8
