"""The machines of conf/hardware, files that are none, and the intervals that follow from evidence."""

import json
from dataclasses import fields, replace
from importlib import resources
from math import hypot
from pathlib import Path

import pytest

from dstrain.config import load
from dstrain.config.hardware import Evidence, HardwareConfig
from dstrain.config.machine import CONSTANTS, KINDS
from dstrain.errors import ConfigError, UserError
from dstrain.hardware import GPUS, SPREAD, interval, named, names, of_gpu

DATA = resources.files("dstrain.plan") / "data"
DEFAULTS = {entry.name: entry.default for entry in fields(HardwareConfig)}
MACHINES = [name for name in names() if name != "cpu"]


@pytest.mark.parametrize("name", names())
def test_read_as_hydra_reads_it(name: str):
    assert named(name) == load.compose("train", ["data.path=x", f"hardware={name}"]).hardware
    assert named(name).name == name


@pytest.mark.parametrize("name", MACHINES)
def test_constants_have_evidence(name: str):
    machine = named(name)
    found = {key for evidence in machine.evidence for key in evidence.of}
    assert {key for key in CONSTANTS if getattr(machine, key) != DEFAULTS[key]} <= found
    # Whole steps are what predictions are compared with.
    assert not [evidence for evidence in machine.evidence if "published_runs" in evidence.source]
    assert machine.peak_bf16_tflops > 0
    assert machine.memory_gbytes_per_s > 0
    assert machine.peak_fp8_tflops in (0, pytest.approx(2 * machine.peak_bf16_tflops, rel=0.02))


@pytest.mark.parametrize(
    ("name", "board"),
    [
        ("a100_80g", "A100 SXM"),
        ("a100_pcie_80g", "A100 PCIe"),
        ("h100_sxm", "H100 SXM"),
        ("b200", "B200"),
        ("b300", "B300"),
        ("gb200", "GB200"),
    ],
)
def test_products_are_those_of_the_benchmark(name: str, board: str):
    machine = named(name)
    best = json.loads((DATA / "gpu_microbenchmarks.json").read_text())
    assert machine.gemm_bf16_efficiency * machine.peak_bf16_tflops == pytest.approx(best["mamf_bf16"][board], rel=2e-3)
    # Of an H100 there are two benchmarks that differ.
    if board in best["mamf_fp8"]:
        assert machine.gemm_fp8_efficiency * machine.peak_fp8_tflops == pytest.approx(best["mamf_fp8"][board], rel=2e-3)


def test_variants_differ_in_what_their_names_say():
    large, small = named("a100_80g"), named("a100_sxm_40g")
    assert (large.intra_node_gbytes_per_s, large.peak_bf16_tflops) == (
        small.intra_node_gbytes_per_s,
        small.peak_bf16_tflops,
    )
    assert small.memory_gib < 40 < 79 < large.memory_gib < 80
    assert named("h800_sxm").intra_node_gbytes_per_s == 400 / 2
    # 25 Gb/s for eight devices.
    assert named("a100_pcie_25g").inter_node_gbytes_per_s == 25 / 8 / 8
    assert named("h100_500w").gemm_bf16_efficiency < named("h100_sxm").gemm_bf16_efficiency


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("H100", "h100_sxm"),
        ("h100-500w", "h100_500w"),
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("H100-PCIe", "h100_pcie"),
        ("A100", "a100_80g"),
        ("A100-40", "a100_sxm_40g"),
        ("NVIDIA A100-SXM4-40GB", "a100_sxm_40g"),
        ("A100-PCIE-80GB", "a100_pcie_80g"),
        ("B200-box", "b200_box"),
        ("GB300", "gb300"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("4090", "rtx_4090"),
        ("L40S", "l40s"),
        ("a100_pcie_25g", "a100_pcie_25g"),
    ],
)
def test_gpu(gpu: str, name: str):
    assert of_gpu(gpu).name == name


def test_every_gpu_of_published_runs_has_a_machine():
    rows = json.loads((DATA / "published_runs.json").read_text())["rows"]
    assert {of_gpu(row["gpu"]).name for row in rows} <= set(MACHINES)
    assert set(GPUS.values()) <= set(MACHINES)


def test_unknown_names():
    with pytest.raises(UserError, match=r"gpu=MI300X: there is no machine for this GPU\. Use one of a100_80g, "):
        of_gpu("MI300X")
    with pytest.raises(ConfigError, match=r"hardware=h100_smx: .*Choose one of .*\. Did you mean h100_sxm\?"):
        named("h100_smx")


GOOD = """
name: mine
peak_bf16_tflops: 100
devices_per_node: 4
evidence:
  - of: [peak_bf16_tflops]
    kind: calibration
    source: an afternoon
"""


def test_a_file_of_ones_own(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    evidence = (Evidence(("peak_bf16_tflops",), "calibration", "an afternoon"),)
    assert named("mine", tmp_path) == HardwareConfig("mine", 100.0, devices_per_node=4, evidence=evidence)
    assert isinstance(named("mine", tmp_path).peak_bf16_tflops, float)
    assert names(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("devices_per_node: 4", "inter_node_gbytes_per_s: -1", "hardware.inter_node_gbytes_per_s=-1.0: it must be at"),
        ("peak_bf16_tflops: 100", "peak_bf16_tflops: .nan", "hardware.peak_bf16_tflops=nan: it must be a finite"),
        ("peak_bf16_tflops: 100", "peak_bf16_tflops: fast", "hardware.peak_bf16_tflops=fast: it must be a number"),
        ("peak_bf16_tflops: 100", "peak_bf16_tflops: true", "hardware.peak_bf16_tflops=True: it must be a number"),
        ("devices_per_node: 4", "devices_per_node: 4.5", "hardware.devices_per_node=4.5: it must be a whole number"),
        ("devices_per_node: 4", "device_per_node: 4", "there is no such key .* Did you mean hardware.devices_per_node"),
        ("name: mine", "name: 7", "hardware.name=7: it must be text"),
        ("[peak_bf16_tflops]", "peak_bf16_tflops", r"hardware.evidence\[0\].of=peak_bf16_tflops: it must be a list"),
        ("[peak_bf16_tflops]", "[peak]", r"hardware.evidence\[0\].of=peak: a machine has no such constant"),
        ("kind: calibration", "kind: hope", r"hardware.evidence\[0\].kind=hope: there is no such kind of evidence"),
        (GOOD, "- a\n- list", "it must be a mapping of keys to values"),
        ("name: mine", "name: [", "mine.yaml: this is not valid YAML"),
    ],
)
def test_a_file_that_is_no_machine(tmp_path: Path, old: str, new: str, said: str):
    (tmp_path / "mine.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=said) as caught:
        named("mine", tmp_path)
    assert str(tmp_path / "mine.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


# -- Intervals --------------------------------------------------------------------------------------------------------

MACHINE = HardwareConfig(
    "known",
    peak_bf16_tflops=100.0,
    memory_gbytes_per_s=1000.0,
    inter_node_gbytes_per_s=50.0,
    gemm_bf16_efficiency=0.95,
    evidence=(
        Evidence(("peak_bf16_tflops",), "specification", "a data sheet"),
        Evidence(("memory_gbytes_per_s",), "benchmark", "a table"),
        Evidence(("gemm_bf16_efficiency",), "assumed", "a guess"),
    ),
)


def test_one_constant_moves_by_its_spread():
    low, high = interval(MACHINE, lambda machine: 3 * machine.peak_bf16_tflops)
    assert (low, high) == pytest.approx((300 - 300 * SPREAD["specification"], 300 + 300 * SPREAD["specification"]))


def test_without_evidence_a_constant_is_assumed():
    low, high = interval(MACHINE, lambda machine: machine.inter_node_gbytes_per_s)
    assert (low, high) == pytest.approx((50 * (1 - SPREAD["assumed"]), 50 * (1 + SPREAD["assumed"])))


def test_changes_add_in_squares():
    low, high = interval(MACHINE, lambda machine: machine.peak_bf16_tflops + machine.memory_gbytes_per_s)
    change = hypot(100 * SPREAD["specification"], 1000 * SPREAD["benchmark"])
    assert (low, high) == pytest.approx((1100 - change, 1100 + change))


def test_a_time_may_lose_more_than_it_gains():
    low, high = interval(MACHINE, lambda machine: 1000 / machine.inter_node_gbytes_per_s)
    assert (low, high) == pytest.approx((20 / (1 + SPREAD["assumed"]), 20 / (1 - SPREAD["assumed"])))


def test_shares_stay_below_one():
    low, high = interval(MACHINE, lambda machine: machine.gemm_bf16_efficiency)
    assert (low, high) == pytest.approx((0.95 * (1 - SPREAD["assumed"]), 1.0))


def test_counts_and_unknown_constants_stay():
    low, high = interval(replace(MACHINE, nodes=3), lambda machine: 1.0 + machine.nodes + machine.memory_gib)
    assert (low, high) == (4.0, 4.0)


def test_better_evidence_narrows_the_interval():
    def width(kind: str) -> float:
        evidence = (Evidence(("inter_node_gbytes_per_s",), kind, "somewhere"),)
        low, high = interval(replace(MACHINE, evidence=evidence), lambda machine: machine.inter_node_gbytes_per_s)
        return high - low

    widths = [width(kind) for kind in KINDS]
    assert widths == sorted(widths)
    assert len(set(widths)) == len(widths)
    assert set(SPREAD) == set(KINDS)
