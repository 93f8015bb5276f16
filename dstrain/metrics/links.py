"""A warning when a link is slower than the hardware file says.

A rank's rate over a link is the best of many: in every stretch of time in which it had transfers under way there, what
it sent over what it took. A stretch also holds the waiting for a rank that is late, but the last one to come waits for
nobody, so the best rate of the ranks that exchange with each other is that of the link. Idle time is in no stretch.
Left out is what passes from stage to stage of a pipeline: it may be under way for as long as the next stage is busy.
"""

from collections.abc import Iterable, Iterator

import torch

from dstrain.comm.collectives import all_reduce_sum
from dstrain.comm.trace import STAGES, CommTotals, Transfer, busy
from dstrain.config.hardware import HardwareConfig
from dstrain.mesh.groups import Groups
from dstrain.mesh.topology import Link

# Steps whose best rate is looked at.
WINDOW = 20
# A link that carries less than this share of what it should is worth a warning.
SLOW = 0.5
# Shorter or smaller stretches measure latency.
LEAST_S = 5e-3
LEAST_BYTES = 1 << 20

ADVICE = {
    Link.NODE: (
        "Check how the devices are connected (nvidia-smi topo -m) and which transport is used (NCCL_DEBUG=INFO)"
    ),
    Link.NETWORK: (
        "Check which interface carries the traffic (NCCL_DEBUG=INFO; NCCL_IB_HCA, NCCL_SOCKET_IFNAME, "
        "GLOO_SOCKET_IFNAME choose it), its speed (ibstat, ethtool) and who else uses it"
    ),
}


class LinkWatch:
    """Warns once per run and link. All ranks call `after_step` with their own accounts."""

    def __init__(self, hardware: HardwareConfig, groups: Groups, window: int = WINDOW):
        self.groups, self.window = groups, window
        self.fields = {Link.NODE: "intra_node_gbytes_per_s", Link.NETWORK: "inter_node_gbytes_per_s"}
        self.expected = {link: getattr(hardware, name) for link, name in self.fields.items()}
        self._best: dict[Link, float] = {}
        self._steps = 0
        self._warned: set[Link] = set()

    def after_step(self, comm: CommTotals) -> list[str]:
        """Warnings, the same on every rank."""
        if self.groups.world is None or not any(self.expected.values()):
            return []
        for link in self.fields:
            self._best[link] = max(self._best.get(link, 0.0), best_rate(comm.transfers, link))
        self._steps += 1
        if self._steps % self.window:
            return []
        rates_RL = self._of_all_ranks()
        self._best = {}
        return list(self._warnings(rates_RL))

    def _of_all_ranks(self) -> list[list[float]]:
        place = self.groups.place
        rates_RL = torch.zeros(place.world, len(self.fields), dtype=torch.float64, device=place.device)
        rates_RL[place.rank] = rates_RL.new_tensor([self._best[link] for link in self.fields])
        return all_reduce_sum(rates_RL, self.groups.world).tolist()

    def _warnings(self, rates_RL: list[list[float]]) -> Iterator[str]:
        mesh = self.groups.mesh
        neighbours = mesh.ep_groups() if mesh.ep > 1 else mesh.data_groups()
        for position, link in enumerate(self.fields):
            measured = {tuple(ranks): max(rates_RL[rank][position] for rank in ranks) for ranks in neighbours}
            slow = {ranks: rate for ranks, rate in measured.items() if 0 < rate < SLOW * self.expected[link] * 1e9}
            if slow and link not in self._warned:
                self._warned.add(link)
                ranks = min(slow, key=lambda ranks: slow[ranks])
                yield self._warning(link, ranks, slow[ranks])

    def _warning(self, link: Link, ranks: tuple[int, ...], rate: float) -> str:
        what = {Link.NODE: "inside their node", Link.NETWORK: "over the network"}[link]
        return (
            f"warning: in the last {self.window} steps none of the ranks {ranks[0]} to {ranks[-1]} sent more than "
            f"{rate / 1e9:.3g} GB/s {what}; hardware.{self.fields[link]}={self.expected[link]:g}. {ADVICE[link]}, "
            "or correct the hardware file."
        )


def best_rate(transfers: Iterable[Transfer], link: Link) -> float:
    """Bytes per second over `link` in the best stretch of transfers; 0 if none is long enough to measure."""
    using = [t for t in transfers if _is_of(t, link)]
    left = sorted(((t.start_s, t.sent_bytes[link]) for t in using), reverse=True)
    best = 0.0
    for start, end in busy(using, float("-inf"), float("inf")):
        num_bytes = 0
        while left and left[-1][0] <= end:
            num_bytes += left.pop()[1]
        if end - start >= LEAST_S and num_bytes >= LEAST_BYTES:
            best = max(best, num_bytes / (end - start))
    return best


def _is_of(transfer: Transfer, link: Link) -> bool:
    """What also crosses the network says nothing about the links of the node."""
    if transfer.kind == STAGES:
        return False
    alone = link is Link.NETWORK or Link.NETWORK not in transfer.sent_bytes
    return alone and link in transfer.sent_bytes and transfer.end_s is not None
