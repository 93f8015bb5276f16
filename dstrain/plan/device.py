"""How long a kernel takes on one device, from its shape and the constants of the machine. Seconds throughout.

    product      waves of tiles at the speed of the matrix units, then the result on its way to memory (on a Hopper, FP8
                 products of DeepGEMM's published table come out within a few percent if that is not hidden)
    attention    operations of the causal half at a speed that long sequences reach
    the rest     bytes over the bandwidth of memory

Each kernel has a fixed cost besides. All speeds are those within a training step (`hardware.sustained`).
"""

from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil

from dstrain.config.hardware import HardwareConfig

# Rows x columns of a tile, and its speed: smaller ones load more bytes for each operation.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.93), (128, 64, 0.8), (64, 64, 0.65))
# Sequence lengths at which causal attention reaches half of its speed, forward and backward (cuDNN on a Hopper at 4K
# and 16K, dstrain/plan/data/alltoall_microbenchmarks.json: 553 and 638, 422 and 523 TFLOP/s).
HALF_FORWARD = 880
HALF_BACKWARD = 1130
# Share of the bandwidth of memory at which products read tiles and write them (fitted to DeepGEMM's table, with 0.76 of
# the peak for the rest: dstrain/plan/data/gpu_microbenchmarks.json, deepgemm_h800_fp8).
STREAMING = 0.88
# With operands of one byte.
NARROW = ("fp8_tensor", "fp8_block", "mxfp8")
# Backward attention computes five products for two.
BACKWARD_FLOPS = 2.5


@dataclass(frozen=True)
class Device:
    """The kernels of a machine."""

    hardware: HardwareConfig
    _cache: dict[tuple[int, int, int, str, int, int], float] = field(default_factory=dict, compare=False, repr=False)

    def product_s(self, m: int, n: int, k: int, products: str, *, groups: int = 1, out_bytes: int = 2) -> float:
        """`groups` products [m, k] x [k, n] in one kernel; `out_bytes` of a value of the result (a sum in memory is
        read and written)."""
        key = (m, n, k, products, groups, out_bytes)
        found = self._cache.get(key)
        if found is None:
            flops_s = 2.0 * m * n * k * groups / (self.speed(products) * self._filled(m, n, groups))
            # Operands come while tiles are multiplied: few rows wait for the weights. A CPU's rate has all that in it.
            in_bytes = groups * (m + n) * k * (1 if products in NARROW else 2)
            in_s = in_bytes / self.streaming_speed if self.hardware.multiprocessors else 0.0
            out_s = groups * m * n * out_bytes / self.streaming_speed if self.hardware.multiprocessors else 0.0
            found = self._cache[key] = max(flops_s, in_s) + out_s + self.hardware.kernel_us * 1e-6
        return found

    def speed(self, products: str) -> float:
        """Operations a second of a large product."""
        machine = self.hardware
        if products not in NARROW or not machine.peak_fp8_tflops:
            tflops = machine.peak_bf16_tflops * machine.gemm_bf16_efficiency
            # TF32 on matrix units; a CPU's file says what it was measured with.
            if products == "float32" and machine.multiprocessors:
                tflops /= 2
        else:
            tflops = machine.peak_fp8_tflops * machine.gemm_fp8_efficiency
        return tflops * 1e12 * machine.sustained

    def _filled(self, m: int, n: int, groups: int) -> float:
        return _filled(m, n, groups, self.hardware.multiprocessors) if self.hardware.multiprocessors else 1.0

    @property
    def streaming_speed(self) -> float:
        """Bytes a second of operands and results of products."""
        return self.hardware.memory_gbytes_per_s * 1e9 * STREAMING

    @property
    def memory_speed(self) -> float:
        """Bytes a second of a kernel bound by memory."""
        return self.hardware.memory_gbytes_per_s * 1e9 * self.hardware.memory_efficiency

    def memory_s(self, num_bytes: float, kernels: int = 1) -> float:
        """Kernels that read and write so many bytes together."""
        return num_bytes / self.memory_speed + kernels * self.hardware.kernel_us * 1e-6

    def attention_s(self, sequences: float, seq_len: int, heads: int, dims: int, *, backward: bool = False) -> float:
        """The core of causal attention; `dims`: of a head, of queries and values together."""
        machine = self.hardware
        flops = sequences * heads * dims * float(seq_len) ** 2
        efficiency, half = machine.attention_efficiency, HALF_FORWARD
        if backward:
            flops, efficiency, half = flops * BACKWARD_FLOPS, machine.attention_backward_efficiency, HALF_BACKWARD
        reached = seq_len / (seq_len + half) if machine.multiprocessors else 1.0
        speed = machine.peak_bf16_tflops * 1e12 * efficiency * reached
        return flops / speed + machine.kernel_us * 1e-6


@lru_cache(maxsize=65536)
def _filled(m: int, n: int, groups: int, processors: int) -> float:
    """Share of the matrix units' time that is spent on the result: tiles stand over its edges, and the last wave is
    not full."""
    best = 0.0
    for rows, columns, speed in TILES:
        tiles = groups * ceil(m / rows) * ceil(n / columns)
        waves = ceil(tiles / processors)
        best = max(best, speed * groups * m * n / (waves * processors * rows * columns))
    return best
