"""NCCL where there is one GPU: a group of a single rank, and several ranks that share the device.

NCCL refuses two ranks on one GPU of one host. Ranks that say they are hosts of their own, it lets be, and carries their
data through sockets: real communicators, kernels and streams, only slow.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from dstrain.comm.collectives import Peers
from dstrain.comm.trace import Trace
from dstrain.config.schema import Config
from dstrain.dispatch.choose import make_dispatcher
from dstrain.dispatch.hierarchical import HierarchicalDispatcher
from dstrain.dispatch.transport import Transport
from dstrain.dispatch.wire import wire_format
from dstrain.host import tune_gpu
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, free_port
from dstrain.mesh.topology import Link, Topology
from dstrain.schedule.pipeline import Layout
from tests.gloo.spawn import spawn

GPU = torch.device("cuda", 0)
# Before a process asks for a GPU, which every test of this folder does.
tune_gpu()


NAMES = ("ep", "ep_home", "ep_nodes", "ep_node", "ep_nodes_home", "ep_node_home", "data", "expert_data", "world")


@contextmanager
def alone_over_nccl() -> Iterator[Groups]:
    """A rank whose groups, all of one member, are NCCL communicators: what it sends to itself does travel."""
    torch.cuda.set_device(GPU)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=GPU)
    trace = Trace(GPU)
    peers = {name: Peers(dist.new_group([0], backend="nccl"), trace, name, (0,), (Link.SELF,)) for name in NAMES}
    try:
        yield Groups(Mesh(), Place(0, 1, GPU), Mesh().coordinate(0), trace, Topology((0,)), **peers)
    finally:
        dist.destroy_process_group()


def afresh(groups: Groups, layout: Layout | None = None) -> Groups:
    """The same communicators with an account of their own, and maybe the stages of a pipeline."""
    trace = Trace(GPU)
    peers = {name: replace(getattr(groups, name), trace=trace) for name in NAMES}
    return replace(groups, mesh=Mesh(layout=layout), trace=trace, **peers)


def transport(config: Config, groups: Groups) -> Transport:
    """What a training run would carry tokens with. Of a rank alone, which fills no nodes, `hierarchical` as well."""
    if config.dispatch.kind != "hierarchical" or groups.place.world > 1:
        return make_dispatcher(config, groups)
    wire = wire_format(config.dispatch.wire, getattr(torch, config.precision.compute_dtype))
    homebound = (groups.ep_nodes_home, groups.ep_node_home)
    return HierarchicalDispatcher(config.model.num_experts, groups.ep_nodes, groups.ep_node, wire, homebound)


def spawn_on_one_gpu(fn: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Calls `fn(place, *args)`, which joins the others by dstrain.mesh.groups.connect, in `world` processes on one GPU;
    otherwise as `spawn`. Results are to hold no tensors of the GPU."""
    return spawn(_on_shared_gpu, world, free_port(), fn, args, timeout_s=150)


def _on_shared_gpu(rank: int, world: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    dist.destroy_process_group()
    Place.on_this_machine(rank, world, port)
    os.environ |= {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    torch.cuda.set_device(GPU)
    return fn(Place(rank, world, GPU), *args)
