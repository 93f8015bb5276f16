"""One hop: rows to the ranks of a group that hold their experts, or are nearer to them, and what comes back, summed.

A row goes to each rank once, however many of its experts are there (or, with `row_per_pair`, once for each). Its first
way out carries which experts it is meant for and their weights; the plan made for it (`Leg`) serves every later way:

    out    first  rows with their pairs         dispatch
    home          rows, summed where they meet  combine
    out           rows                          gradient of combine
    home          rows, and a number per pair   gradient of dispatch, with that of the weights

A first message out is [rows, pairs | weights | masks | rows], one home [numbers | rows]; a mask has a bit for each
expert of the receiving rank. Rows out are bytes that nobody on the way looks into.

Shapes: S rows here, R rows on the way, N pairs, P ranks of the group, D hidden, B bytes, M bytes of a mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dstrain.comm.lane import Stage
from dstrain.comm.mailbox import Exchange, Mailbox, align
from dstrain.comm.trace import Transfer
from dstrain.dispatch.permute import Bags, Pairs
from dstrain.plan.traffic import COUNTS_BYTES, WEIGHT_BYTES, first_bytes, home_bytes, mask_bytes


def equal_share(experts: int, ranks: int) -> int:
    """The experts of each rank. ValueError if they don't divide."""
    share, rest = divmod(experts, ranks)
    if rest:
        raise ValueError(f"{experts} experts do not divide equally among {ranks} ranks")
    return share


@dataclass
class Leg:
    """How the rows of one micro-batch split up between the ranks of a group."""

    # Row of each row on the way: by rank, then by row.
    row_R: Tensor
    # Pair of each pair on the way: by rank, row and expert.
    pair_N: Tensor
    # Rows on the way, summed into the rows here.
    bags: Bags
    sent_rows: list[int]
    sent_pairs: list[int]
    # Known after the first way out.
    arrived_rows: list[int] = field(default_factory=list)
    arrived_pairs: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Hop:
    """The ranks of a group, each with `experts` experts of its own or behind it."""

    outbound: Mailbox
    homebound: Mailbox
    ranks: int
    experts: int
    row_per_pair: bool = False

    def plan(self, pairs: Pairs) -> tuple[Leg, Tensor, Tensor, Tensor]:
        """The leg, and for its first way the masks, uint8 [R, M], the weights, FP32 [N], and to every rank the numbers
        of its rows and pairs, int32 [P, 2].

        ValueError for a row that names an expert twice: a mask could not say so.
        """
        rows = max(1, pairs.rows)
        rank_N = pairs.expert_N // self.experts
        # (rank, row, expert of the rank) as one number: rank * experts + expert of the rank is the expert.
        key_N = torch.add(pairs.expert_N, rank_N, alpha=(rows - 1) * self.experts)
        key_N, pair_N = key_N.add_(pairs.row_N, alpha=self.experts).sort()
        row_key_N = key_N // self.experts
        first_N = torch.ones_like(key_N, dtype=torch.bool)
        if not self.row_per_pair:
            torch.ne(row_key_N[1:], row_key_N[:-1], out=first_N[1:])
        counts_2P = key_N.new_zeros(2, self.ranks)
        places_2N = (row_key_N // rows).expand(2, -1)
        counts_2P.scatter_add_(1, places_2N, torch.stack((first_N.long(), torch.ones_like(key_N))))
        repeats = (key_N[1:] == key_N[:-1]).sum()
        # The host waits for the device, here alone; it is not the main thread.
        *counts, repeated = torch.cat((counts_2P.flatten(), repeats[None])).tolist()
        if repeated:
            raise ValueError("a token's route names an expert twice; its experts must be distinct")
        sent_rows, sent_pairs = counts[: self.ranks], counts[self.ranks :]
        row_R = row_key_N.index_select(0, torch.nonzero_static(first_N, size=sum(sent_rows))[:, 0]) % rows
        leg = Leg(row_R, pair_N, Bags.by_target(row_R, pairs.rows), sent_rows, sent_pairs)
        masks_RM = self._masks(first_N.cumsum(0) - 1, key_N % self.experts, len(row_R))
        return leg, masks_RM, pairs.weight_N[pair_N], counts_2P.int().t().contiguous()

    def _masks(self, row_N: Tensor, bit_N: Tensor, rows: int) -> Tensor:
        masks = torch.zeros(rows * mask_bytes(self.experts), dtype=torch.uint8, device=row_N.device)
        byte_N = row_N * mask_bytes(self.experts) + (bit_N >> 3)
        masks.scatter_add_(0, byte_N, (1 << (bit_N & 7)).to(torch.uint8))
        return masks.view(rows, mask_bytes(self.experts))


class Crossing(Protocol):
    """One way over one hop; `open` comes first, `close` last."""

    def open(self) -> None: ...

    def send(self, cargo: Any) -> None: ...

    def receive(self) -> Any:
        """The cargo of the other ranks; it shares no memory with buffers."""
        ...

    def close(self) -> None: ...


class _Crossing:
    exchange: Exchange

    def close(self) -> None:
        self.exchange.close()


@dataclass
class FirstOut(_Crossing):
    """(rows, their pairs) out; the leg is appended to `legs`, which ends up in the order of the hops."""

    hop: Hop
    transfer: Transfer
    legs: list[Leg]

    def open(self) -> None:
        self.exchange = self.hop.outbound.open(self.transfer)

    def send(self, cargo: tuple[Tensor, Pairs]) -> None:
        rows_SB, pairs = cargo
        leg, masks_RM, weight_N, counts_P2 = self.hop.plan(pairs)
        self.leg, self.width = leg, rows_SB.shape[1]
        self.legs.append(leg)
        shape = self.hop.experts, self.width
        sizes = [first_bytes(r, n, *shape) for r, n in zip(leg.sent_rows, leg.sent_pairs, strict=True)]
        parts = zip(
            self.exchange.outgoing(sizes),
            counts_P2,
            leg.row_R.split(leg.sent_rows),
            masks_RM.split(leg.sent_rows),
            weight_N.split(leg.sent_pairs),
            strict=True,
        )
        for message, counts_2, row_R, masks, weights in parts:
            _fill(message, [counts_2, weights, masks])
            _gather(rows_SB, row_R, message[len(message) - len(row_R) * self.width :])
        self.exchange.send()

    def receive(self) -> tuple[Tensor, Pairs]:
        messages, rows, masks, weights = self.exchange.wait(), [], [], []
        # On a GPU the host waits for all of them at once.
        counts_P2 = torch.stack([message[:COUNTS_BYTES] for message in messages]).view(torch.int32).tolist()
        for message, (num_rows, num_pairs) in zip(messages, counts_P2, strict=True):
            self.leg.arrived_rows.append(num_rows)
            self.leg.arrived_pairs.append(num_pairs)
            masks_at = COUNTS_BYTES + num_pairs * WEIGHT_BYTES
            masks_end = masks_at + num_rows * mask_bytes(self.hop.experts)
            weights.append(message[COUNTS_BYTES:masks_at].view(torch.float32))
            masks.append(message[masks_at:masks_end].view(num_rows, mask_bytes(self.hop.experts)))
            rows.append(message[align(masks_end) :][: num_rows * self.width].view(num_rows, self.width))
        weight_N = torch.cat(weights)
        row_N, expert_N = _bits(torch.cat(masks), len(weight_N)).unbind(1)
        rows_RB = torch.cat(rows)
        return rows_RB, Pairs(len(rows_RB), row_N, expert_N, weight_N)


@dataclass
class Out(_Crossing):
    """Rows out on a known leg."""

    hop: Hop
    transfer: Transfer
    leg: Leg
    width: int

    def open(self) -> None:
        self.exchange = self.hop.outbound.open(self.transfer, [rows * self.width for rows in self.leg.arrived_rows])

    def send(self, cargo: Tensor) -> None:
        messages = self.exchange.outgoing([rows * self.width for rows in self.leg.sent_rows])
        for message, row_R in zip(messages, self.leg.row_R.split(self.leg.sent_rows), strict=True):
            _gather(cargo, row_R, message)
        self.exchange.send()

    def receive(self) -> Tensor:
        messages = zip(self.exchange.wait(), self.leg.arrived_rows, strict=True)
        return torch.cat([message[: rows * self.width].view(rows, self.width) for message, rows in messages])


@dataclass
class Home(_Crossing):
    """(rows, numbers of their pairs or None) home: rows summed, numbers in the order of the pairs here."""

    hop: Hop
    transfer: Transfer
    leg: Leg
    width: int
    dtype: torch.dtype
    with_numbers: bool

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def _sizes(self, rows: Sequence[int], pairs: Sequence[int]) -> list[int]:
        used = pairs if self.with_numbers else [0] * len(rows)
        return [home_bytes(r, n, self.row_bytes) for r, n in zip(rows, used, strict=True)]

    def open(self) -> None:
        self.exchange = self.hop.homebound.open(self.transfer, self._sizes(self.leg.sent_rows, self.leg.sent_pairs))

    def send(self, cargo: tuple[Tensor, Tensor | None]) -> None:
        rows_RD, number_N = cargo
        leg = self.leg
        messages = self.exchange.outgoing(self._sizes(leg.arrived_rows, leg.arrived_pairs))
        for message, rows in zip(messages, rows_RD.split(leg.arrived_rows), strict=True):
            message[len(message) - len(rows) * self.row_bytes :].view(self.dtype).view_as(rows).copy_(rows)
        if number_N is not None:
            for message, numbers in zip(messages, number_N.split(leg.arrived_pairs), strict=True):
                _fill(message, [numbers])
        self.exchange.send()

    def receive(self) -> tuple[Tensor, Tensor | None]:
        leg, messages = self.leg, self.exchange.wait()
        sizes = self._sizes([0] * self.hop.ranks, leg.sent_pairs)
        rows = [
            message[start:][: rows * self.row_bytes].view(self.dtype).view(rows, self.width)
            for message, start, rows in zip(messages, sizes, leg.sent_rows, strict=True)
        ]
        summed = leg.bags.sum(torch.cat(rows))
        if not self.with_numbers:
            return summed, None
        sent = zip(messages, leg.sent_pairs, strict=True)
        number_N = torch.cat([message[: pairs * WEIGHT_BYTES].view(torch.float32) for message, pairs in sent])
        return summed, torch.empty_like(number_N).scatter_(0, leg.pair_N, number_N)


def _bits(masks_RM: Tensor, number: int) -> Tensor:
    """(row, expert) of each of the `number` bits that are set, int64 [N, 2]."""
    bits = (masks_RM[..., None] >> torch.arange(8, dtype=torch.uint8, device=masks_RM.device)) & 1
    return torch.nonzero_static(bits.flatten(1), size=number)


def _fill(message: Tensor, parts: Sequence[Tensor]) -> None:
    """Writes the bytes of the parts one after the other."""
    num_bytes = sum(part.numel() * part.element_size() for part in parts)
    torch.cat([part.reshape(-1).view(torch.uint8) for part in parts], out=message[:num_bytes])


def _gather(rows_SB: Tensor, row_R: Tensor, out: Tensor) -> None:
    """rows[row_R] as bytes into `out`, eight at a time."""
    wide = rows_SB.view(torch.int64)
    torch.index_select(wide, 0, row_R, out=out.view(torch.int64).view(len(row_R), wide.shape[1]))


def relay(crossings: Sequence[Crossing], load: Callable[[], Any], unload: Callable[[Any], Any]) -> list[Stage]:
    """Stages of a lane that take what `load` returns over all crossings and to `unload`.

    A stage posts the receives of its crossing, then makes its cargo; the next one waits for what arrives.
    """
    if not crossings:
        return [lambda _: unload(load())]
    sources = [load, *(crossing.receive for crossing in crossings[:-1])]
    stages: list[Stage] = [_depart(crossing, source) for crossing, source in zip(crossings, sources, strict=True)]
    return [*stages, lambda _: unload(crossings[-1].receive())]


def _depart(crossing: Crossing, source: Callable[[], Any]) -> Stage:
    def stage(_: Any) -> None:
        crossing.open()
        crossing.send(source())

    return stage
