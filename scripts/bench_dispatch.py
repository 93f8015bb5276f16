"""What a transport costs the host: CPU time per layer and micro-batch, forward and backward, without any experts.

    python scripts/bench_dispatch.py [--ranks 4] [--tokens 256] [--hidden 512] [--experts 16,256] [--rounds 25]

Real gloo processes on this machine; `hierarchical` takes half of them for a node. Times are CPU times, which waiting
for the network does not add to: of the main thread (what keeps it from computing), of the lane that packs, sends and
unpacks, and of the whole process, where gloo reads the sockets. Routing is random, top K of E.
"""

import argparse
import threading
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import multiprocessing as mp

from dstrain.dispatch.alltoall import AllToAllDispatcher
from dstrain.dispatch.contract import Route
from dstrain.dispatch.hierarchical import HierarchicalDispatcher
from dstrain.dispatch.rank import RankDispatcher
from dstrain.dispatch.transport import Transport
from dstrain.dispatch.wire import wire_format
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect, disconnect, free_port

WIRES = ("bfloat16", "fp8")
# Micro-batches whose times are thrown away.
WARM_UP = 5


def transports(groups: Groups) -> dict[str, Callable[..., Transport]]:
    """What takes a number of experts and a wire format, by name."""
    if groups.ep is None:
        raise SystemExit("--ranks must be at least 2: alone, a rank sends nothing")
    found = {
        "alltoall": partial(AllToAllDispatcher, peers=groups.ep),
        "rank": partial(RankDispatcher, peers=groups.ep),
    }
    if groups.ep_nodes is not None and groups.ep_node is not None:
        found["hierarchical"] = partial(HierarchicalDispatcher, nodes=groups.ep_nodes, node=groups.ep_node)
    return found


def cpu_ms(thread: threading.Thread) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)) * 1e3


def used_ms() -> Tensor:
    """CPU milliseconds so far of the main thread, of all lanes, and of the process."""
    lanes = [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]
    return torch.tensor([cpu_ms(threading.main_thread()), sum(map(cpu_ms, lanes)), time.process_time() * 1e3])


def micro_batch(transport: Transport, x_TD: Tensor, route: Route) -> None:
    """A layer's way there and back in both directions."""
    arrived = transport.dispatch(x_TD, route).wait()
    transport.combine(arrived.rows_RD, arrived.ticket).wait().backward(x_TD.detach())


def measure(transport: Transport, experts: int, arguments: argparse.Namespace, rank: int) -> Tensor:
    """The median of each figure of `used_ms` over micro-batches."""
    generator = torch.Generator().manual_seed(rank)
    times = []
    for _ in range(WARM_UP + arguments.rounds):
        scores_TE = torch.rand(arguments.tokens, experts, generator=generator)
        weights_TK, experts_TK = scores_TE.topk(arguments.top, dim=1)
        x_TD = torch.randn(arguments.tokens, arguments.hidden, generator=generator).bfloat16().requires_grad_()
        dist.barrier()
        before = used_ms()
        micro_batch(transport, x_TD, Route(experts_TK, weights_TK.requires_grad_()))
        # What the lane still cleans up behind the last arrival counts, too.
        time.sleep(0.002)
        times.append(used_ms() - before)
    return torch.stack(times[WARM_UP:]).median(0).values


def work(rank: int, arguments: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    place = Place.on_this_machine(rank, arguments.ranks, port)
    groups = connect(Mesh(ep=arguments.ranks), place, timeout_s=60, ranks_per_node=max(1, arguments.ranks // 2))
    table = Table(title=f"CPU ms per layer and micro-batch: {arguments.tokens} tokens x {arguments.hidden}")
    for column in ("transport", "wire", "experts", "main thread", "lane", "process"):
        table.add_column(column)
    for name, make in transports(groups).items():
        for wire in WIRES:
            for experts in arguments.experts:
                transport = make(experts, wire=wire_format(wire, torch.bfloat16))
                figures = measure(transport, experts, arguments, rank)
                transport.close()
                dist.all_reduce(figures)
                cells = (f"{figure / arguments.ranks:.2f}" for figure in figures.tolist())
                table.add_row(name, wire, str(experts), *cells)
    if rank == 0:
        Console().print(table)
    disconnect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--top", type=int, default=6)
    parser.add_argument("--experts", type=lambda text: [int(n) for n in text.split(",")], default=[16, 256])
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    mp.spawn(work, (arguments, free_port()), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
