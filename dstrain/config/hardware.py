"""The keys of the hardware group: a machine as constants, each with its evidence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """Where constants of a machine come from."""

    # Keys of the hardware group.
    of: tuple[str, ...] = ()
    # specification | benchmark (of single kernels or links, published) | trace (of a training step, published) |
    # calibration (`dstrain calibrate`, `dstrain bench comm`) | assumed
    kind: str = "assumed"
    source: str = ""


@dataclass(frozen=True)
class HardwareConfig:
    """The accelerator and its links, per device, one direction; what `dstrain plan` computes with."""

    name: str = "cpu"
    # Dense peak of the matrix units in TFLOP/s; 0: unknown, MFU is not reported.
    peak_bf16_tflops: float = 0.0
    # 0: no such units.
    peak_fp8_tflops: float = 0.0
    # Tiles of a product run in waves of so many; 0: not in waves (a CPU).
    multiprocessors: int = 0
    # Share of its peak that a large product alone on the device reaches.
    gemm_bf16_efficiency: float = 0.8
    gemm_fp8_efficiency: float = 0.7
    # Of the BF16 peak, for the causal core of attention over long sequences.
    attention_efficiency: float = 0.6
    attention_backward_efficiency: float = 0.45
    # Of these speeds, what is left within a training step (power, other work on the device).
    sustained: float = 0.87
    # Standard deviation of the speed of devices of one kind: a step waits for the slowest one.
    device_spread: float = 0.012
    memory_gib: float = 0.0
    memory_gbytes_per_s: float = 0.0
    # Share of it that kernels bound by memory reach.
    memory_efficiency: float = 0.75
    # Of every kernel beyond its work: start, first and last tile.
    kernel_us: float = 3.0
    # Of the host, to launch a kernel: a step whose kernels are shorter waits for it.
    host_us: float = 10.0
    # Of the host, once a step: batches, sums of losses, the norm of the gradient, launches of the optimiser.
    step_us: float = 0.0
    # Of a CPU: share of the time of a transfer of tokens in which its cores work on it, and not on the model.
    transfer_host_share: float = 0.0
    devices_per_node: int = 1
    # 0: as many as the layout has ranks for.
    nodes: int = 0
    intra_node_gbytes_per_s: float = 0.0
    inter_node_gbytes_per_s: float = 0.0
    # Of an exchange, beyond what its bytes take; 0: unknown, 20 is assumed (arXiv:2505.09343, table 5).
    intra_node_latency_us: float = 0.0
    inter_node_latency_us: float = 0.0
    # Share of a link that reductions and gathers reach, and that all-to-alls do.
    intra_node_efficiency: float = 0.8
    inter_node_efficiency: float = 0.85
    intra_node_alltoall_efficiency: float = 0.75
    inter_node_alltoall_efficiency: float = 0.75
    # US dollars for a device and hour; 0: no price is told.
    price_per_hour: float = 0.0
    evidence: tuple[Evidence, ...] = ()
