"""What the links and the collectives of a training run take on these machines, at the sizes of its config.

Tokens travel through the transports on random routes of the config's router, gradients and parameters through the
engine's collectives. All ranks send at once, as in a step; a time is that of the slowest rank, the median of several
rounds after one that warms up.

Shapes: T tokens of a micro-batch, D hidden.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import median

import torch
from torch import Tensor

from dstrain.comm.collectives import Peers, all_reduce_max, all_reduce_sum
from dstrain.comm.flat import FlatCollectives
from dstrain.comm.probe import Speed, measure, slowest_s
from dstrain.comm.trace import CommTotals
from dstrain.config.precision import gathers_fp8
from dstrain.config.schema import Config
from dstrain.dispatch.choose import Task, make_dispatcher
from dstrain.dispatch.contract import Arrived, Route
from dstrain.mesh.groups import Groups
from dstrain.mesh.topology import Link
from dstrain.model.router import Router
from dstrain.plan.count import parameters

LINKS = (Link.NODE, Link.NETWORK)


@dataclass(frozen=True)
class Exchange:
    """What `ranks` ranks of a group did together."""

    what: str
    group: str
    ranks: int
    # By the rank that sends most on that kind of link.
    sent_bytes: dict[Link, int]
    ms: float
    # Of the processor, for the rank that needs most.
    cpu_ms: float


def speeds(everyone: Peers) -> dict[Link, Speed]:
    """Of every kind of link that there is: each rank to all its peers behind such links at once, in one direction."""
    measured = {link: measure(everyone, link, everyone) for link in LINKS}
    return {link: speed for link, speed in measured.items() if speed is not None}


def exchanges(config: Config, groups: Groups, everyone: Peers, rounds: int) -> Iterator[Exchange]:
    """Those of a step, one of each kind; all ranks call this."""
    if groups.ep is not None:
        for kind in _kinds(config, groups):
            tokens = _Tokens(replace(config, dispatch=replace(config.dispatch, kind=kind)), groups)
            ways = {"dispatch": tokens.dispatch, "combine": tokens.combine, "gradients of both": tokens.backward}
            yield from _timed({f"{kind}: {way}": act for way, act in ways.items()}, groups.ep, everyone, rounds)
    flat = FlatCollectives(groups.trace)
    for what, peers, elements in buckets(config, groups):
        bucket = _Bucket(config, flat, peers, elements)
        acts = {f"{what}: gradients": bucket.reduce, f"{what}: parameters": bucket.gather}
        yield from _timed(acts, peers, everyone, rounds)
    loads_E = torch.zeros(config.model.num_experts, dtype=torch.int64, device=groups.place.device)
    sums = {"load of a layer's experts": lambda: all_reduce_sum(loads_E, everyone)}
    yield from _timed(sums, everyone, everyone, rounds)


def _kinds(config: Config, groups: Groups) -> Sequence[str]:
    """The transports that can carry this config's tokens; `deepep` if it is asked for."""
    named, able = config.dispatch.kind, Task.of(config, groups, config.precision.compute_dtype).kinds
    return able if named in ("auto", *able) else (*able, named)


def buckets(config: Config, groups: Groups) -> Iterator[tuple[str, Peers, int]]:
    """What a bucket holds, the ranks that share it, and its elements: one of dense weights, and one of experts."""
    counted = parameters(replace(config.model, vocab_size=config.model.vocab_size or 0))
    limit = config.engine.bucket_mib * 2**20 // 4
    experts = counted.routed_experts // config.mesh.ep
    sizes = {"dense bucket": (groups.data, counted.dense), "experts' bucket": (groups.expert_data, experts)}
    for what, (peers, elements) in sizes.items():
        if peers is not None and elements:
            yield what, peers, ceil(min(elements, limit) / peers.size) * peers.size


def _timed(acts: Mapping[str, Callable[[], object]], peers: Peers, everyone: Peers, rounds: int) -> Iterator[Exchange]:
    """The acts in turn, `rounds` times and once before."""
    times_ms: defaultdict[str, list[float]] = defaultdict(list)
    cpu_ms: defaultdict[str, list[float]] = defaultdict(list)
    sent: dict[str, Tensor] = {}
    trace = everyone.trace
    for _ in range(1 + rounds):
        for name, act in acts.items():
            account: list[CommTotals] = []

            def traced(act: Callable[[], object] = act, account: list[CommTotals] = account, name: str = name) -> None:
                trace.take()
                began_s = time.process_time()
                act()
                cpu_ms[name].append((time.process_time() - began_s) * 1e3)
                account.append(trace.take())

            times_ms[name].append(slowest_s(traced, everyone) * 1e3)
            sent[name] = torch.tensor([account[0].link_bytes.get(link, 0) for link in LINKS])
    for name, sent_L in sent.items():
        own = [*sent_L.tolist(), median(cpu_ms[name][1:])]
        *most_L, most_ms = all_reduce_max(
            torch.tensor(own, dtype=torch.float64, device=trace.device), everyone
        ).tolist()
        num_bytes = dict(zip(LINKS, map(int, most_L), strict=True))
        yield Exchange(name, peers.name, peers.size, num_bytes, median(times_ms[name][1:]), most_ms)


class _Tokens:
    """A micro-batch on its way to the experts and back, in both directions."""

    def __init__(self, config: Config, groups: Groups):
        model, train, device = config.model, config.train, groups.place.device
        self._dispatcher = make_dispatcher(config, groups)
        generator = torch.Generator().manual_seed(groups.place.rank)
        x_BTD = torch.randn(train.micro_batch, train.seq_len, model.hidden_size, generator=generator)
        router = Router(model)
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            route, _ = router(x_BTD)
        self._route = Route(route.experts_TK.to(device), route.weights_TK.to(device).requires_grad_())
        dtype: torch.dtype = getattr(torch, config.precision.compute_dtype)
        self._x_TD = x_BTD.flatten(0, 1).to(device, dtype).requires_grad_()

    def dispatch(self) -> None:
        self._arrived: Arrived = self._dispatcher.dispatch(self._x_TD, self._route).wait()

    def combine(self) -> None:
        self._home_TD: Tensor = self._dispatcher.combine(self._arrived.rows_RD, self._arrived.ticket).wait()

    def backward(self) -> None:
        self._home_TD.backward(self._x_TD.detach())


class _Bucket:
    """A bucket of the torch engine: its gradients are summed and its parameters gathered."""

    def __init__(self, config: Config, flat: FlatCollectives, peers: Peers, elements: int):
        self._flat, self._peers = flat, peers
        self._wire: torch.dtype = getattr(torch, config.precision.grad_wire_dtype)
        device = peers.trace.device
        self._grad = torch.zeros(elements, device=device)
        # Weights in FP8 are bytes; their scales are too few to count.
        dtype = torch.uint8 if gathers_fp8(config) else getattr(torch, config.precision.compute_dtype)
        self._compute = torch.zeros(elements, dtype=dtype, device=device)

    def reduce(self) -> None:
        self._flat.reduce_scatter(self._grad, self._peers, self._wire, "grad").wait()

    def gather(self) -> None:
        self._flat.all_gather(self._compute, self._peers, "param").wait()
