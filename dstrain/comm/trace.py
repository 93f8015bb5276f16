"""What communication cost: every transfer with its bytes by link, its time, and how long compute stood still for it.

Every transfer reports here, from whatever thread carries it; the metrics take the account once a step. Exposed time is
the time that the caller of `wait` lost, not the time that the transfer took: a transfer that finished under other work
costs nothing.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dstrain.mesh.topology import Link


@dataclass(frozen=True)
class Label:
    """Whose work it is: what a timeline shows and an error names. None where it does not apply."""

    # Number of the MoE block: layers first, MTP modules after them.
    block: int | None = None
    micro_batch: int | None = None
    # forward | backward | weight
    direction: str | None = None

    def __str__(self) -> str:
        parts = (("layer", self.block), ("micro-batch", self.micro_batch), ("", self.direction))
        return ", ".join(f"{name} {value}".strip() for name, value in parts if value is not None)


@dataclass
class Transfer:
    """One transfer of this rank with all peers of a group; times are seconds of time.perf_counter."""

    kind: str
    group: str
    label: Label
    start_s: float
    end_s: float | None = None
    waited_s: float = 0.0
    # Bytes that this rank sent.
    sent_bytes: dict[Link, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """A stretch of compute, kept for timelines."""

    name: str
    label: Label
    start_s: float
    end_s: float


@dataclass(frozen=True)
class CommTotals:
    """Since the last `take`."""

    # Time that compute stood still for the network.
    exposed_ms: float
    # Time in which at least one transfer was under way.
    busy_ms: float
    # Bytes that this rank sent to other ranks, by kind ("dispatch", "combine", "grad", "param", ...) and by link.
    sent_bytes: dict[str, int]
    link_bytes: dict[Link, int]
    transfers: list[Transfer]
    # Empty unless `Trace.keeps_spans`.
    spans: list[Span]

    @property
    def hidden_share(self) -> float | None:
        """Of the time in which something travelled, the share that compute did not wait for."""
        return max(0.0, 1 - self.exposed_ms / self.busy_ms) if self.busy_ms else None


class Trace:
    """A rank's account of its communication. `label` is copied into every transfer that starts."""

    def __init__(self, device: torch.device):
        self.device = device
        self.label = Label()
        self.keeps_spans = False
        self._lock = threading.Lock()
        self._waited_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._sent_bytes: Counter[str] = Counter()
        self._link_bytes: Counter[Link] = Counter()
        self._transfers: list[Transfer] = []
        self._spans: list[Span] = []

    @contextmanager
    def at(self, **fields: Any) -> Iterator[None]:
        """Work inside carries these fields of the label."""
        before, self.label = self.label, replace(self.label, **fields)
        try:
            yield
        finally:
            self.label = before

    def begin(self, kind: str, group: str) -> Transfer:
        transfer = Transfer(kind, group, self.label, time.perf_counter())
        with self._lock:
            self._transfers.append(transfer)
        return transfer

    def sent(self, transfer: Transfer, link: Link, num_bytes: int) -> None:
        """Bytes that this rank sends over a link; what stays on the rank is no traffic."""
        if link is not Link.SELF and num_bytes:
            with self._lock:
                transfer.sent_bytes[link] = transfer.sent_bytes.get(link, 0) + num_bytes
                self._sent_bytes[transfer.kind] += num_bytes
                self._link_bytes[link] += num_bytes

    def end(self, transfer: Transfer) -> None:
        """All of it has arrived, here and elsewhere as far as this rank knows."""
        transfer.end_s = time.perf_counter()

    @contextmanager
    def waiting(self, transfer: Transfer | None = None) -> Iterator[None]:
        """Around every wait of compute: wall time on a CPU; on a GPU, where the host doesn't block, time on the
        current stream."""
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            waited_s = time.perf_counter() - began
            self._waited_s += waited_s
            if transfer is not None:
                transfer.waited_s += waited_s

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Around a stretch of compute that a timeline should show."""
        if not self.keeps_spans:
            yield
            return
        began = time.perf_counter()
        yield
        self._spans.append(Span(name, self.label, began, time.perf_counter()))

    def take(self) -> CommTotals:
        """The account, and a fresh start. On a GPU the events must have happened: call it after a synchronisation."""
        with self._lock:
            transfers, self._transfers = self._transfers, []
            sent_bytes, self._sent_bytes = self._sent_bytes, Counter()
            link_bytes, self._link_bytes = self._link_bytes, Counter()
        stalled_ms = sum(start.elapsed_time(end) for start, end in self._events)
        exposed_ms = self._waited_s * 1e3 + stalled_ms
        spans, self._spans, self._waited_s, self._events = self._spans, [], 0.0, []
        busy_ms = _union_s(transfers) * 1e3
        return CommTotals(exposed_ms, busy_ms, dict(sent_bytes), dict(link_bytes), transfers, spans)


def _union_s(transfers: list[Transfer]) -> float:
    """Length of the union of the transfers' intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((t.start_s, t.end_s) for t in transfers if t.end_s is not None):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
