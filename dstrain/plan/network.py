"""How long transfers take on the two kinds of links of a machine. Seconds throughout.

Ranks lie as in a mesh: tensor parallelism next to each other, then context, then data (expert parallelism within), then
the pipeline. A group whose members are `stride` ranks apart has as many of them on each node as fit.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from dstrain.config.hardware import HardwareConfig
from dstrain.plan.architecture import Architecture
from dstrain.plan.job import Job
from dstrain.plan.traffic import Router, row_bytes

# Assumed where a file says nothing (NCCL, a collective).
LATENCY_US = 20.0
# From node to node around a ring (64 bytes over InfiniBand, arXiv:2505.09343, table 5).
HOP_S = 3.7e-6
# Share of its speed that an all-to-all keeps while other kernels compute: of DeepEP on H800, 28-36 of 51 GB/s out and
# 37-39 of 50 GB/s home (dstrain/plan/data/deepseek_train_trace.json against gpu_microbenchmarks.json).
OVERLAPPED = 0.7
# Before rows leave, ranks tell each other how many come, and wait for the last of them: of DeepEP 0.1 ms for the
# layout and 0.75 ms at least for the notification, with the skew of a profiler in it (the same trace). Assumed is a
# part of that, and no more than a latency within one NVLink domain.
NOTIFY_S = 150e-6


@dataclass(frozen=True)
class Group:
    """Ranks that exchange something: how many, and how many of them are on one node."""

    size: int
    local: int

    @staticmethod
    def of(size: int, stride: int, per_node: int) -> "Group":
        return Group(size, max(1, min(size, per_node // stride)))

    @property
    def nodes(self) -> int:
        return ceil(self.size / self.local)


@dataclass(frozen=True)
class Network:
    """The links of one rank."""

    hardware: HardwareConfig

    def _latency_s(self, group: Group) -> float:
        machine = self.hardware
        latency_us = machine.inter_node_latency_us if group.nodes > 1 else machine.intra_node_latency_us
        return (latency_us or LATENCY_US) * 1e-6

    def collective_s(self, num_bytes: float, group: Group) -> float:
        """A reduce-scatter or an all-gather of so many bytes in all, as a ring; an all-reduce is both."""
        if group.size == 1:
            return 0.0
        machine = self.hardware
        speed = machine.intra_node_gbytes_per_s * machine.intra_node_efficiency
        if group.nodes > 1:
            # Every rank of a node feeds its own network card.
            across = group.local * machine.inter_node_gbytes_per_s * machine.inter_node_efficiency
            speed = min(speed, across) if group.local > 1 else across
        passed_s = num_bytes * (group.size - 1) / group.size / (speed * 1e9)
        return passed_s + self._latency_s(group) + (group.nodes - 1) * HOP_S

    def send_s(self, num_bytes: float, crosses: bool) -> float:
        """From one rank to another."""
        group = Group(2, 1 if crosses else 2)
        return 2 * self.collective_s(num_bytes, group) - self._latency_s(group)

    def exchange_s(self, inside: float, across: float, group: Group) -> float:
        """An all-to-all in which a rank sends so many bytes to others of its node, and to other nodes, at once."""
        if group.size == 1:
            return 0.0
        machine = self.hardware
        speed = machine.intra_node_gbytes_per_s * machine.intra_node_alltoall_efficiency * 1e9
        # Where every rank is a node of its own, there are no links inside.
        inside_s = inside / speed if inside else 0.0
        if group.nodes == 1:
            return inside_s + self._latency_s(group)
        across_s = across / (machine.inter_node_gbytes_per_s * machine.inter_node_alltoall_efficiency * 1e9)
        return max(inside_s, across_s) + self._latency_s(group)


@dataclass(frozen=True)
class Rows:
    """That a token's rows are on average, on each hop: to ranks of the same node, and to other nodes."""

    inside: float
    across: float


@lru_cache(maxsize=4096)
def visited(model_key: tuple[int, int, int, int], places: int) -> float:
    """Of `places` equal shares of the experts, those that a token has an expert in (plan.traffic.Router)."""
    return Router(*model_key).places(places)


@lru_cache(maxsize=4096)
def rows_sent(dispatcher: str, model_key: tuple[int, int, int, int], ranks: int, local: int) -> Rows:
    """Of one token under a router that likes all experts equally; `model_key`: experts, experts per token, groups,
    groups per token."""
    nodes = ceil(ranks / local)
    rows = float(model_key[1]) if dispatcher == "alltoall" else visited(model_key, ranks)
    if dispatcher in ("alltoall", "rank") or nodes == 1:
        return Rows(rows * (local - 1) / ranks, rows * (ranks - local) / ranks)
    # What arrives at a node goes on to its ranks.
    return Rows(rows * (local - 1) / local, visited(model_key, nodes) * (nodes - 1) / nodes)


def router_key(model: Architecture) -> tuple[int, int, int, int]:
    return model.experts, model.experts_per_token, model.groups, model.groups_per_token


@dataclass(frozen=True)
class Exchanges:
    """Seconds of the transfers of an MoE block, on the way out and home."""

    out_s: float
    home_s: float


def exchanges(job: Job, hardware: HardwareConfig, tokens: float) -> Exchanges:
    """Of `tokens` tokens that a rank sends; the most loaded rank receives `job.skew` times what the mean does."""
    group = Group.of(job.ep, job.etp, hardware.devices_per_node)
    if job.ep == 1 or job.dispatcher == "local":
        return Exchanges(0.0, 0.0)
    rows = rows_sent(job.dispatcher, router_key(job.model), job.ep, group.local)
    network, hidden = Network(hardware), job.model.hidden
    on_gpu = hardware.multiprocessors > 0
    slower, notify_s = OVERLAPPED if job.overlap and on_gpu else 1.0, NOTIFY_S if on_gpu and group.nodes > 1 else 0.0
    home = 4 if job.products == "float32" else 2
    sent = tokens * job.skew
    out_s, home_s = (
        network.exchange_s(rows.inside * sent * num_bytes, rows.across * sent * num_bytes, group) / slower + notify_s
        for num_bytes in (row_bytes(job.wire, hidden), home * hidden)
    )
    return Exchanges(out_s, home_s)
