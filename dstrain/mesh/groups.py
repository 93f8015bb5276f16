"""Process groups of a mesh, built once and passed as arguments; nothing looks them up.

The launcher (torchrun, Slurm, or nobody for a single process) says who we are through RANK, WORLD_SIZE and LOCAL_RANK.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dstrain.comm.collectives import Peers
from dstrain.comm.trace import Trace
from dstrain.host import tune_cpu
from dstrain.mesh.axes import Coordinate, Mesh

# One rank may tokenise a corpus or write a checkpoint for hours while the others wait for it; one that dies closes its
# connections, and is noticed at once all the same.
BACKGROUND_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class Place:
    """Who this process is in the launch."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def from_environment() -> "Place":
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            return Place(rank, world, device)
        return Place(rank, world, torch.device("cpu"))


@dataclass(frozen=True)
class Groups:
    """This rank's groups; None stands for a group of one, which needs no communication."""

    mesh: Mesh
    place: Place
    coordinate: Coordinate
    trace: Trace
    # Ranks that together hold all experts.
    ep: Peers | None
    # Ranks that hold the same experts.
    expert_data: Peers | None
    # Ranks that hold the same dense parameters.
    data: Peers | None
    world: Peers | None
    # A gloo group of all ranks for agreement and for checkpoints, which travel in the background.
    background: dist.ProcessGroup | None


def connect(mesh: Mesh, place: Place, timeout_s: float = 600.0) -> Groups:
    """Joins the other processes and builds all groups; `mesh.world` equals `place.world`.

    A peer that dies or stalls ends a collective of the step with an error after `timeout_s` seconds at the latest.
    """
    trace, coordinate = Trace(place.device), mesh.coordinate(place.rank)
    if place.device.type == "cpu":
        tune_cpu()
    if place.world == 1:
        return Groups(mesh, place, coordinate, trace, None, None, None, None, None)
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        device_id = place.device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)

    def mine(rank_lists: list[list[int]]) -> Peers | None:
        if len(rank_lists[0]) == 1:
            return None
        group: dist.ProcessGroup | None
        group, _ = dist.new_subgroups_by_enumeration(rank_lists, timeout=timeout, backend=backend)
        if group is None:
            raise RuntimeError(f"rank {place.rank} is in none of the groups {rank_lists}")
        return Peers(group, trace)

    everyone = dist.group.WORLD
    if everyone is None:
        raise RuntimeError("there is no default process group though it was just joined")
    return Groups(
        mesh,
        place,
        coordinate,
        trace,
        ep=mine(mesh.ep_groups()),
        expert_data=mine(mesh.expert_data_groups()),
        data=mine(mesh.data_groups()),
        world=Peers(everyone, trace),
        background=dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT),
    )


def disconnect() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
