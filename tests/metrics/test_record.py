"""The figures of a step under the names that all sinks share."""

from dataclasses import replace

import pytest
import torch

from dstrain.comm.trace import CommTotals
from dstrain.config.hardware import HardwareConfig
from dstrain.config.schema import MetricsConfig
from dstrain.engine.loop import LayerLoad, StepReport
from dstrain.engine.placement import Moved
from dstrain.engine.state import Progress
from dstrain.mesh.topology import Link
from dstrain.metrics.record import step_record
from dstrain.plan.count import flops_per_token
from tests.tiny import TINY

CONFIG = replace(TINY, hardware=HardwareConfig(peak_bf16_tflops=0.5), metrics=MetricsConfig(moe_every_steps=5))
REPORT = StepReport(
    progress=Progress(step=10, samples=80, tokens=960),
    loss=3.5,
    loss_main=3.0,
    loss_mtp=1.5,
    loss_balance=2.0,
    loss_z=0.25,
    lr=0.01,
    grad_norm=1.25,
    tokens=96,
    seconds=0.5,
    comm=CommTotals(
        12.0,
        48.0,
        {"grad": 5_000_000},
        {Link.NETWORK: 3_000_000, Link.NODE: 2_000_000},
        [],
        [],
        waited_ms={"grad": 12.0},
    ),
    comm_exposed_worst_ms=15.0,
    memory_gib=0.75,
    layers=[
        LayerLoad("layers.3.moe.router", torch.tensor([10.0, 20.0, 50.0, 0.0]), ((0, 3), (2, 1)), 1.2, 0.04),
        LayerLoad("mtp.0.layer.moe.router", torch.full((4,), 20.0), ((0, 1), (2, 3)), 1.3, 0.0),
    ],
    moved=None,
    order="1 of 1 micro-batches in flight",
    rounding={},
    stop=False,
)


def test_figures_of_the_run():
    assert {name: value for name, value in step_record(REPORT, CONFIG, world=4).items() if "/" not in name} == {
        "step": 10,
        "tokens": 960,
        "loss": 3.5,
        "loss_main": 3.0,
        "loss_mtp": 1.5,
        "loss_balance": 2.0,
        "loss_z": 0.25,
        "lr": 0.01,
        "grad_norm": 1.25,
        "tokens_per_s": 192.0,
        "tokens_per_s_per_gpu": 48.0,
        "mfu": pytest.approx(48.0 * flops_per_token(CONFIG.model, 12) / 0.5e12),
        "step_ms": 500.0,
        "comm_exposed_ms": 12.0,
        "comm_exposed_worst_ms": 15.0,
        "comm_busy_ms": 48.0,
        "comm_hidden_share": 0.75,
        "comm_node_mb": 2.0,
        "comm_network_mb": 3.0,
        "comm_grad_mb": 5.0,
        "comm_grad_exposed_ms": 12.0,
        "memory_gib": 0.75,
    }


def test_figures_of_quantising():
    report = replace(REPORT, rounding={"gradient_underflow": 0.125})
    assert step_record(report, CONFIG, world=4)["fp8/gradient_underflow"] == 0.125


def test_figures_of_the_layers():
    record = step_record(REPORT, CONFIG, world=4)
    assert {name: value for name, value in record.items() if "/" in name} == {
        "moe/layer03/load_max_over_mean": 2.5,
        "moe/layer03/rank_load_max_over_mean": 1.75,
        "moe/layer03/overload_share": 30 / 80,
        "moe/layer03/dead_experts": 1,
        "moe/layer03/entropy": 1.2,
        "moe/layer03/bias_range": 0.04,
        "moe/mtp0/load_max_over_mean": 1.0,
        "moe/mtp0/rank_load_max_over_mean": 1.0,
        "moe/mtp0/overload_share": 0.0,
        "moe/mtp0/dead_experts": 0,
        "moe/mtp0/entropy": 1.3,
        "moe/mtp0/bias_range": 0.0,
    }


def test_layers_are_reported_every_few_steps_only():
    report = replace(REPORT, progress=Progress(step=11, samples=88, tokens=1056))
    assert not [name for name in step_record(report, CONFIG, world=4) if "/" in name]


def test_experts_that_moved():
    report = replace(REPORT, moved=Moved(3, 2**21, 0.25, 1.75, 1.25))
    record = step_record(report, CONFIG, world=4)
    assert {name: value for name, value in record.items() if name.startswith("placement/")} == {
        "placement/moved_experts": 3,
        "placement/sent_mib": 2.0,
        "placement/ms": 250.0,
        "placement/load_before": 1.75,
        "placement/load_after": 1.25,
    }


def test_without_a_known_peak_there_is_no_mfu():
    assert step_record(REPORT, TINY, world=4)["mfu"] is None
