"""Which transport carries the tokens: the one that a config names, or the quickest by estimate, and why.

An estimate is what the links need for the four ways of one MoE block and micro-batch (plan/traffic.py): on each hop the
slower of the two kinds of link, hops and ways one after the other. Speeds come from the hardware file; what it doesn't
say is measured, in about a second. They matter only where rows can travel hierarchically; anywhere else the fewest
bytes are the quickest.

`auto` never takes `deepep`: its kernels have not been run by the authors of this file, and no estimate covers them.
"""

from dataclasses import dataclass, replace

import torch

from dstrain.comm.probe import Speed, measure
from dstrain.config.hardware import HardwareConfig
from dstrain.config.schema import Config
from dstrain.dispatch.alltoall import AllToAllDispatcher
from dstrain.dispatch.contract import Dispatcher
from dstrain.dispatch.hierarchical import HierarchicalDispatcher
from dstrain.dispatch.local import LocalDispatcher
from dstrain.dispatch.rank import RankDispatcher
from dstrain.dispatch.wire import Fp8, MxFp8, wire_format
from dstrain.errors import ConfigError
from dstrain.mesh.groups import Groups
from dstrain.mesh.topology import Link
from dstrain.plan import node_limit
from dstrain.plan.traffic import Router, Rows, Way, expected, link_bytes

# Where the bandwidth alone is given: a kernel launch and a few microseconds on the link (arXiv:2505.09343, table 5).
USUAL_LATENCY_US = 20.0


@dataclass(frozen=True)
class Choice:
    """What config.dispatch comes to on these ranks."""

    kind: str
    wire: str
    reason: str
    # What a limit of expert groups per token means on these nodes; "" where there is none.
    limit: str = ""

    def settle(self, config: Config) -> Config:
        """The config with the choice in it: nothing is measured again."""
        return replace(config, dispatch=replace(config.dispatch, kind=self.kind, wire=self.wire))


@dataclass(frozen=True)
class Task:
    """What is to be carried."""

    # Ranks of the expert-parallel group on each of its nodes.
    node_sizes: tuple[int, ...]
    # Whether every such group is a run of several equally large nodes of several ranks.
    is_grid: bool
    router: Router
    # Of a rank, in a micro-batch.
    tokens: int
    rows: Rows

    @staticmethod
    def of(config: Config, groups: Groups, wire: str) -> "Task":
        """Of the group that spans the most nodes, so that all ranks decide alike."""
        ep_groups, topology, model = groups.mesh.ep_groups(), groups.topology, config.model
        nodes = max((topology.nodes(ranks) for ranks in ep_groups), key=len)
        grids = [topology.grid(ranks) for ranks in ep_groups]
        router = model.router
        return Task(
            node_sizes=tuple(map(len, nodes)),
            is_grid=all(grid is not None and len(grid) > 1 and len(grid[0]) > 1 for grid in grids),
            router=Router(model.num_experts, model.experts_per_token, router.num_groups, router.groups_per_token),
            tokens=config.train.micro_batch * config.train.seq_len,
            rows=Rows.of(wire, config.precision.compute_dtype, model.hidden_size),
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that can carry it; of two equally quick ones the first is taken."""
        return ("rank", "alltoall", "hierarchical") if self.is_grid else ("rank", "alltoall")

    @property
    def layout(self) -> str:
        """For messages: the nodes of the group."""
        sizes, ranks = self.node_sizes, sum(self.node_sizes)
        if len(sizes) == 1:
            return f"{ranks} ranks on one node"
        if len(set(sizes)) == 1:
            return f"{len(sizes)} nodes of {sizes[0]} rank{'s' * (sizes[0] > 1)}"
        return f"nodes of {', '.join(map(str, sizes[:-1]))} and {sizes[-1]} ranks"


@dataclass(frozen=True)
class Links:
    """The speed of each kind of link, and where it was learnt."""

    speeds: dict[Link, Speed]
    source: str


def choose(config: Config, groups: Groups) -> Choice:
    """Called by all ranks, who come to the same choice. ConfigError where the transport that is named can't work.

    On the meta device, where nothing can be measured, bytes decide unless the hardware file says all speeds.
    """
    kind, wire = config.dispatch.kind, wire_of(config)
    if groups.ep is None:
        return Choice("local", wire, "local: all experts are on every rank")
    task = Task.of(config, groups, wire)
    if kind == "hierarchical" and not task.is_grid:
        rule = f"it needs several equally large nodes of several ranks in each mesh.ep group; here are {task.layout}"
        cure = "Set dispatch.kind=rank, or auto; or choose mesh.ep so that a group fills whole nodes."
        raise ConfigError("dispatch.kind", kind, rule, cure)
    limit = node_limit.describe(task.router, task.node_sizes)
    if kind != "auto":
        return Choice(kind, wire, f"{kind}: asked for; {task.layout}", limit)
    links = find_speeds(config.hardware, groups) if task.is_grid and _can_know(config.hardware, groups) else None
    kind, reason = decide(task, links)
    return Choice(kind, wire, reason, limit)


def wire_of(config: Config) -> str:
    """The wire format; auto is that of the products, so that nothing is quantised twice."""
    precision, wire = config.precision, config.dispatch.wire
    if wire != "auto":
        return wire
    return precision.compute_dtype if precision.products == "compute" else precision.products


def kept_tile(config: Config, wire: str) -> int | None:
    """Values to a scale of what the experts' products take as it arrives in format `wire`; None: it is decoded."""
    return {Fp8.name: Fp8.tile, MxFp8.name: MxFp8.tile}[wire] if wire == config.precision.products else None


def _can_know(hardware: HardwareConfig, groups: Groups) -> bool:
    """Whether the speeds of all links are given or can be measured."""
    given = hardware.intra_node_gbytes_per_s and hardware.inter_node_gbytes_per_s
    return bool(given) or groups.place.device.type != "meta"


def find_speeds(hardware: HardwareConfig, groups: Groups) -> Links:
    """Of the links between the ranks of an expert-parallel group; measured where the hardware file says 0."""
    if groups.ep is None or groups.world is None:
        return Links({}, "")
    given = {
        Link.NODE: (hardware.intra_node_gbytes_per_s, hardware.intra_node_latency_us),
        Link.NETWORK: (hardware.inter_node_gbytes_per_s, hardware.inter_node_latency_us),
    }
    speeds = {link: Speed(rate, (us or USUAL_LATENCY_US) * 1e-6) for link, (rate, us) in given.items() if rate}
    for link in given:
        if link not in speeds and (speed := measure(groups.ep, link, groups.world)) is not None:
            speeds[link] = speed
    source = "from the hardware file" if hardware.inter_node_gbytes_per_s else "measured"
    return Links(speeds, source)


def decide(task: Task, links: Links | None) -> tuple[str, str]:
    """The quickest transport, and a sentence why. Without speeds, that with the fewest bytes."""
    costs = {kind: estimate(kind, task, links) for kind in task.kinds}
    best, second, *_ = sorted(costs, key=lambda kind: costs[kind])
    unit, digits = ("ms", 1e3) if links else ("MB", 1e-6)
    # In all four ways of a block.
    figures = f"{costs[best] * digits:.3g} {unit} a layer and micro-batch against {costs[second] * digits:.3g}"
    reason = f"{best}: {task.layout}, {figures} {unit} for {second}"
    if links:
        speed = links.speeds[Link.NETWORK].gbytes_per_s
        reason += f" over {speed:.3g} GB/s between nodes ({links.source})"
    return best, reason


def estimate(kind: str, task: Task, links: Links | None) -> float:
    """Seconds that the links of a rank take for an MoE block and a micro-batch; without speeds, the bytes on them."""
    messages = expected(kind, task.node_sizes, task.router, task.tokens)
    node_of_rank = [node for node, size in enumerate(task.node_sizes) for _ in range(size)]
    total = 0.0
    for hop in range(2):
        on_links = link_bytes([message for message in messages if message.hop == hop], node_of_rank, task.rows)
        for way in Way:
            loads = {link: on_links[way, link] for link in (Link.NODE, Link.NETWORK) if on_links[way, link]}
            if links:
                total += max((links.speeds[link].seconds(load) for link, load in loads.items()), default=0.0)
            else:
                total += sum(loads.values())
    return total


def make_dispatcher(config: Config, groups: Groups) -> Dispatcher:
    """The dispatcher that `choose` comes to; all ranks call this."""
    choice = choose(config, groups)
    experts, ep = config.model.num_experts, groups.ep
    wire = wire_format(choice.wire, getattr(torch, config.precision.compute_dtype))
    keeps = kept_tile(config, choice.wire) is not None
    if ep is None or choice.kind == "local":
        return LocalDispatcher(experts, wire, keeps)
    if choice.kind == "rank":
        return RankDispatcher(experts, ep, wire, groups.ep_home, keeps)
    if choice.kind == "hierarchical" and groups.ep_nodes and groups.ep_node:
        home = groups.ep_nodes_home or groups.ep_nodes, groups.ep_node_home or groups.ep_node
        return HierarchicalDispatcher(experts, groups.ep_nodes, groups.ep_node, wire, home, keeps)
    if choice.kind == "deepep":
        # Imported only when asked for.
        from dstrain.dispatch import deepep

        return deepep.connect(config, choice.wire, groups, ep)
    return AllToAllDispatcher(experts, ep, wire, groups.ep_home, keeps)
