"""Experts change ranks between steps, so that no rank has more to do than the others (plan/placement.py says which).

Every dispatch.placement.every_steps steps each MoE layer gets a new placement for the load that the global batch has
put on its experts since the last one, if that lowers the load of the busiest rank by dispatch.placement.min_gain.
There is one replica of each expert: a placement is a permutation of experts over slots.

What moves are master weights and both moments. A rank holds ranges of logical tensors (engine/state.py), before and
after, so a move is what saving in one layout and loading in another is, without the disk: every rank sends the
intersections of what it held with what others hold now. Weights in the compute dtype are made from the master weights,
as after every update. Names, shapes and checkpoints don't change. The router names experts as ever; the layer turns
names into slots (`MoE.slots_E`).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers
from dstrain.comm.mailbox import Mailbox, Pool, make_mailbox
from dstrain.config.schema import Config
from dstrain.engine.contract import Engine
from dstrain.engine.state import FlatShard, Shards
from dstrain.mesh.groups import Groups
from dstrain.model.moe import MoE
from dstrain.model.transformer import Transformer, router_names
from dstrain.plan.placement import Placement, contiguous, rank_loads, rebalance, slots

# The data group carries gradients and parameters as well.
MAILBOX_TAG = 2

# (offset in the logical tensor, length, position in the rank's storage) of every range of a shard, by offset.
Ranges = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Moved:
    """What a look at the loads led to."""

    # Experts that changed ranks, over all layers.
    experts: int
    # Bytes that this rank sent.
    sent_bytes: int
    seconds: float
    # Load of the busiest rank over the mean of the ranks, mean over MoE layers; loads are those of the steps that the
    # new placement was made for.
    load_before: float
    load_after: float


@dataclass
class Placer:
    """Keeps the placement of every MoE layer, of those on other pipeline ranks, too; does nothing on a rank that holds
    every expert."""

    config: Config
    groups: Groups
    model: Transformer
    engine: Engine
    # By MoE layer, MTP layers last.
    placements: list[Placement] = field(init=False)
    # Tokens by layer and expert since the last look.
    _load_LE: Tensor | None = None

    def __post_init__(self) -> None:
        experts, names = self.config.model.num_experts, router_names(self.config.model)
        own = {name: module for name, module in self.model.named_modules() if isinstance(module, MoE)}
        self._layers = [own.get(name.rpartition(".")[0]) for name in names]
        self.placements = [contiguous(experts, self.groups.mesh.ep) for _ in names]

    @property
    def _active(self) -> bool:
        return self.config.dispatch.placement.every_steps > 0 and self.groups.ep is not None and len(self._layers) > 0

    @property
    def _nodes(self) -> int:
        """Nodes of each expert-parallel group; all ranks must decide alike."""
        return self.groups.topology.nodes_of_each(self.groups.mesh.ep_groups())

    @torch.no_grad()
    def after_step(self, step: int, load_LE: Tensor) -> Moved | None:
        """After the update of step `step`, which put `load_LE` on the experts; None where it is not time."""
        if not self._active:
            return None
        self._load_LE = load_LE.clone() if self._load_LE is None else self._load_LE + load_LE
        if step % self.config.dispatch.placement.every_steps:
            return None
        began = time.perf_counter()
        loads, self._load_LE = self._load_LE.tolist(), None
        better = [self._better(load, now) for load, now in zip(loads, self.placements, strict=True)]
        before, after = _busiest(loads, self.placements), _busiest(loads, better)
        experts = sum(_changed(old, new) for old, new in zip(self.placements, better, strict=True))
        sent_bytes = 0
        if experts:
            sent_bytes = self._move(better)
            self.engine.loaded(step)
        return Moved(experts, sent_bytes, time.perf_counter() - began, before, after)

    def _better(self, loads: list[float], now: Placement) -> Placement:
        router = self.config.model.router
        # Without a limit on groups, they mean nothing to the network.
        groups = router.num_groups if router.groups_per_token < router.num_groups else 1
        new = rebalance(loads, now, groups=groups, nodes=self._nodes)
        gain = 1 - max(rank_loads(loads, new)) / max(1, *rank_loads(loads, now))
        return new if gain >= self.config.dispatch.placement.min_gain else now

    def _move(self, placements: list[Placement]) -> int:
        """Brings experts where `placements` want them; the bytes that this rank sent."""
        peers, index = self.groups.data, self.groups.coordinate.ep
        if peers is None:
            raise RuntimeError("experts can't move in a run of one rank")
        before = self.engine.state()
        for moe, placement in zip(self._layers, placements, strict=True):
            if moe is None:
                continue
            moe.experts.held = placement[index]
            moe.slots_E = torch.tensor(slots(placement), device=self.groups.place.device)
        self.placements = placements
        return redistribute(before, self.engine.state(), make_mailbox(peers, MAILBOX_TAG, Pool()), peers)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint has to remember, as JSON values; None where experts stay."""
        if not self._active:
            return None
        loads = None if self._load_LE is None else self._load_LE.tolist()
        return {"nodes": self._nodes, "experts": self.placements, "loads": loads}

    @torch.no_grad()
    def restore(self, saved: dict[str, Any] | None) -> None:
        """Brings the experts of a loaded state where they were when it was saved; `Engine.loaded` has to follow.

        In another layout experts stay in order until the next look.
        """
        if saved is None or not self._active:
            return
        placements = [tuple(tuple(rank) for rank in placement) for placement in saved["experts"]]
        same = saved["nodes"] == self._nodes and all(len(placement) == self.groups.mesh.ep for placement in placements)
        if not same:
            return
        if saved["loads"] is not None:
            self._load_LE = torch.tensor(saved["loads"], dtype=torch.float64, device=self.groups.place.device)
        self._move(placements)


def _busiest(loads: list[list[float]], placements: list[Placement]) -> float:
    """Load of the busiest rank over the mean, mean over layers."""
    worst = [max(of_ranks) * len(of_ranks) / max(1, sum(of_ranks)) for of_ranks in map(rank_loads, loads, placements)]
    return sum(worst) / len(worst)


def _changed(before: Placement, after: Placement) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))


# -- moving -----------------------------------------------------------------------------------------------------------


def redistribute(before: Shards, after: Shards, mailbox: Mailbox, peers: Peers) -> int:
    """Fills `after` with what the ranks of `peers` held as `before`; the bytes that this rank sent.

    Both name ranges of the same live storage. Every element has one owner before and one after. Tensors go one after
    the other, so that buffers hold what moves of one tensor only.
    """
    changing = {name: (_ranges(before[name]), _ranges(after[name])) for name in before}
    changing = {name: (old, new) for name, (old, new) in changing.items() if old != new}
    everyone: list[Any] = [None] * peers.size
    with peers.trace.waiting():
        dist.all_gather_object(everyone, changing, group=peers.group)
    nothing: tuple[Ranges, Ranges] = ([], [])
    sent_bytes = 0
    for name in sorted({name for of_rank in everyone for name in of_rank}):
        layouts = [of_rank.get(name, nothing) for of_rank in everyone]
        sent_bytes += _redistribute_tensor(before.get(name), layouts, mailbox, peers)
    return sent_bytes


def _ranges(shard: FlatShard) -> Ranges:
    position, ranges = 0, []
    for offset, part in shard.ranges():
        ranges.append((offset, part.numel(), position))
        position += part.numel()
    return sorted(ranges)


def _overlaps(old: Ranges, new: Ranges) -> Iterator[tuple[int, int, int]]:
    """(position among the old, position among the new, length) of all that both hold, by offset."""
    a = b = 0
    while a < len(old) and b < len(new):
        (old_offset, old_length, old_position), (new_offset, new_length, new_position) = old[a], new[b]
        begin = max(old_offset, new_offset)
        end = min(old_offset + old_length, new_offset + new_length)
        if begin < end:
            yield old_position + begin - old_offset, new_position + begin - new_offset, end - begin
        if old_offset + old_length <= new_offset + new_length:
            a += 1
        else:
            b += 1


def _redistribute_tensor(
    shard: FlatShard | None, layouts: list[tuple[Ranges, Ranges]], mailbox: Mailbox, peers: Peers
) -> int:
    """One tensor; `shard` is this rank's storage, None if it has none."""
    own_old, own_new = layouts[peers.index]
    leaving = [list(_overlaps(own_old, new)) for _, new in layouts]
    coming = [list(_overlaps(old, own_new)) for old, _ in layouts]
    item_bytes = shard.local.itemsize if shard is not None else 0
    transfer = peers.trace.begin("placement", peers.name)
    exchange = mailbox.open(transfer, [_length(pieces) * item_bytes for pieces in coming])
    messages = exchange.outgoing([_length(pieces) * item_bytes for pieces in leaving])
    for message, pieces in zip(messages, leaving, strict=True):
        if shard is not None and pieces:
            _copy(shard.local, message.view(shard.local.dtype), [(old, n) for old, _, n in pieces], out=True)
    exchange.send()
    with peers.trace.waiting(transfer):
        arrived = exchange.wait()
    for message, pieces in zip(arrived, coming, strict=True):
        if shard is not None and pieces:
            _copy(shard.local, message.view(shard.local.dtype), [(new, n) for _, new, n in pieces], out=False)
    exchange.close()
    peers.trace.end(transfer)
    return sum(transfer.sent_bytes.values())


def _length(pieces: list[tuple[int, int, int]]) -> int:
    return sum(length for _, _, length in pieces)


def _copy(local: Tensor, message: Tensor, places: list[tuple[int, int]], *, out: bool) -> None:
    """Between places (position, length) of the storage and a message in which they follow one another."""
    begin = 0
    for position, length in places:
        here, there = local[position : position + length], message[begin : begin + length]
        if out:
            there.copy_(here)
        else:
            here.copy_(there)
        begin += length
