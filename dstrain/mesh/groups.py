"""Process groups of a mesh, built once and passed as arguments; nothing looks them up.

The launcher (torchrun, Slurm, or nobody for a single process) says who we are through RANK, WORLD_SIZE and LOCAL_RANK.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dstrain.comm.collectives import Peers
from dstrain.comm.p2p import meet
from dstrain.comm.trace import Trace
from dstrain.config.schema import Config
from dstrain.host import tune_cpu, tune_gpu, tune_gpu_memory
from dstrain.mesh.axes import Coordinate, Mesh
from dstrain.mesh.topology import Topology
from dstrain.schedule.pipelines.choose import layout

# One rank may tokenise a corpus or write a checkpoint for hours while the others wait for it; one that dies closes its
# connections, and is noticed at once all the same.
BACKGROUND_TIMEOUT = timedelta(hours=24)

# By device. On meta a rank has shapes and no values: no other process is needed, and nothing travels.
BACKENDS = {"cuda": "nccl", "cpu": "gloo", "meta": "fake"}


@dataclass(frozen=True)
class Place:
    """Who this process is in the launch."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def from_environment() -> "Place":
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        tune_gpu_memory()
        if world > 1:
            tune_gpu()
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            return Place(rank, world, device)
        return Place(rank, world, torch.device("cpu"))

    @staticmethod
    def on_this_machine(rank: int, world: int, port: int) -> "Place":
        """For a CPU process that a program starts here by itself: the environment is as a launcher would set it."""
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        if Path("/sys/class/net/lo").exists():
            # The host name of a container may not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return Place(rank, world, torch.device("cpu"))


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Groups:
    """This rank's groups; None stands for a group of one, which needs no communication."""

    mesh: Mesh
    place: Place
    coordinate: Coordinate
    trace: Trace
    topology: Topology
    # Ranks that together hold all experts.
    ep: Peers | None = None
    # Ranks that hold the same experts.
    expert_data: Peers | None = None
    # Ranks that hold the same dense parameters.
    data: Peers | None = None
    # Ranks that hold the first or the last stage of a pipeline, where no rank holds both.
    embedding: Peers | None = None
    # Ranks that a micro-batch travels through, in the order of the pipeline ...
    pp: Peers | None = None
    # ... and on NCCL a communicator for each way of it, by pp index (from, to) and "F" or "B", so that none waits for
    # another. gloo tells ways apart by tags.
    pp_ways: Mapping[tuple[int, int, str], Peers] = field(default_factory=dict)
    world: Peers | None = None
    # Where the ep group spans several equally large nodes: its ranks with this rank's index in the node ...
    ep_nodes: Peers | None = None
    # ... and its ranks on this rank's node.
    ep_node: Peers | None = None
    # The same ranks, for what travels home while other tokens travel out. NCCL runs the transfers of a communicator one
    # after the other, hence a second one; gloo's own queue serves both ways best, and these are the groups above.
    ep_home: Peers | None = None
    ep_nodes_home: Peers | None = None
    ep_node_home: Peers | None = None
    # A gloo group of all ranks for agreement and for checkpoints, which travel in the background.
    background: dist.ProcessGroup | None = None


def connect(mesh: Mesh, place: Place, timeout_s: float = 600.0, ranks_per_node: int | None = None) -> Groups:
    """Joins the other processes and builds all groups; `mesh.world` equals `place.world`.

    A peer that dies or stalls ends a collective of the step with an error after `timeout_s` seconds at the latest.
    `ranks_per_node` takes runs of that many ranks for nodes instead of asking who shares a machine. On the meta device,
    where there is nobody to ask, it must be given; one process then has its place in a world of any size.
    """
    trace, coordinate = Trace(place.device), mesh.coordinate(place.rank)
    if place.device.type == "cpu":
        tune_cpu()
    if place.world == 1:
        return Groups(mesh, place, coordinate, trace, Topology((0,)))
    timeout = timedelta(seconds=timeout_s)
    backend = BACKENDS[place.device.type]
    if not dist.is_initialized():
        _init(backend, place, timeout)
    background = dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT) if backend != "fake" else None
    topology = _discover(place, background, ranks_per_node)
    joiner = _Joiner(place, topology, trace, backend, timeout)
    nodes, node = joiner.inside(mesh.ep_groups())
    ep, expert_data = joiner.join("ep", mesh.ep_groups()), joiner.join("expert-data", mesh.expert_data_groups())
    data, pp = joiner.join("data", mesh.data_groups()), joiner.join("pp", mesh.pp_groups())
    embedding = joiner.join("embedding", mesh.embedding_groups())
    ep_nodes, ep_node = joiner.join("ep-nodes", nodes), joiner.join("ep-node", node)
    return Groups(
        mesh,
        place,
        coordinate,
        trace,
        topology,
        ep=ep,
        expert_data=expert_data,
        data=data,
        embedding=embedding,
        pp=pp,
        pp_ways=joiner.ways(mesh) if backend == "nccl" else {},
        world=joiner.peers("world", dist.group.WORLD, range(place.world)),
        ep_nodes=ep_nodes,
        ep_node=ep_node,
        ep_home=joiner.twin("ep", mesh.ep_groups(), ep),
        ep_nodes_home=joiner.twin("ep-nodes", nodes, ep_nodes),
        ep_node_home=joiner.twin("ep-node", node, ep_node),
        background=background,
    )


def _init(backend: str, place: Place, timeout: timedelta) -> None:
    if backend == "fake":
        dist.init_process_group(backend, rank=place.rank, world_size=place.world)
    else:
        device_id = place.device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)


def node_name() -> str:
    """Equal for processes that reach each other without a network: one machine, and one network namespace of it."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    return f"{socket.gethostname()} {boot.read_text().strip()} {network.stat().st_ino}"


def _discover(place: Place, background: dist.ProcessGroup | None, ranks_per_node: int | None) -> Topology:
    if ranks_per_node is not None:
        return Topology(tuple(rank // ranks_per_node for rank in range(place.world)))
    names = [""] * place.world
    dist.all_gather_object(names, node_name(), group=background)
    return Topology.of_names(names)


@dataclass(frozen=True)
class _Joiner:
    """Builds groups of a kind: lists of ranks that share none."""

    place: Place
    topology: Topology
    trace: Trace
    backend: str
    timeout: timedelta

    def join(self, name: str, rank_lists: list[list[int]]) -> Peers | None:
        """The group that holds this rank; None if it is alone in it, or in none."""
        lists = [ranks for ranks in rank_lists if len(ranks) > 1]
        own = next((ranks for ranks in lists if self.place.rank in ranks), None)
        group: dist.ProcessGroup | None = None
        # One call for all groups, in which every rank takes part (NCCL), or a call by the members of each (gloo): the
        # number of calls does not grow with the number of groups.
        if self.backend == "nccl" and lists:
            group = dist.split_group(split_ranks=lists, timeout=self.timeout, group_desc=name)
        elif lists:
            # Of this rank alone, where it is in none: gloo tells groups apart by how many a rank has made before.
            members = own or [self.place.rank]
            group = dist.new_group(members, timeout=self.timeout, use_local_synchronization=True, group_desc=name)
        return None if own is None else self.peers(name, group, own)

    def twin(self, name: str, rank_lists: list[list[int]], peers: Peers | None) -> Peers | None:
        return self.join(f"{name}-home", rank_lists) if self.backend == "nccl" else peers

    def ways(self, mesh: Mesh) -> dict[tuple[int, int, str], Peers]:
        """One communicator for each way between neighbours in the pipeline that this rank is on."""
        found = {}
        own = mesh.coordinate(self.place.rank).pp
        for a, b in mesh.hops():
            pairs = [sorted((mesh.rank(a, d, e), mesh.rank(b, d, e))) for d in range(mesh.dp) for e in range(mesh.ep)]
            for way in ((a, b, "F"), (b, a, "B")):
                peers = self.join("pp-{}-{}-{}".format(*way), pairs)
                if peers is not None and own in (a, b):
                    found[way] = peers
                    # In the same order on all ranks.
                    meet(peers, sends=own == way[0])
        return found

    def peers(self, name: str, group: dist.ProcessGroup | None, ranks: Sequence[int]) -> Peers:
        if group is None:
            raise RuntimeError(f"rank {self.place.rank} did not get the {name} group of the ranks {list(ranks)}")
        links = tuple(self.topology.link(self.place.rank, rank) for rank in ranks)
        grid = self.topology.grid(ranks)
        per_node = len(grid[0]) if grid is not None and len(grid) > 1 else 1
        return Peers(group, self.trace, name, tuple(ranks), links, per_node)

    def inside(self, ep_groups: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Across and inside the nodes of every ep group that spans several equally large ones."""
        grids = [grid for grid in map(self.topology.grid, ep_groups) if grid is not None and len(grid) > 1]
        across = [list(column) for grid in grids for column in zip(*grid, strict=True)]
        return across, [node for grid in grids for node in grid]


def mesh_of(config: Config) -> Mesh:
    """The mesh of a config whose mesh.dp is filled in."""
    mesh, schedule = config.mesh, config.schedule
    stages = layout(schedule.pipeline, mesh.pp, schedule.chunks) if mesh.pp > 1 else None
    return Mesh(mesh.pp, mesh.dp or 1, mesh.ep, stages)


def disconnect() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
