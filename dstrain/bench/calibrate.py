"""Constants of a machine out of measurements: each such that the planner's own formulas give the times that were taken.

    products at the shapes of the config's layers        share of the peak
    the core of attention, forward and backward          shares of the peak
    a narrow model, hardly more than launches            time of the host for a kernel
    two layers of the config's model                     share of the memory's speed: the rest of a layer
    a step of the narrow model                           time of the host once a step
    links; rows through every transport; buckets         speeds, latencies, shares of them

A constant stands for what happens at the sizes of the config, so it is measured there: the planner's formulas say how
it goes on from them.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isclose, sqrt

import torch

from dstrain.bench import kernels
from dstrain.bench.comm import Exchange, buckets, exchanges, speeds
from dstrain.bench.hardware_file import calibrated
from dstrain.bench.kernels import Clock, Product
from dstrain.comm.probe import Speed
from dstrain.config.hardware import HardwareConfig
from dstrain.config.schema import Config
from dstrain.dispatch.choose import wire_of
from dstrain.mesh.groups import Groups
from dstrain.mesh.topology import Link
from dstrain.plan.device import Device
from dstrain.plan.job import Job, job_of
from dstrain.plan.network import Group, Network
from dstrain.plan.network import exchanges as planned_exchanges
from dstrain.plan.stages import step_times

Predict = Callable[[HardwareConfig], float]
# Where a constant is looked for: shares of speeds, microseconds.
LEAST, MOST_SHARE, MOST_US = 1e-3, 10.0, 1e6
# Of the interval in which a constant is looked for: to a part in ten thousand.
HALVINGS = 18
# Something of a transfer is on the link.
MOST_HOST_SHARE = 0.95
PATIENCE = 4
# Each constant is part of the formulas of some others: they are found in turns, until none moves by more than this.
TURNS, STILL = 20, 1e-3
# The host of a CPU launches its kernels itself, and nothing slows them down that was not there when they were timed.
ALONE = {"sustained": 1.0, "device_spread": 0.0, "kernel_us": 0.0}
# By a speed, the shares of it.
SHARES = {
    "peak_bf16_tflops": ("gemm_bf16_efficiency", "attention_efficiency", "attention_backward_efficiency"),
    "peak_fp8_tflops": ("gemm_fp8_efficiency",),
    "memory_gbytes_per_s": ("memory_efficiency",),
    "intra_node_gbytes_per_s": ("intra_node_efficiency", "intra_node_alltoall_efficiency"),
    "inter_node_gbytes_per_s": ("inter_node_efficiency", "inter_node_alltoall_efficiency"),
}


@dataclass(frozen=True)
class Sample:
    """Something timed, and what the planner says it takes."""

    what: str
    seconds: float
    predicted_s: Predict


@dataclass(frozen=True)
class Measured:
    """`facts`: what the machine says about itself. `speeds`: as they were measured. `samples`: by the constant that
    they decide, in the order in which constants are found."""

    facts: dict[str, float]
    speeds: dict[str, float]
    samples: dict[str, list[Sample]]

    def constants(self, given: HardwareConfig, source: str) -> HardwareConfig:
        """`given` with everything that was measured."""
        found = replace(given, **self.facts, **self.speeds)  # type: ignore[arg-type]
        for _ in range(TURNS):
            before = found
            for key, samples in self.samples.items():
                found = solved(found, key, samples)
            if all(isclose(getattr(before, key), getattr(found, key), rel_tol=STILL) for key in self.samples):
                break
        found = bounded(found)
        changed = [speed for speed in SHARES if getattr(found, speed) != getattr(given, speed)]
        keys = [key for key in asdict(found) if key in {*changed, *self.facts, *self.speeds, *self.samples}]
        return calibrated(given, source, **{key: rounded(getattr(found, key)) for key in keys})


def rounded(value: float) -> float:
    """As far as a measurement can be trusted; counts are exact."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def solved(hardware: HardwareConfig, key: str, samples: Sequence[Sample]) -> HardwareConfig:
    """`hardware` with the constant that makes the planner's times of the samples add up to those taken; the nearest
    there is. Times fall with a share of a speed and rise with microseconds."""
    taken_s = sum(sample.seconds for sample in samples)
    rises = key.endswith("_us")
    low, high = LEAST, MOST_US if rises else MOST_SHARE

    def put(value: float) -> HardwareConfig:
        return replace(hardware, **{key: value})  # type: ignore[arg-type]

    for _ in range(HALVINGS):
        middle = sqrt(low * high)
        is_more = sum(sample.predicted_s(put(middle)) for sample in samples) > taken_s
        if is_more == rises:
            high = middle
        else:
            low = middle
    return put(high)


def bounded(hardware: HardwareConfig) -> HardwareConfig:
    """The same speeds, and no share of one above 1: what is faster than the speed was measured to be says that it is
    higher."""
    for speed, shares in SHARES.items():
        most = max(getattr(hardware, share) for share in shares)
        if most > 1:
            fewer = {share: getattr(hardware, share) / most for share in shares}
            hardware = replace(hardware, **fewer, **{speed: getattr(hardware, speed) * most})
    return hardware


def measure(config: Config, groups: Groups, rounds: int) -> Measured:
    """All ranks call this, and all get the same. The vocabulary of the config is known."""
    device, given = groups.place.device, config.hardware
    clock = Clock(device, groups.world, rounds)
    config = replace(config, hardware=replace(given, nodes=0))
    small, narrow = kernels.two_layers(config), kernels.narrow(config)
    act, num_bytes = kernels.copy(config, device)
    # A first idea of the machine: its products decide how high the peak is, where nobody has said it.
    found: dict[str, float] = {}
    if not given.memory_gbytes_per_s or device.type == "cpu":
        found["memory_gbytes_per_s"] = num_bytes / clock.seconds(act) / 1e9
    products = list(_products(job_of(replace(small, precision=config.precision)), config, clock))
    if not given.peak_bf16_tflops or device.type == "cpu":
        found["peak_bf16_tflops"] = max(_tflops(shape, seconds) for shape, seconds in products if not _is_fp8(shape))
    samples = dict(_compute(config, small, narrow, products, clock))
    facts = _facts(device, groups)
    if groups.world is not None:
        found |= _links(speeds(groups.world))
        taken = list(exchanges(config, groups, groups.world, rounds))
        machine = replace(config.hardware, **facts)  # type: ignore[arg-type]
        samples |= _transfers(config, groups, taken, machine)
        few = replace(config, train=replace(config.train, seq_len=kernels.TINY_TOKENS, micro_batch=1))
        samples |= _latency(few, list(exchanges(few, groups, groups.world, rounds)), machine)
        if device.type == "cpu":
            found["transfer_host_share"] = _host_share(taken, clock.stretch(kernels.micro_batch(small, device)))
    return Measured(facts, found, samples)


def _facts(device: torch.device, groups: Groups) -> dict[str, float]:
    """What needs no clock."""
    per_node = max(map(len, groups.topology.nodes(range(groups.place.world))))
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        memory_gib, processors = round(about.total_memory / 2**30, 2), about.multi_processor_count
        return {"memory_gib": memory_gib, "multiprocessors": processors, "devices_per_node": per_node}
    memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node / 2**30, 2)
    return {"memory_gib": memory_gib, "devices_per_node": per_node, **ALONE}


def _products(job: Job, config: Config, clock: Clock) -> Iterator[tuple[Product, float]]:
    """Those of a job that this device computes as such, timed."""
    for shape in kernels.products_of(job):
        if _is_fp8(shape) and clock.device.type == "cpu":
            # Rounded as in FP8, but not computed in it.
            shape = replace(shape, products="bf16" if config.precision.compute_dtype == "bfloat16" else "float32")
        yield shape, clock.seconds(kernels.product(shape, config, clock.device))


def _is_fp8(shape: Product) -> bool:
    return shape.products not in ("float32", "bf16")


def _tflops(shape: Product, seconds: float) -> float:
    return 2 * shape.m * shape.n * shape.k * shape.groups / seconds / 1e12


def _compute(
    config: Config, small: Config, narrow: Config, products: Sequence[tuple[Product, float]], clock: Clock
) -> Iterator[tuple[str, list[Sample]]]:
    for key, is_fp8 in (("gemm_bf16_efficiency", False), ("gemm_fp8_efficiency", True)):
        samples = [
            Sample(f"{shape.groups} x [{shape.m}, {shape.k}] x [{shape.k}, {shape.n}]", seconds, shape.predicted_s)
            for shape, seconds in products
            if _is_fp8(shape) is is_fp8
        ]
        if samples:
            yield key, samples
    yield from _attention(config, clock)
    device = clock.device
    # What stands for most of a step is worth more time than a kernel.
    clock = replace(clock, rounds=PATIENCE * clock.rounds)
    launched_s = clock.seconds(kernels.micro_batch(narrow, device))
    yield "host_us", [Sample("a narrow model", launched_s, partial(compute_s, job_of(narrow)))]
    layers_s = clock.seconds(kernels.micro_batch(small, device))
    yield "memory_efficiency", [Sample("two layers", layers_s, partial(compute_s, job_of(small)))]
    whole = replace(narrow, mesh=replace(narrow.mesh, ep=1))
    step_s = clock.seconds(kernels.step(whole, device)) - clock.seconds(kernels.micro_batch(whole, device))
    yield "step_us", [Sample("a step", max(0.0, step_s), lambda hardware: hardware.step_us * 1e-6)]


def _attention(config: Config, clock: Clock) -> Iterator[tuple[str, list[Sample]]]:
    model, train = config.model, config.train
    forward, both = kernels.attention(config, clock.device)
    forward_s = clock.seconds(forward)
    backward_s = clock.seconds(both) - forward_s
    shape = train.micro_batch, train.seq_len, model.num_heads
    dims = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    for key, seconds, backward in (
        ("attention_efficiency", forward_s, False),
        ("attention_backward_efficiency", backward_s, True),
    ):

        def predicted_s(hardware: HardwareConfig, backward: bool = backward) -> float:
            return Device(hardware).attention_s(*shape, dims, backward=backward)

        yield key, [Sample("attention", seconds, predicted_s)]


def compute_s(job: Job, hardware: HardwareConfig) -> float:
    """All phases of a micro-batch of a job in one stage; nothing travels."""
    without = replace(hardware, transfer_host_share=0.0)
    return sum(step_times(job, without).stages[0].compute_ms.values()) / 1e3


# -- Links ------------------------------------------------------------------------------------------------------------


def _links(found: Mapping[Link, Speed]) -> dict[str, float]:
    names = {Link.NODE: "intra_node", Link.NETWORK: "inter_node"}
    rates = {f"{names[link]}_gbytes_per_s": speed.gbytes_per_s for link, speed in found.items()}
    return rates | {f"{names[link]}_latency_us": speed.latency_s * 1e6 for link, speed in found.items()}


def _host_share(taken: Sequence[Exchange], stretch: float) -> float:
    """What of transfers of tokens is work of cores, which compute then has to do without; as much longer as all work
    that shares cores."""
    sent = [each for each in taken if _is_of_tokens(each)]
    whole_ms = sum(each.ms for each in sent)
    return min(MOST_HOST_SHARE, stretch * sum(each.cpu_ms for each in sent) / whole_ms) if sent else 0.0


def _is_of_tokens(each: Exchange) -> bool:
    return each.group == "ep" and ": " in each.what


def _transfers(
    config: Config, groups: Groups, taken: Sequence[Exchange], machine: HardwareConfig
) -> dict[str, list[Sample]]:
    """Rows through every transport that can carry them, and a bucket of each kind."""
    samples: dict[str, list[Sample]] = {}
    for key, sample in [*_rows(config, taken, machine), *_reductions(config, groups, taken, machine)]:
        samples.setdefault(key, []).append(sample)
    return samples


def _latency(config: Config, taken: Sequence[Exchange], machine: HardwareConfig) -> dict[str, list[Sample]]:
    """Of an exchange of a few tokens: packing and unpacking take their time, however little there is."""
    samples = list(_rows(config, taken, machine))
    key = samples[0][0].replace("alltoall_efficiency", "latency_us") if samples else ""
    return {key: [sample for _, sample in samples]} if key else {}


def _rows(config: Config, taken: Sequence[Exchange], machine: HardwareConfig) -> Iterator[tuple[str, Sample]]:
    job = job_of(kernels.two_layers(config))
    across = Group.of(job.ep, job.etp, machine.devices_per_node).nodes > 1
    for each in taken:
        if _is_of_tokens(each):
            kind, _, way = each.what.partition(": ")
            sent = replace(job, dispatcher=kind, wire=wire_of(config))
            yield _key("alltoall_efficiency", across), Sample(each.what, each.ms / 1e3, partial(_way_s, sent, way))


def _way_s(job: Job, way: str, hardware: HardwareConfig) -> float:
    both = planned_exchanges(job, hardware, job.tokens)
    return {"dispatch": both.out_s, "combine": both.home_s}.get(way, both.out_s + both.home_s)


def _reductions(
    config: Config, groups: Groups, taken: Sequence[Exchange], machine: HardwareConfig
) -> Iterator[tuple[str, Sample]]:
    job, times = job_of(kernels.two_layers(config)), {each.what: each.ms / 1e3 for each in taken}
    widths = {"gradients": job.grad_wire_bytes, "parameters": job.gather_bytes}
    for what, peers, elements in buckets(config, groups):
        stride = config.mesh.ep if peers is groups.expert_data else 1
        group = Group.of(peers.size, stride, machine.devices_per_node)
        for name, width in widths.items():
            sample = Sample(
                f"{what}: {name}", times[f"{what}: {name}"], partial(_collective_s, elements * width, group)
            )
            yield _key("efficiency", group.nodes > 1), sample


def _collective_s(num_bytes: float, group: Group, hardware: HardwareConfig) -> float:
    return Network(hardware).collective_s(num_bytes, group)


def _key(name: str, across: bool) -> str:
    return f"{'inter' if across else 'intra'}_node_{name}"
