"""Kernels against published tables, and against small cases done by hand."""

import json
from dataclasses import replace
from importlib import resources
from statistics import median

import pytest

from dstrain.config.hardware import HardwareConfig
from dstrain.hardware import named
from dstrain.plan.device import BACKWARD_FLOPS, STREAMING, Device

# 100 TFLOP/s, 100 processors, 1 TB/s, and kernels that cost nothing beside.
PLAIN = HardwareConfig(
    peak_bf16_tflops=100.0,
    multiprocessors=100,
    gemm_bf16_efficiency=1.0,
    attention_efficiency=0.5,
    attention_backward_efficiency=0.4,
    sustained=1.0,
    memory_gbytes_per_s=1000.0,
    memory_efficiency=1.0,
    kernel_us=0.0,
)
# So much memory bandwidth that a product waits for nothing but its tiles.
TILES_ONLY = replace(PLAIN, memory_gbytes_per_s=1e9)


def table(file: str, name: str) -> list[dict]:
    return json.loads((resources.files("dstrain.plan") / "data" / f"{file}.json").read_text())[name]


def test_published_fp8_products():
    """DeepGEMM on an H800 that does nothing else: its power is not shared. The smallest products, and groups of less
    than two tiles of rows, are further off than the others."""
    device = Device(replace(named("h800_sxm"), sustained=1.0))
    errors = {}
    for row in table("gpu_microbenchmarks", "deepgemm_h800_fp8"):
        seconds = device.product_s(row["M"], row["N"], row["K"], "fp8_block", groups=row["groups"])
        measured_s = 2 * row["M"] * row["N"] * row["K"] * row["groups"] / row["tflops"] / 1e12
        errors[row["groups"], row["M"], row["N"]] = abs(seconds / measured_s - 1)
    assert len(errors) > 20
    assert median(errors.values()) < 0.05
    assert max(errors.values()) < 0.33
    assert max(error for (_, rows, _), error in errors.items() if rows >= 1024) < 0.12


@pytest.mark.parametrize(("gpu", "machine", "close"), [("Hopper", "h100_sxm", 0.04), ("Blackwell", "b200", 0.1)])
def test_published_attention(gpu: str, machine: str, close: float):
    """cuDNN's heads of MLA: 192 and 128 values."""
    device = Device(named(machine))
    rows = [
        row for row in table("alltoall_microbenchmarks", "kernels") if row["gpu"] == gpu and "SDPA" in row["kernel"]
    ]
    assert {row["seq"] for row in rows} == {4096, 16384}
    for row in rows:
        # Two products over half of the positions.
        flops = 2 * 2 * 128 * (192 + 128) / 2 * row["seq"] ** 2 / 2
        forward_s = device.attention_s(1, row["seq"], 128, 320)
        backward_s = device.attention_s(1, row["seq"], 128, 320, backward=True)
        assert flops / forward_s / 1e12 == pytest.approx(row["fwd_tflops"], rel=close)
        assert BACKWARD_FLOPS * flops / backward_s / 1e12 == pytest.approx(row["bwd_tflops"], rel=close)


def test_waves_of_tiles():
    """80 tiles of 128 x 256 on 100 processors take as long as 100; 101 of them two waves."""
    device = Device(TILES_ONLY)
    wave_s = 100 * 2 * 128 * 256 * 1024 / 100e12
    one_s = device.product_s(128 * 8, 256 * 10, 1024, "bf16")
    assert one_s == pytest.approx(wave_s, rel=1e-3)
    assert device.product_s(128 * 10, 256 * 10, 1024, "bf16") == pytest.approx(one_s, rel=1e-3)
    assert device.product_s(128 * 10, 256 * 11, 1024, "bf16") > 1.5 * one_s


def test_a_few_rows_take_as_long_as_a_tile():
    device = Device(TILES_ONLY)
    assert device.product_s(1, 6400, 1024, "bf16") == pytest.approx(device.product_s(64, 6400, 1024, "bf16"), rel=1e-6)


def test_groups_share_waves():
    """Ten products of 8 tiles are one of 80; each begins tiles of its own."""
    device = Device(TILES_ONLY)
    together_s = device.product_s(128, 256 * 8, 1024, "bf16", groups=10)
    assert together_s == pytest.approx(device.product_s(128 * 10, 256 * 8, 1024, "bf16"), rel=1e-6)
    assert device.product_s(129, 256 * 8, 1024, "bf16", groups=10) > 1.2 * together_s


def test_a_product_of_few_rows_waits_for_weights():
    """8 x 4096 x 4096 in BF16: 33.6 MB in at what products stream of 1 TB/s, 65.5 KB out."""
    device = Device(replace(PLAIN, peak_bf16_tflops=1000.0))
    seconds, streamed = device.product_s(8, 4096, 4096, "bf16"), 1e12 * STREAMING
    assert seconds == pytest.approx((2 * (8 + 4096) * 4096 + 2 * 8 * 4096) / streamed)
    # Operands of one byte come in half of the time, though there are no units for them.
    narrow_s = device.product_s(8, 4096, 4096, "fp8_block")
    assert narrow_s == pytest.approx(((8 + 4096) * 4096 + 2 * 8 * 4096) / streamed)


def test_what_is_written_is_not_hidden():
    device = Device(PLAIN)
    more_s = device.product_s(4096, 4096, 4096, "bf16", out_bytes=8) - device.product_s(4096, 4096, 4096, "bf16")
    assert more_s == pytest.approx(6 * 4096**2 / (1e12 * STREAMING))


def test_speeds_by_format():
    fast = replace(PLAIN, peak_fp8_tflops=200.0, gemm_fp8_efficiency=0.5, gemm_bf16_efficiency=0.8, sustained=0.9)
    device = Device(fast)
    assert device.speed("bf16") == pytest.approx(0.8 * 0.9 * 100e12)
    assert device.speed("float32") == device.speed("bf16") / 2
    assert {device.speed(name) for name in ("fp8_tensor", "fp8_block", "mxfp8")} == {0.5 * 0.9 * 200e12}
    # Without such units, values of one byte are multiplied as others are.
    assert Device(replace(fast, peak_fp8_tflops=0.0)).speed("fp8_block") == device.speed("bf16")


def test_kernels_bound_by_memory():
    device = Device(replace(PLAIN, memory_efficiency=0.5, kernel_us=3.0))
    assert device.memory_s(1e9, kernels=2) == pytest.approx(2e-3 + 6e-6)


def test_longer_sequences_are_faster():
    """In operations a second, up to what a file says of long ones; a backward pass has five products for two."""
    device = Device(PLAIN)
    speeds = [n**2 / device.attention_s(1, n, 16, 256) for n in (512, 2048, 8192, 1 << 20)]
    assert speeds == sorted(speeds)
    assert 16 * 256 * speeds[-1] == pytest.approx(0.5 * 100e12, rel=2e-3)
    ratio = device.attention_s(1, 1 << 20, 16, 256, backward=True) / device.attention_s(1, 1 << 20, 16, 256)
    assert ratio == pytest.approx(2.5 * 0.5 / 0.4, rel=2e-3)


def test_a_cpu_has_no_waves():
    """Its file says what it was measured with: nothing is derived from tiles or from matrix units."""
    device = Device(replace(TILES_ONLY, multiprocessors=0))
    assert device.product_s(3, 5, 7, "bf16") == pytest.approx(2 * 3 * 5 * 7 / 100e12, rel=1e-3)
    assert device.speed("float32") == device.speed("bf16")
    assert device.attention_s(1, 64, 2, 32) == pytest.approx(2 * 32 * 64**2 / (0.5 * 100e12))
