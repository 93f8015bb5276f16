"""The keys of `dstrain bench`, and the rules that span them."""

from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path

from dstrain.config.rules import above_zero, at_least, listed, need, one_of
from dstrain.config.schema import Config

MAX_NODES = 64


@dataclass(frozen=True)
class CommConfig:
    """`dstrain bench comm`: what is written, and how often each exchange is timed."""

    # The new hardware file. As hardware/<name>.yaml it is a choice: dstrain train --config-dir . hardware=<name>.
    out: str = "hardware/measured.yaml"
    # Rounds of which the median counts, after one that warms up.
    rounds: int = 9


@dataclass(frozen=True)
class CommRoot(Config):
    comm: CommConfig = field(default_factory=CommConfig)


@dataclass(frozen=True)
class CalibrateConfig:
    """`dstrain calibrate`: what is written, and how often each thing is timed."""

    # The new hardware file. As hardware/<name>.yaml it is a choice: dstrain plan --config-dir . hardware=<name>.
    out: str = "hardware/measured.yaml"
    # Rounds of which the median counts, after one that warms up.
    rounds: int = 9


@dataclass(frozen=True)
class CalibrateRoot(Config):
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)


@dataclass(frozen=True)
class FabricPoint:
    """A measurement that changes some keys of `dstrain bench fabric`; null: as they are there."""

    nodes: int | None = None
    ranks_per_node: int | None = None
    rate_mbit: float | None = None
    loopback_mbit: float | None = None
    flat_ratio: float | None = None
    num_experts: int | None = None
    experts_per_token: int | None = None
    tokens: int | None = None
    micro_batches: int | None = None
    route_nodes: int | None = None
    route_skew: float | None = None


@dataclass(frozen=True)
class FabricRoot:
    """`dstrain bench fabric`: dispatchers on a network of namespaces with limited links. Needs root."""

    # What to compare: <dispatcher>/<wire>/<order> (alltoall | rank | hierarchical; bfloat16 | fp8 | mxfp8 | fp4 |
    # logfmt8 | logfmt10; block, or how many micro-batches are in flight), or a peer that is installed: megatron |
    # torchtitan | deepspeed | deepspeed_drops. With pp above 1 the order is a pipeline's: 1f1b | interleaved | zb_1p |
    # zb_v | dualpipe | dualpipev, with +block behind it where compute stands still during every transfer, with +overlap
    # as schedule.overlap=true.
    cases: tuple[str, ...] = (
        "alltoall/bfloat16/block",
        "alltoall/bfloat16/2",
        "rank/bfloat16/2",
        "hierarchical/bfloat16/2",
        "hierarchical/fp8/2",
    )
    nodes: int = 2
    ranks_per_node: int = 2
    # Ranks of a pipeline. All of one are on the same node, so that experts are spread over all nodes and their tokens
    # cross the network.
    pp: int = 1
    # Line rate of every network card, each way.
    rate_mbit: float = 200.0
    # What a card may send at once after a pause. Small (32) for times; at least 80 for bytes that are right to 1%.
    burst_kib: int = 32
    # Bytes of a packet. Jumbo frames (9000) take a sixth of the processor time: the more ranks, the more that matters.
    mtu: int = 1500
    # Rate of the link inside a node; null: as fast as the machine copies.
    loopback_mbit: float | None = None
    # emulated (sleeps that stand for an accelerator) | none (transfers alone) | real (a small model in BF16 on this
    # machine's cores)
    compute: str = "emulated"
    # Emulated compute is chosen so that the time of a row per (token, expert) on the line is this multiple of it.
    flat_ratio: float = 2.0
    hidden_size: int = 512
    num_experts: int = 16
    experts_per_token: int = 6
    # Of a rank and micro-batch.
    tokens: int = 256
    # MoE layers.
    num_blocks: int = 2
    micro_batches: int = 4
    # Nodes that a token may visit; null: all.
    route_nodes: int | None = None
    # The n-th most popular expert is chosen about n^-skew times as often as the first; 0: all alike.
    route_skew: float = 0.0
    # planned (for the nominal times of each case) | measured (for the times of one step, once) | fixed (as training
    # orders by default, for transfers as long as the compute)
    order: str = "planned"
    # Every case takes its turn this often, with this many measured steps after one that warms up.
    rounds: int = 3
    steps: int = 2
    seed: int = 0
    # Measured one after the other; empty: once, as the keys above say.
    points: tuple[FabricPoint, ...] = ()
    # Directory for result.json and picture.svg; "": bench/<date-time>.
    out: str = ""
    # Seconds after which a rank that does not answer ends the bench.
    timeout_s: float = 120.0


def points(config: FabricRoot) -> list[FabricRoot]:
    """The measurements of a bench, each as a config of its own."""
    return [_changed(config, point) for point in config.points] or [config]


def check_comm(config: CommRoot, world_size: int) -> None:
    """What a hardware file needs, besides the rules of a training run."""
    cure = "Start several: torchrun --nproc-per-node 2 -m dstrain bench comm ..."
    need(world_size > 1, ("WORLD_SIZE", world_size), "one process has no links to measure", cure)
    check_measuring(config, "comm.out", "comm.rounds")


def check_measuring(config: Config, out_key: str, rounds_key: str) -> None:
    """Of what is timed at the sizes of a config, and leaves a hardware file."""
    rule = "it times the exchanges of one pipeline stage"
    need(config.mesh.pp == 1, ("mesh.pp", config.mesh.pp), rule, "Set mesh.pp=1.")
    at_least(config, 1, rounds_key)
    out = Path(attrgetter(out_key)(config))
    need(out.suffix == ".yaml", (out_key, out), "a hardware file is YAML", f"Give {out_key}=hardware/<name>.yaml.")
    need(not out.exists(), (out_key, out), "there is such a file", "Remove it, or choose another one.")


def check_fabric(config: FabricRoot) -> None:
    need(bool(config.cases), ("cases", "[]"), "there is nothing to measure", "Name at least one case.")
    out = Path(config.out)
    fresh = not config.out or not out.exists() or (out.is_dir() and not any(out.iterdir()))
    need(fresh, ("out", config.out), "it is there already, with figures in it perhaps", "Choose another directory.")
    for point in points(config):
        _check_point(point)


def _changed(config: FabricRoot, point: FabricPoint) -> FabricRoot:
    changes = {entry.name: getattr(point, entry.name) for entry in fields(FabricPoint)}
    return replace(config, points=(), **{name: value for name, value in changes.items() if value is not None})


def _check_point(config: FabricRoot) -> None:
    need(config.nodes >= 2, ("nodes", config.nodes), "a network needs two nodes", "Set nodes=2 or more.")
    rule = f"a testbed has at most {MAX_NODES} nodes"
    need(config.nodes <= MAX_NODES, ("nodes", config.nodes), rule, "Lower it.")
    at_least(config, 1, "ranks_per_node", "hidden_size", "num_experts", "experts_per_token", "tokens")
    at_least(config, 1, "num_blocks", "micro_batches", "rounds", "steps")
    at_least(config, 1280, "mtu")
    # A bucket smaller than a frame lets nothing pass.
    least = config.mtu // 1024 + 1
    rule = f"a packet of mtu={config.mtu} bytes must fit"
    need(config.burst_kib >= least, ("burst_kib", config.burst_kib), rule, f"Set it to {least} or more.")
    need(config.mtu <= 65521, ("mtu", config.mtu), "no packet is larger than 65521", "9000 is usual for jumbo frames.")
    at_least(config, 0, "route_skew", "seed")
    above_zero(config, "rate_mbit", "flat_ratio", "timeout_s")
    if config.loopback_mbit is not None:
        above_zero(config, "loopback_mbit")
    one_of(config, "compute", "emulated", "none", "real")
    one_of(config, "order", "planned", "measured", "fixed")
    _check_pipeline(config)
    _check_experts(config)


def _check_pipeline(config: FabricRoot) -> None:
    at_least(config, 1, "pp")
    rule, cure = (
        f"nodes of {config.ranks_per_node} ranks hold whole pipelines",
        "Set ranks_per_node to a multiple of it.",
    )
    need(config.ranks_per_node % config.pp == 0, ("pp", config.pp), rule, cure)
    if config.pp > 1:
        rule, cure = f"pp={config.pp} ranks hold up to two stages each, all alike", f"Set it to {2 * config.pp}."
        need(config.num_blocks % (2 * config.pp) == 0, ("num_blocks", config.num_blocks), rule, cure)
        need(config.compute != "real", ("compute", "real"), "a pipeline's is emulated", "Set compute=emulated.")


def _check_experts(config: FabricRoot) -> None:
    ranks, experts = config.nodes * config.ranks_per_node // config.pp, config.num_experts
    sizes = listed([ranks * factor for factor in (1, 2, 4)])
    rule = f"{config.nodes} nodes of {config.ranks_per_node} ranks hold equally many experts each"
    rule += f" in a stage of pp={config.pp}" if config.pp > 1 else ""
    need(experts % ranks == 0, ("num_experts", experts), rule, f"Set it to {sizes} or another multiple of {ranks}.")
    if config.route_nodes is not None:
        value = ("route_nodes", config.route_nodes)
        need(
            1 <= config.route_nodes <= config.nodes,
            value,
            f"there are {config.nodes} nodes",
            "Choose 1 or up to so many.",
        )
    allowed = experts // config.nodes * (config.route_nodes or config.nodes)
    value = ("experts_per_token", config.experts_per_token)
    need(config.experts_per_token <= allowed, value, f"a token may choose among {allowed} experts", "Lower it.")
    # Rows are gathered in units of 8 bytes.
    value = ("hidden_size", config.hidden_size)
    need(config.hidden_size % 8 == 0, value, "it must be a multiple of 8", "512 is usual.")
