"""What is predicted: a model, how it is spread over devices, in what numbers, and what a step of it hides or repeats.

`job_of` reads the config that `dstrain train` runs; published.py reads runs of others. Beside what dstrain trains with,
a job can have tensor (tp) and context (cp) parallelism, experts cut by tensors (etp), and sharded weights (zero=3).
"""

from dataclasses import dataclass
from functools import cached_property

from dstrain.config.precision import gathers_fp8
from dstrain.config.schema import Config
from dstrain.errors import ConfigError
from dstrain.plan.architecture import Architecture
from dstrain.plan.split import split
from dstrain.schedule.pipelines.choose import layout

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class Job:
    """A training step. Counts are of the whole job where nothing else is said."""

    model: Architecture
    gpus: int
    seq_len: int
    # Sequences of a step, and those that go through the model at once on a rank.
    sequences: int
    micro_batch: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    # schedule.pipelines.choose.NAMES
    pipeline: str = "1f1b"
    # Stages of each rank of pipeline=interleaved.
    chunks: int = 1
    # Layers of each stage; empty: planned by cost.
    split: tuple[int, ...] = ()
    # A stage may hold no layer, and MTP modules need not be with the head (Megatron's pipeline layouts).
    free_split: bool = False
    # Transfers of tokens run under the compute of another micro-batch.
    overlap: bool = False
    # Weight gradients are put off until a transfer is under way, or the pipeline has a gap.
    splits_weights: bool = True
    # Micro-batches between their forward and their backward pass where there is no pipeline.
    in_flight: int = 1
    # bf16 | float32 | fp8_tensor (one scale a tensor) | fp8_block (tiles and blocks of 128) | mxfp8
    products: str = "bf16"
    # local | alltoall | rank | hierarchical | deepep (per node, then per rank, by kernels that need no host)
    dispatcher: str = "alltoall"
    # Rows out, in a format of plan.traffic.row_bytes; home they are BF16 (or float32, as compute).
    wire: str = "bfloat16"
    # Most loaded rank of an expert-parallel group over the mean.
    skew: float = 1.0
    # 0: everything everywhere; 1: optimiser states shared; 3: weights and gradients, too.
    zero: int = 1
    # Bytes of a value: accumulated gradients, gradients on the wire, gathered weights, master weights (0: none), each
    # of two moments.
    grad_bytes: int = 4
    grad_wire_bytes: int = 4
    gather_bytes: int = 2
    master_bytes: int = 4
    moment_bytes: int = 4
    # What the update reads and writes for a parameter beside those: the FP32 gradient, for its norm and for the
    # update, and the new weight.
    update_bytes: int = 10
    # Any of norm, mla_up, swiglu, attend, core (that of attention), experts, layer, sac (half of the products, as
    # torchtitan chooses).
    recompute: frozenset[str] = frozenset()
    # What mla_up computes again reaches to the output of attention, as in parallel/recompute.py.
    repeats_core: bool = False
    # Gradients are summed, and weights gathered, under compute.
    overlap_dp: bool = True
    # Share of tensor-parallel transfers under compute.
    tp_overlap: float = 0.0
    sequence_parallel: bool = True
    # A stage waits until its neighbour has what it sends.
    blocking_sends: bool = False
    flash: bool = True
    cuda_graph: bool = False
    # Products and casts of each expert of a rank are kernels of their own.
    launch_per_expert: bool = False
    # Kernels bound by memory, over what fused ones take.
    unfused: float = 1.0
    # Core of attention, over what the fastest kernels take.
    slow_attention: float = 1.0

    @cached_property
    def dp(self) -> int:
        """Ranks that read different sequences."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @cached_property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.gpus // (self.pp * self.ep * self.etp))

    @cached_property
    def micro_batches(self) -> int:
        """Of a rank in a step."""
        return self.sequences // (self.dp * self.micro_batch)

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch on a rank, before tensor parallelism cuts widths."""
        return self.micro_batch * self.seq_len // self.cp

    @property
    def num_stages(self) -> int:
        return layout(self.pipeline, self.pp, self.chunks).num_stages if self.pp > 1 else 1


# What a config calls products, in the words of a job.
PRODUCTS = {"fp8": "fp8_block", "mxfp8": "mxfp8"}


def job_of(config: Config) -> Job:
    """The job of a checked config whose vocabulary is known. Raises ConfigError if the layout does not fit the
    machine, or the batch not the layout."""
    mesh, train, precision = config.mesh, config.train, config.precision
    dp = mesh.dp or _replicas(config)
    gpus = mesh.pp * mesh.ep * dp
    _check_nodes(config, gpus)
    compute = precision.compute_dtype
    products = PRODUCTS.get(precision.products, "float32" if compute == "float32" else "bf16")
    in_flight = _in_flight(config)
    overlap = config.schedule.overlap
    return Job(
        model=Architecture.of(config.model),
        gpus=gpus,
        seq_len=train.seq_len,
        sequences=train.sequences or (train.batch_tokens or 0) // train.seq_len,
        micro_batch=train.micro_batch,
        pp=mesh.pp,
        ep=mesh.ep,
        pipeline=config.schedule.pipeline if mesh.pp > 1 else "1f1b",
        chunks=config.schedule.chunks if config.schedule.pipeline == "interleaved" else 1,
        split=_split(config),
        overlap=_overlaps(config, in_flight) if overlap is None else overlap,
        in_flight=in_flight,
        products=products,
        dispatcher=_dispatcher(config),
        wire=_wire(config, products),
        grad_wire_bytes=BYTES[precision.grad_wire_dtype],
        gather_bytes=1 if gathers_fp8(config) else BYTES[compute],
        master_bytes=4 if compute != "float32" else 0,
        moment_bytes=BYTES[precision.moments_dtype],
        recompute=frozenset(train.recompute),
        repeats_core=True,
    )


def _replicas(config: Config) -> int:
    """Of an expert-parallel group, where the machine decides."""
    hardware, mesh = config.hardware, config.mesh
    gpus = (hardware.nodes or 1) * hardware.devices_per_node
    return max(1, gpus // (mesh.pp * mesh.ep))


def _check_nodes(config: Config, gpus: int) -> None:
    hardware, mesh = config.hardware, config.mesh
    if hardware.nodes and gpus != hardware.nodes * hardware.devices_per_node:
        raise ConfigError(
            "hardware.nodes",
            hardware.nodes,
            f"{hardware.nodes * hardware.devices_per_node} devices are not the {gpus} ranks of mesh.pp={mesh.pp} * "
            f"mesh.ep={mesh.ep} * mesh.dp={gpus // (mesh.pp * mesh.ep)}",
            "Change the mesh (mesh.dp=null takes what is left), or let `dstrain plan search` find one",
        )


def _split(config: Config) -> tuple[int, ...]:
    if config.mesh.pp == 1:
        return ()
    stages = layout(config.schedule.pipeline, config.mesh.pp, config.schedule.chunks).num_stages
    return tuple(len(stage.layers) for stage in split(config, stages))


def _in_flight(config: Config) -> int:
    """Two where transfers can run under another micro-batch, but for stage 2, which takes one after the other
    (schedule/choose.py)."""
    waits = config.mesh.ep == 1 or config.mesh.pp > 1 or config.engine.zero_stage == 2
    return config.schedule.in_flight or (1 if waits else 2)


def _overlaps(config: Config, in_flight: int) -> bool:
    """Where experts are spread, and micro-batches meet; 1F1B and interleaved have pairs only if they are asked for."""
    paired = config.schedule.pipeline not in ("1f1b", "interleaved") if config.mesh.pp > 1 else in_flight > 1
    return config.mesh.ep > 1 and paired


def _dispatcher(config: Config) -> str:
    """What auto comes to where links are alike within a node, and slower between nodes (dispatch/choose.py)."""
    if config.mesh.ep == 1:
        return "local"
    inside = config.mesh.ep <= config.hardware.devices_per_node
    return {"auto": "rank" if inside else "hierarchical"}.get(config.dispatch.kind, config.dispatch.kind)


def _wire(config: Config, products: str) -> str:
    if config.dispatch.wire != "auto":
        return config.dispatch.wire
    return {"fp8_block": "fp8", "mxfp8": "mxfp8", "float32": "float32"}.get(products, "bfloat16")
