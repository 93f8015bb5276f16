"""What communication cost: bytes sent by kind, and the time that compute stood still for it.

Every transfer reports here; the metrics take the totals once a step. Exposed time is the time that the caller of `wait`
lost, not the time that the transfer took: a transfer that finished under other work costs nothing.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class CommTotals:
    """Since the last `take`."""

    exposed_ms: float
    # Bytes that this rank sent to other ranks, by kind ("dispatch", "combine", "grad", "param", ...).
    sent_bytes: dict[str, int]


@dataclass
class Trace:
    """A rank's account of its communication."""

    device: torch.device
    _waited_s: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _sent_bytes: Counter[str] = field(default_factory=Counter)

    def sent(self, kind: str, num_bytes: int) -> None:
        self._sent_bytes[kind] += num_bytes

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around every wait: wall time on a CPU; on a GPU, where the host doesn't block, time on the current stream."""
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._waited_s += time.perf_counter() - began

    def take(self) -> CommTotals:
        """The totals, and a fresh start. On a GPU the events must have happened: call it after a synchronisation."""
        stalled_ms = sum(start.elapsed_time(end) for start, end in self._events)
        totals = CommTotals(self._waited_s * 1e3 + stalled_ms, dict(self._sent_bytes))
        self._waited_s, self._events, self._sent_bytes = 0.0, [], Counter()
        return totals
