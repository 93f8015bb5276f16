"""Between the stages of a pipeline: what leaves a stage reaches the next one, on this rank or on another.

Both ends read from the same table (pipeline.py) in which order things leave a rank, so nothing but data travels. Over
gloo, some of the coming outputs and gradients are expected on every way before they are asked for. Where two stages
that follow one another are on one rank, as at the turn of a V, a tensor is handed over.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from dstrain.comm.p2p import Inbox, Outbox, Way
from dstrain.comm.trace import STAGES
from dstrain.mesh.groups import Groups
from dstrain.schedule.action import Pass
from dstrain.schedule.pipeline import Kind, Pipeline

# Kernels of NCCL that wait for data from other ranks keep calls of CUDA waiting that in turn wait for the device (the
# first use of a library, for example): a receive that is posted long before its tensor leaves stopped a first step for
# ever. There, nothing is posted that is not asked for.
AHEAD = {"cpu": 2, "cuda": 0}
TAGS = {Pass.FORWARD: 0, Pass.BACKWARD: 1}
PASSES = {Kind.FORWARD: Pass.FORWARD, Kind.BACKWARD: Pass.BACKWARD, Kind.INPUT: Pass.BACKWARD}

# (pass, number of the stage before the edge, micro-batch)
Edge = tuple[Pass, int, int]


def departures(pipeline: Pipeline, rank: int) -> Iterator[tuple[Edge, int]]:
    """All that leaves the stages of a pp index, with the pp index that it goes to, in the order of the slots: on every
    way, that of the sends."""
    for op in (op for slot in pipeline.ranks[rank] for op in slot):
        target = pipeline.target(op)
        if target is not None:
            yield (PASSES[op.kind], min(op.stage, target[0]), op.micro_batch), target[1]


@dataclass(frozen=True)
class Traffic:
    """What passes the edges of a pp index in a step."""

    # Where to.
    targets: dict[Edge, int]
    # Where from; what is made and used on one rank is in both.
    sources: dict[Edge, int]
    # By source and pass, in the order of the sends.
    coming: dict[tuple[int, Pass], list[Edge]]

    @staticmethod
    def of(pipeline: Pipeline, rank: int) -> "Traffic":
        leaves = list(departures(pipeline, rank))
        traffic = Traffic(dict(leaves), {}, defaultdict(list))
        # What comes passes the same edges in the other direction, so from ranks that something leaves for.
        for source in {target for _, target in leaves}:
            for edge, target in departures(pipeline, source):
                if target == rank:
                    traffic.sources[edge] = source
                    if source != rank:
                        traffic.coming[source, edge[0]].append(edge)
        return traffic


@dataclass
class Pipe:
    """The `Edges` of run.py for one rank of a pipeline. `begin` before every step."""

    groups: Groups
    _traffic: Traffic = field(init=False)
    _inboxes: dict[tuple[int, Pass], Inbox] = field(default_factory=dict)
    # Places in `Traffic.coming`.
    _taken: Counter[tuple[int, Pass]] = field(default_factory=Counter)
    # What is on this rank and waits for its stage.
    _here: dict[Edge, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._outbox = Outbox(self.groups.trace)
        self._rank = self.groups.coordinate.pp

    def begin(self, traffic: Traffic, like: Tensor) -> None:
        """`like`: an output of a stage, which is like a gradient of it; shape, dtype and device count."""
        self._traffic, self._taken, self._here = traffic, Counter(), {}
        self._inboxes = {
            (source, work): Inbox(self._way(source, self._rank, work), like, len(edges), AHEAD[like.device.type])
            for (source, work), edges in traffic.coming.items()
        }

    def _way(self, source: int, target: int, work: Pass) -> Way:
        other, all_stages = target if source == self._rank else source, self.groups.pp
        if all_stages is None:
            raise RuntimeError("this rank is in no pipeline")
        own_group = self.groups.pp_ways.get((source, target, work.value))
        if own_group is not None:
            return Way(own_group, 1 - own_group.index, 0)
        return Way(all_stages, other, TAGS[work])

    def send(self, work: Pass, edge: int, micro_batch: int, x: Tensor) -> None:
        """As in run.py. Raises PeerError if a send has failed."""
        key = (work, edge, micro_batch)
        target = self._traffic.targets[key]
        if target == self._rank:
            self._here[key] = x
        else:
            self._outbox.send(self._way(self._rank, target, work), x, STAGES)

    def take(self, work: Pass, edge: int, micro_batch: int) -> Tensor | None:
        """As in run.py. Raises PeerError."""
        key = (work, edge, micro_batch)
        source = self._traffic.sources.get(key)
        if source is None:
            return None
        way = (source, work)
        while key not in self._here:
            edge_there = self._traffic.coming[way][self._taken[way]]
            self._here[edge_there] = self._inboxes[way].take(STAGES)
            self._taken[way] += 1
        return self._here.pop(key)
