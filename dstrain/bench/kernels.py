"""Kernels timed alone, at the shapes that the planner asks about, and what surrounds them: a small model, a step.

All ranks time the same thing at once and the slowest counts: what ranks of a machine share (cores, memory), they share
in training, too.

Shapes: B sequences, H heads, T tokens, D hidden; products are [m, k] x [k, n].
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.bench import parts
from dstrain.comm.collectives import Peers, all_reduce_max
from dstrain.comm.trace import Trace
from dstrain.config.hardware import HardwareConfig
from dstrain.config.schema import (
    Config,
    DispatchConfig,
    EngineConfig,
    MeshConfig,
    ModelConfig,
    MtpConfig,
    RouterConfig,
)
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import Trainer
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place
from dstrain.mesh.topology import Topology
from dstrain.model.attention import causal_attention
from dstrain.parallel.apply import build_model
from dstrain.plan.device import Device
from dstrain.plan.job import Job
from dstrain.plan.layer import Kernels
from dstrain.plan.split import whole
from dstrain.precision.backends.choose import choose, make_backend
from dstrain.schedule.run import run
from dstrain.schedule.table import sequential

Act = Callable[[], object]
# A measurement takes as many calls as last this long.
LONG_ENOUGH_S = 0.05
# Bytes that a copy moves where the device is no CPU: far more than its caches hold.
COPY_BYTES = 1 << 30
# Of a model so narrow that only Python and launches count.
TINY_TOKENS = 8


@dataclass(frozen=True)
class Clock:
    """`everyone` None: a single process."""

    device: torch.device
    everyone: Peers | None
    rounds: int

    def seconds(self, act: Act) -> float:
        """Of one call on the slowest rank: the median of `rounds` measurements after a first that is left out."""
        self._once(act, 1)
        calls = max(1, round(LONG_ENOUGH_S / self._once(act, 1)))
        return median(self._once(act, calls) for _ in range(self.rounds)) / calls

    def stretch(self, act: Act) -> float:
        """How much longer a call takes than the processor works on it: ranks that share cores wait for each other."""
        began, seconds = time.process_time(), 0.0
        for _ in range(self.rounds):
            seconds += self._once(act, 1)
        return seconds / self._most(time.process_time() - began)

    def _once(self, act: Act, calls: int) -> float:
        self._most(0.0)
        began = time.perf_counter()
        for _ in range(calls):
            act()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._most(time.perf_counter() - began)

    def _most(self, value: float) -> float:
        """The largest of all ranks' values; nobody returns before all have come."""
        return float(all_reduce_max(torch.tensor(value, dtype=torch.float64, device=self.device), self.everyone))


@dataclass(frozen=True)
class Product:
    """`groups` products of one shape in one kernel, as plan.device.Device is asked about them."""

    m: int
    n: int
    k: int
    products: str
    groups: int
    out_bytes: int

    def predicted_s(self, hardware: HardwareConfig) -> float:
        return Device(hardware).product_s(
            self.m, self.n, self.k, self.products, groups=self.groups, out_bytes=self.out_bytes
        )


@dataclass(frozen=True)
class _Listing(Device):
    """A device that notes what it is asked about."""

    asked: list[Product] = field(default_factory=list, compare=False)

    def product_s(self, m: int, n: int, k: int, products: str, *, groups: int = 1, out_bytes: int = 2) -> float:
        self.asked.append(Product(m, n, k, products, groups, out_bytes))
        return super().product_s(m, n, k, products, groups=groups, out_bytes=out_bytes)


def products_of(job: Job) -> list[Product]:
    """Those of the layers and the head of a job, each shape once."""
    # Which they are does not depend on the machine.
    machine = HardwareConfig(peak_bf16_tflops=1.0, memory_gbytes_per_s=1.0)
    kernels, model = Kernels(job, machine), job.model
    kernels.device = listing = _Listing(machine)
    _ = kernels.attention, kernels.head
    if model.dense_layers:
        _ = kernels.dense
    if model.moe_layers:
        _ = kernels.routing, kernels.shared, kernels.experts
    return list(dict.fromkeys(listing.asked))


def product(shape: Product, config: Config, device: torch.device) -> Act:
    """A product in the numbers in which a model computes it."""
    rows = shape.m * shape.groups
    dtype = torch.float32 if shape.products == "float32" else torch.bfloat16
    x_RK = torch.randn(rows, shape.k, device=device, dtype=dtype)
    weight_GNK = torch.randn(shape.groups, shape.n, shape.k, device=device, dtype=dtype)
    ends_G = torch.arange(1, shape.groups + 1, dtype=torch.int32, device=device) * shape.m
    weight, ends = (weight_GNK, ends_G) if shape.groups > 1 else (weight_GNK[0], None)
    if shape.products in ("float32", "bf16"):
        return partial(_multiply, x_RK, weight, ends)
    backend = make_backend(choose(config, device).backend, config.precision)
    operand, _ = backend.activation(x_RK)
    return partial(backend.forward, operand, backend.weight(weight), ends)


def _multiply(x_RK: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
    return F.linear(x_RK, weight) if ends is None else F.grouped_mm(x_RK, weight.transpose(1, 2), offs=ends)


def copy(config: Config, device: torch.device) -> tuple[Act, int]:
    """Activations of a micro-batch copied, with the bytes that are read and written."""
    train, dtype = config.train, getattr(torch, config.precision.compute_dtype)
    values = train.micro_batch * train.seq_len * config.model.hidden_size
    if device.type != "cpu":
        values = max(values, COPY_BYTES // dtype.itemsize)
    x = torch.randn(values, device=device).to(dtype)
    out = torch.empty_like(x)
    return partial(out.copy_, x), 2 * x.nbytes


def attention(config: Config, device: torch.device) -> tuple[Act, Act]:
    """The causal core of a layer: forward, and forward with backward."""
    train, model, dtype = config.train, config.model, getattr(torch, config.precision.compute_dtype)
    keys = model.qk_nope_head_dim + model.qk_rope_head_dim
    shape_BHT = train.micro_batch, model.num_heads, train.seq_len
    q, k, v = (
        torch.randn(*shape_BHT, width, device=device).to(dtype).requires_grad_()
        for width in (keys, keys, model.v_head_dim)
    )
    grad = torch.randn(*shape_BHT, model.v_head_dim, device=device).to(dtype)
    core = partial(causal_attention, q, k, v, keys**-0.5)
    return core, lambda: torch.autograd.grad(core(), (q, k, v), grad)


def two_layers(config: Config) -> Config:
    """A model of a dense layer and an MoE layer, as far as the config has both, with embedding and head, in the compute
    dtype; one micro-batch a rank, nothing beside expert parallelism."""
    model, mesh, train = config.model, config.mesh, config.train
    dense, moe = min(1, model.num_dense_layers), min(1, model.num_layers - model.num_dense_layers)
    return replace(
        config,
        mesh=MeshConfig(ep=mesh.ep, dp=1),
        model=replace(model, num_layers=dense + moe, num_dense_layers=dense, mtp=MtpConfig(depth=0)),
        train=replace(train, sequences=mesh.ep * train.micro_batch, batch_tokens=None),
        schedule=replace(config.schedule, split=()),
        precision=replace(config.precision, products="compute", gather="compute"),
    )


def narrow(config: Config) -> Config:
    """`two_layers` with as many kernels and hardly anything in them."""
    small = two_layers(config)
    model: ModelConfig = replace(
        small.model,
        vocab_size=64,
        hidden_size=32,
        num_heads=2,
        q_lora_rank=16 if small.model.q_lora_rank else None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=16,
    )
    train = replace(small.train, seq_len=TINY_TOKENS, micro_batch=1, sequences=small.mesh.ep, recompute=())
    return replace(small, model=model, train=train)


def micro_batch(config: Config, device: torch.device) -> Act:
    """Forward and backward of `two_layers` or `narrow`, on the piece of graph that the trainer makes: cut into phases
    where tokens travel, whole where they don't. Nothing travels here, the experts of a rank are all there are."""
    stage = whole(config.model)
    part = parts.build(config, stage, 0, device)
    if config.mesh.ep == 1 or not part.num_blocks:
        return partial(parts.run, part, config)
    train, table, trace = config.train, sequential(part.num_blocks, 1), Trace(device)
    shape_BS = train.micro_batch, train.seq_len + 1

    def act() -> None:
        tokens_BS = torch.randint(config.model.vocab_size or 1, shape_BS, device=device)
        run(table, [lambda: part.walk(tokens_BS, train.micro_batch)], trace)
        part.zero_grad()
        trace.take()

    return act


def step(config: Config, device: torch.device) -> Act:
    """A training step of `narrow` in a process of its own: what it takes beyond its micro-batch is Python's."""
    model = replace(config.model, router=RouterConfig())
    alone = replace(
        config,
        mesh=MeshConfig(dp=1),
        model=model,
        train=replace(config.train, sequences=1),
        engine=EngineConfig(),
        dispatch=DispatchConfig(),
    )
    mesh = Mesh()
    groups = Groups(mesh, Place(0, 1, device), mesh.coordinate(0), Trace(device), Topology((0,)))
    built = build_model(alone, groups)
    tokens_BS = torch.randint(model.vocab_size or 1, (1, TINY_TOKENS + 1))
    return Trainer(
        alone, groups, built, make_engine(built, alone, groups), lambda first, count: tokens_BS, Progress()
    ).step
