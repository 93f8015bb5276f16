"""The rules of a machine, with the field that each names."""

from dataclasses import replace
from math import inf, nan

import pytest

from dstrain.config import load
from dstrain.config.hardware import Evidence, HardwareConfig
from dstrain.config.machine import CONSTANTS, check_hardware, check_predictable, is_share
from dstrain.errors import ConfigError

GOOD = HardwareConfig(
    name="good",
    peak_bf16_tflops=100.0,
    memory_gbytes_per_s=1000.0,
    devices_per_node=8,
    intra_node_gbytes_per_s=100.0,
    evidence=(Evidence(("peak_bf16_tflops",), "specification", "a data sheet"),),
)

BROKEN = [
    # key, value, part of the rule, part of the cure
    ("inter_node_gbytes_per_s", -1.0, "at least 0", "GB/s of one direction"),
    ("intra_node_gbytes_per_s", -0.1, "at least 0", "GB/s of one direction"),
    ("memory_gbytes_per_s", inf, "finite number", "GB/s"),
    ("memory_gib", nan, "finite number", "GiB"),
    ("peak_fp8_tflops", -3.0, "at least 0", "0 where there is no such unit"),
    ("gemm_bf16_efficiency", 0.0, "above 0, and at most 1", "0.8"),
    ("inter_node_alltoall_efficiency", 1.01, "above 0, and at most 1", "0.8"),
    ("sustained", nan, "finite number", ""),
    ("sustained", 90.0, "at most 1", ""),
    ("kernel_us", -1.0, "at least 0", "microseconds"),
    ("intra_node_latency_us", -1.0, "at least 0", "0 where they are not known"),
    ("devices_per_node", 0, "at least 1", "Raise it"),
    ("nodes", -1, "at least 0", "Raise it"),
    ("multiprocessors", -1, "at least 0", "Raise it"),
    ("price_per_hour", -2.0, "at least 0", "US dollars"),
]


def refused(hardware: HardwareConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_hardware(hardware)
    assert caught.value.cure.endswith((".", "?"))
    return caught.value


@pytest.mark.parametrize(("key", "value", "rule", "cure"), BROKEN)
def test_number(key: str, value: float, rule: str, cure: str):
    error = refused(replace(GOOD, **{key: value}))
    assert (error.field, str(error.value)) == (f"hardware.{key}", str(value))
    assert rule in error.rule
    assert cure in error.cure


@pytest.mark.parametrize("key", CONSTANTS)
def test_no_constant_may_be_negative(key: str):
    assert refused(replace(GOOD, **{key: -1})).field == f"hardware.{key}"


@pytest.mark.parametrize(
    ("evidence", "field", "said"),
    [
        (Evidence(("memory_gib",), "rumour", "a forum"), ".kind", "specification, calibration, benchmark, trace"),
        (Evidence(("memory_gib",), "trace", ""), ".source", "Name the document"),
        (Evidence(("memory_gb",), "trace", "a file"), ".of", "Did you mean memory_gib?"),
        (Evidence(("name",), "trace", "a file"), ".of", "no such constant"),
        (Evidence(("memory_gib", "peak_bf16_tflops"), "trace", "a file"), ".of", "names it already"),
    ],
)
def test_evidence(evidence: Evidence, field: str, said: str):
    error = refused(replace(GOOD, evidence=(*GOOD.evidence, evidence)))
    assert error.field == f"hardware.evidence[1]{field}"
    assert said in str(error)


def test_what_is_not_known_is_legal():
    check_hardware(HardwareConfig())
    check_hardware(GOOD)


def test_a_config_is_checked():
    with pytest.raises(ConfigError) as caught:
        load.compose("train", ["data.path=x", "hardware=h100_sxm", "hardware.inter_node_gbytes_per_s=-1"])
    assert str(caught.value) == (
        "hardware.inter_node_gbytes_per_s=-1.0: it must be at least 0. "
        "Give GB/s of one direction, or 0 where it is not known."
    )


def test_shares():
    assert {"sustained", "memory_efficiency", "attention_backward_efficiency"} < set(filter(is_share, CONSTANTS))
    assert not set(filter(is_share, CONSTANTS)) & {"memory_gib", "price_per_hour", "peak_bf16_tflops"}


@pytest.mark.parametrize(
    ("hardware", "devices", "missing"),
    [
        (HardwareConfig(), 1, "peak_bf16_tflops"),
        (replace(GOOD, memory_gbytes_per_s=0.0), 1, "memory_gbytes_per_s"),
        (replace(GOOD, intra_node_gbytes_per_s=0.0), 2, "intra_node_gbytes_per_s"),
        (GOOD, 9, "inter_node_gbytes_per_s"),
        (replace(GOOD, devices_per_node=1), 2, "inter_node_gbytes_per_s"),
    ],
)
def test_a_prediction_needs_speeds(hardware: HardwareConfig, devices: int, missing: str):
    with pytest.raises(ConfigError) as caught:
        check_predictable(hardware, devices)
    assert caught.value.field == f"hardware.{missing}"
    assert "dstrain calibrate" in caught.value.cure


def test_only_the_links_that_a_job_crosses_matter():
    check_predictable(GOOD, 8)
    check_predictable(replace(GOOD, intra_node_gbytes_per_s=0.0), 1)
    check_predictable(replace(GOOD, devices_per_node=1, intra_node_gbytes_per_s=0.0, inter_node_gbytes_per_s=1.0), 16)
