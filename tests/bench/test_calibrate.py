"""Constants out of measurements: found again where the planner made them, plausible where this machine is timed."""

import time
from dataclasses import replace
from functools import cache

import pytest
import torch

from dstrain.bench import kernels
from dstrain.bench.calibrate import Measured, Sample, bounded, compute_s, measure, solved
from dstrain.bench.hardware_file import calibrated
from dstrain.bench.kernels import Clock, micro_batch, narrow, products_of, two_layers
from dstrain.config import load
from dstrain.config.hardware import Evidence, HardwareConfig
from dstrain.config.schema import Config
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.plan.job import job_of
from dstrain.plan.simulation import simulate
from tests.gloo.spawn import spawn

CPU = torch.device("cpu")
# A CPU as calibration would describe it.
MACHINE = HardwareConfig(
    peak_bf16_tflops=0.1,
    gemm_bf16_efficiency=0.8,
    attention_efficiency=0.3,
    attention_backward_efficiency=0.25,
    sustained=1.0,
    device_spread=0.0,
    memory_gbytes_per_s=40.0,
    memory_efficiency=0.1,
    kernel_us=0.0,
    host_us=15.0,
)


def config(*overrides: str) -> Config:
    words = ["model=micro", "model.vocab_size=64", "precision=fp32", "train.seq_len=32", "train.micro_batch=2"]
    return load.compose("verify", [*words, "mesh.dp=1", *overrides])


def as_planned(machine: HardwareConfig) -> Measured:
    """What a machine would measure for which the planner is right."""
    asked = config()
    small, few = job_of(two_layers(asked)), job_of(narrow(asked))
    predictions = {
        "gemm_bf16_efficiency": [shape.predicted_s for shape in products_of(small)],
        "host_us": [lambda hardware: compute_s(few, hardware)],
        "memory_efficiency": [lambda hardware: compute_s(small, hardware)],
    }
    samples = {
        key: [Sample(key, predict(machine), predict) for predict in predicted] for key, predicted in predictions.items()
    }
    return Measured({}, {}, samples)


def test_constants_are_found_again():
    start = replace(MACHINE, gemm_bf16_efficiency=0.5, host_us=100.0, memory_efficiency=0.6)
    found = as_planned(MACHINE).constants(start, "a test")
    for key in ("gemm_bf16_efficiency", "host_us", "memory_efficiency"):
        assert getattr(found, key) == pytest.approx(getattr(MACHINE, key), rel=0.01)


def test_what_no_constant_explains_gives_the_nearest():
    too_quick = [Sample("nothing", 0.0, lambda hardware: 1e-3 + hardware.host_us * 1e-6)]
    assert solved(MACHINE, "host_us", too_quick).host_us == pytest.approx(1e-3, rel=0.01)


def test_no_share_is_above_one_and_no_speed_changes():
    fast = replace(MACHINE, attention_efficiency=2.0)
    found = bounded(fast)
    assert found.attention_efficiency == 1.0
    for share in ("gemm_bf16_efficiency", "attention_efficiency", "attention_backward_efficiency"):
        assert found.peak_bf16_tflops * getattr(found, share) == pytest.approx(0.1 * getattr(fast, share))
    assert bounded(MACHINE) == MACHINE


def test_what_is_measured_has_that_as_its_evidence():
    given = replace(MACHINE, evidence=(Evidence(("host_us", "memory_gib"), "specification", "a sheet"),))
    found = calibrated(given, "a test", host_us=20.0)
    assert found.evidence == (
        Evidence(("memory_gib",), "specification", "a sheet"),
        Evidence(("host_us",), "calibration", "a test"),
    )
    assert calibrated(given, "a test").evidence == given.evidence


def test_products_are_those_of_a_layer():
    asked = config("mesh.ep=2")
    model, tokens = asked.model, asked.train.seq_len * asked.train.micro_batch
    shapes = {(each.m, each.n, each.k, each.groups) for each in products_of(job_of(two_layers(asked)))}
    assert (tokens, 2 * model.intermediate_size, model.hidden_size, 1) in shapes
    held = model.num_experts // 2
    rows = tokens * model.experts_per_token // held
    assert (rows, 2 * model.moe_intermediate_size, model.hidden_size, held) in shapes
    assert (rows, model.hidden_size, model.moe_intermediate_size, held) in shapes


@pytest.mark.parametrize("ep", [1, 2])
def test_small_models_have_a_layer_of_each_kind_and_run(ep: int):
    asked = config(f"mesh.ep={ep}", "model.num_layers=4", "model.mtp.depth=1")
    for small in (two_layers(asked), narrow(asked)):
        assert (small.model.num_layers, small.model.num_dense_layers, small.model.mtp.depth) == (2, 1, 0)
        micro_batch(small, CPU)()
    all_dense = replace(asked, model=replace(asked.model, num_dense_layers=4))
    assert two_layers(all_dense).model.num_layers == 1


def test_who_waits_is_stretched():
    clock = Clock(CPU, None, 3)
    assert clock.stretch(lambda: time.sleep(0.02)) > 3
    assert clock.stretch(lambda: sum(range(300_000))) < clock.stretch(lambda: time.sleep(0.02))


def measured(rank: int, world: int, asked: Config, ranks_per_node: int) -> HardwareConfig:
    kernels.LONG_ENOUGH_S = 0.001
    place = Place(rank, world, CPU)
    groups = connect(Mesh(dp=asked.mesh.dp or 1, ep=asked.mesh.ep), place, ranks_per_node=ranks_per_node)
    found = measure(asked, groups, 1)
    return found.constants(asked.hardware, "a test")


@cache
def by_two_ranks() -> list[HardwareConfig]:
    return spawn(measured, 2, config("mesh.ep=2"), 2)


def test_all_ranks_find_the_same_constants():
    first, second = by_two_ranks()
    assert first == second


def test_a_measured_machine_can_plan_a_run():
    machine = by_two_ranks()[0]
    assert machine.devices_per_node == 2
    assert 0 < machine.transfer_host_share < 1
    assert machine.inter_node_gbytes_per_s == 0 < machine.intra_node_gbytes_per_s
    (evidence,) = machine.evidence
    assert {"peak_bf16_tflops", "host_us", "intra_node_alltoall_efficiency"} <= set(evidence.of)
    asked = replace(config("mesh.ep=2", "train.sequences=8", "train.batch_tokens=null"), hardware=machine)
    assert simulate(job_of(asked), machine).prediction.step_s > 0


def test_one_process_measures_no_links():
    (machine,) = spawn(measured, 1, config(), 1)
    assert (machine.intra_node_gbytes_per_s, machine.inter_node_gbytes_per_s) == (0, 0)
    planned_s = compute_s(job_of(two_layers(config())), machine)
    assert 0 < planned_s < 1
