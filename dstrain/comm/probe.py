"""How fast a kind of link is, measured over the real groups when nobody has written it down.

All ranks send to all of their peers behind such links at once, as a dispatcher does: what they share, they share here,
too. Messages grow until one exchange takes long enough to be trusted. This is no traffic of a step: the trace is not
told.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers, all_reduce_max
from dstrain.mesh.topology import Link

FIRST_BYTES, MOST_BYTES = 1 << 16, 1 << 26
LATENCY_ROUNDS = 5
# Together with the smaller exchanges before it, about twice as long.
LONG_ENOUGH_S = 0.2


@dataclass(frozen=True)
class Speed:
    """Of the links of a rank to its peers of a kind, all used at once, in one direction."""

    gbytes_per_s: float
    # From the start of an exchange to its end, beyond what the bytes take.
    latency_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.gbytes_per_s / 1e9


def measure(peers: Peers, link: Link, everyone: Peers, long_enough_s: float = LONG_ENOUGH_S) -> Speed | None:
    """The speed of the slowest rank, the same on all ranks of `everyone`, who all call this; None: no such links."""
    targets = [index for index in range(peers.size) if index != peers.index and peers.link(index) is link]
    most_targets = round(_most(len(targets), everyone))
    if not most_targets:
        return None
    _exchange_s(peers, targets, 1, everyone)  # whatever is set up at first use
    latency_s = sorted(_exchange_s(peers, targets, 1, everyone) for _ in range(LATENCY_ROUNDS))[LATENCY_ROUNDS // 2]
    num_bytes, taken_s = FIRST_BYTES, 0.0
    while taken_s < long_enough_s and num_bytes * most_targets <= MOST_BYTES:
        taken_s = _exchange_s(peers, targets, num_bytes, everyone)
        num_bytes *= 2
    sent_bytes = num_bytes // 2 * most_targets
    return Speed(sent_bytes / max(taken_s - latency_s, 1e-9) / 1e9, latency_s)


def slowest_s(act: Callable[[], object], everyone: Peers) -> float:
    """How long the slowest rank takes for `act`, the device's part included; all begin together."""
    device = everyone.trace.device
    _most(0, everyone)
    began = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _most(time.perf_counter() - began, everyone)


def _exchange_s(peers: Peers, targets: list[int], num_bytes: int, everyone: Peers) -> float:
    """The time in which every rank has sent so many bytes to each target and got as many."""
    out = torch.zeros(num_bytes, dtype=torch.uint8, device=peers.trace.device)
    arriving = [torch.empty_like(out) for _ in targets]

    def exchange() -> None:
        for work in _start(peers, targets, out, arriving):
            work.wait()

    return slowest_s(exchange, everyone)


def _start(peers: Peers, targets: list[int], out: Tensor, arriving: list[Tensor]) -> list[dist.Work]:
    """Receives first: gloo fills the wire in both directions only if they are posted."""
    receives = [
        dist.P2POp(dist.irecv, buffer, group=peers.group, group_peer=index)
        for index, buffer in zip(targets, arriving, strict=True)
    ]
    sends = [dist.P2POp(dist.isend, out, group=peers.group, group_peer=index) for index in targets]
    return dist.batch_isend_irecv(receives + sends) if targets else []


def _most(value: float, everyone: Peers) -> float:
    """The largest of all ranks' values; nobody returns before all have come."""
    return float(all_reduce_max(torch.tensor(value, dtype=torch.float64, device=everyone.trace.device), everyone))
