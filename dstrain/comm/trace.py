"""What communication cost: every transfer with its bytes by link, its time, and how long compute stood still for it.

Every transfer reports here, from whatever thread carries it; the metrics take the account once a step. Exposed time is
the time that the caller of `wait` lost, not the time that the transfer took: a transfer that finished under other work
costs nothing.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dstrain.mesh.topology import Link

# The kind of what stages of a pipeline send each other. Who waits for that waits for compute elsewhere, not for the
# network: it is the pipeline's bubble.
STAGES = "pipe"

# The beginning and the end of something on the device.
Events = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True)
class Label:
    """Whose work it is: what a timeline shows and an error names. None where it does not apply."""

    # Number of the MoE block in the model: layers first, MTP modules after them.
    block: int | None = None
    micro_batch: int | None = None
    # forward | backward | weight
    direction: str | None = None
    # The optimiser step that is being made, counted from 1.
    step: int | None = None
    # Of a pipeline.
    stage: int | None = None

    def __str__(self) -> str:
        parts: tuple[tuple[str, object], ...] = (("stage", self.stage), ("layer", self.block))
        parts += (("micro-batch", self.micro_batch), ("", self.direction), ("step", self.step))
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
    """A stretch of the main thread's time, kept for timelines: compute, or "wait" and what for."""

    name: str
    label: Label
    start_s: float
    end_s: float


@dataclass(frozen=True)
class CommTotals:
    """Since the last `take`."""

    # Time that compute stood still for the network; of other stages' compute, see `stages_ms`.
    exposed_ms: float
    # Time in which at least one transfer was under way, those between stages apart.
    busy_ms: float
    # Bytes that this rank sent to other ranks, by kind ("dispatch", "combine", "grad", "param", ...) and by link.
    sent_bytes: dict[str, int]
    link_bytes: dict[Link, int]
    # Those that were under way; one without an end still is, and will be in the next account as well.
    transfers: list[Transfer]
    # Empty unless `Trace.keeps_spans`.
    spans: list[Span]
    # The time that this is the account of.
    start_s: float = 0.0
    end_s: float = 0.0
    # The time that compute stood still, by what was waited for.
    waited_ms: dict[str, float] = field(default_factory=dict)

    @property
    def stages_ms(self) -> float:
        """Time that compute stood still for other stages of the pipeline."""
        return self.waited_ms.get(STAGES, 0.0)

    @property
    def hidden_share(self) -> float | None:
        """Of the time in which something travelled, the share that compute did not wait for."""
        return max(0.0, 1 - self.exposed_ms / self.busy_ms) if self.busy_ms else None


class Trace:
    """A rank's account of its communication. `label` is copied into every transfer that starts.

    On a GPU the host runs ahead of the device, so waits and spans are timed by events on the current stream.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.label = Label()
        self.keeps_spans = False
        self._lock = threading.Lock()
        self._began_s = time.perf_counter()
        self._waited_ms: defaultdict[str, float] = defaultdict(float)
        self._sent_bytes: Counter[str] = Counter()
        self._link_bytes: Counter[Link] = Counter()
        self._transfers: list[Transfer] = []
        self._spans: list[Span] = []
        # On a GPU, what has yet to be read off: the events of waits with their kind, those of spans with their name.
        self._waits: list[tuple[str, Label, Events]] = []
        self._span_events: list[tuple[str, Label, Events]] = []

    @contextmanager
    def at(self, **fields: Any) -> Iterator[None]:
        """Work inside carries these fields of the label."""
        before, self.label = self.label, replace(self.label, **fields)
        try:
            yield
        finally:
            self.label = before

    def begin(self, kind: str, group: str, label: Label | None = None) -> Transfer:
        """`label`: that of the present work, unless it belongs to other work."""
        transfer = Transfer(kind, group, label or self.label, time.perf_counter())
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
    def waiting(self, transfer: Transfer | None = None, kind: str | None = None) -> Iterator[None]:
        """Around every wait of compute, which is timed by the clock on a CPU, and on a GPU on the current stream.
        `kind`: what is really waited for, if it is not the transfer."""
        kind, on_gpu = kind or (transfer.kind if transfer else "other"), self.device.type == "cuda"
        began = time.perf_counter()
        with self._events(self._waits, kind) if on_gpu else nullcontext():
            yield
        ended = time.perf_counter()
        if transfer is not None:
            transfer.waited_s += ended - began
        if on_gpu:
            return
        self._waited_ms[kind] += (ended - began) * 1e3
        if self.keeps_spans:
            self._spans.append(Span(f"wait {kind}", self.label, began, ended))

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Around a stretch of compute that a timeline should show."""
        if not self.keeps_spans:
            yield
        elif self.device.type == "cuda":
            with self._events(self._span_events, name):
                yield
        else:
            began = time.perf_counter()
            yield
            self._spans.append(Span(name, self.label, began, time.perf_counter()))

    @contextmanager
    def _events(self, keep: list[tuple[str, Label, Events]], name: str) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        keep.append((name, self.label, (start, end)))

    def waited_ms(self) -> dict[str, float]:
        """By kind, since the last `take`. On a GPU the events must have happened: call it after a synchronisation."""
        waited_ms = self._waited_ms.copy()
        for kind, _, (start, end) in self._waits:
            waited_ms[kind] += start.elapsed_time(end)
        return dict(waited_ms)

    def take(self) -> CommTotals:
        """The account, and a fresh start. On a GPU, call it after a synchronisation."""
        now, waited_ms = time.perf_counter(), self.waited_ms()
        with self._lock:
            transfers, self._transfers = self._transfers, [t for t in self._transfers if t.end_s is None]
            sent_bytes, self._sent_bytes = self._sent_bytes, Counter()
            link_bytes, self._link_bytes = self._link_bytes, Counter()
        if self.keeps_spans:
            self._span_events += [(f"wait {kind}", label, events) for kind, label, events in self._waits]
        spans, self._spans = [*self._spans, *_read_off(self._span_events)], []
        began, self._began_s = self._began_s, now
        self._waited_ms, self._waits, self._span_events = defaultdict(float), [], []
        return CommTotals(
            exposed(waited_ms),
            sum(end - start for start, end in busy((t for t in transfers if t.kind != STAGES), began, now)) * 1e3,
            dict(sent_bytes),
            dict(link_bytes),
            transfers,
            spans,
            began,
            now,
            waited_ms,
        )


def exposed(waited_ms: Mapping[str, float]) -> float:
    """Of waits by kind, those for the network."""
    return sum(waited for kind, waited in waited_ms.items() if kind != STAGES)


def _read_off(span_events: list[tuple[str, Label, Events]]) -> Iterator[Span]:
    """Spans on the host's clock, which is read at a moment when the device has just reached an event."""
    if not span_events:
        return
    here = torch.cuda.Event(enable_timing=True)
    here.record()
    here.synchronize()
    now = time.perf_counter()
    for name, label, (start, end) in span_events:
        yield Span(name, label, now - start.elapsed_time(here) / 1e3, now - end.elapsed_time(here) / 1e3)


def busy(transfers: Iterable[Transfer], start_s: float, end_s: float) -> list[tuple[float, float]]:
    """The stretches of [start_s, end_s] in which at least one of the transfers was under way, in order."""
    stretches: list[tuple[float, float]] = []
    for start, end in sorted((t.start_s, end_s if t.end_s is None else t.end_s) for t in transfers):
        start, end = max(start, start_s), min(end, end_s)
        if stretches and start <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(stretches[-1][1], end))
        elif start < end:
            stretches.append((start, end))
    return stretches
