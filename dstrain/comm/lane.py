"""Work beside the main thread: a FIFO of flights, each a list of stages; stage i of every flight runs in thread i.

    main thread    submit a, submit b, ...compute...                        a.wait()
    thread 0       pack a | pack b
    thread 1              | wait for a ... unpack a | wait for b ...

A flight packs while the one before it is on the wire, and all flights pass every thread in the order of `submit`. A
failed stage fails its flight and all later ones with the same error: what follows a broken transfer cannot succeed.
On CUDA the threads issue into one side stream; the device's own order then holds between stages.
"""

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from dstrain.comm.trace import Trace, Transfer

# Takes what the stage before it returned; the first one takes None.
Stage = Callable[[Any], Any]

# Most flights inside a lane at once; `submit` waits for room, so that buffers stay bounded.
DEPTH = 8
# At exit, time for threads to come back from transfers that fail: one that wakes up in a half-ended interpreter aborts
# the process, and with it the exit status. Those still waiting then end with the process.
EXIT_S = 3.0


class Flight:
    """A submitted piece of work."""

    def __init__(self, trace: Trace, transfer: Transfer | None):
        self.trace, self.transfer = trace, transfer
        self.result: Future[Any] = Future()
        # On CUDA: the results are complete on the device.
        self.arrived: torch.cuda.Event | None = None

    def wait(self) -> Any:
        """The result of the last stage, usable on the current stream; raises what a stage raised."""
        with self.trace.waiting(self.transfer):
            result = self.result.result()
            if self.arrived is not None:
                torch.cuda.current_stream().wait_event(self.arrived)
                for tensor in _tensors(result):
                    tensor.record_stream(torch.cuda.current_stream())
        return result


@dataclass(frozen=True)
class _Item:
    flight: Flight
    stages: Sequence[Stage]
    cleanup: Stage | None
    # On CUDA: what the first stage reads is complete on the device.
    ready: "torch.cuda.Event | None"


@dataclass
class _Shared:
    """What the threads of a lane know; they hold no reference to the lane itself, so that it can be collected."""

    room: threading.Semaphore
    queues: list["SimpleQueue[tuple[_Item, Any] | None]"] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    pending: list[Flight] = field(default_factory=list)
    failure: BaseException | None = None
    stream: Any = None

    def fail(self, error: BaseException) -> None:
        with self.lock:
            self.failure = self.failure or error
            pending, self.pending = self.pending, []
        for flight in pending:
            with contextlib.suppress(InvalidStateError):
                flight.result.set_exception(self.failure)
            self.room.release()

    def leave(self, flight: Flight) -> None:
        with self.lock:
            if flight not in self.pending:
                return
            self.pending.remove(flight)
        self.room.release()

    def queue(self, position: int) -> "SimpleQueue[tuple[_Item, Any] | None]":
        """Of thread `position`, which starts when it is first needed."""
        with self.lock:
            while (number := len(self.queues)) <= position:
                self.queues.append(SimpleQueue())
                # Daemons: a thread that waits for a dead peer must not keep a failed process alive.
                thread = threading.Thread(target=_serve, args=(self, number), name=f"lane-{number}", daemon=True)
                self.threads.append(thread)
                thread.start()
            return self.queues[position]


class Lane:
    """Threads that start with the first flight and end with `close` or when the lane is dropped."""

    def __init__(self, trace: Trace, depth: int = DEPTH):
        """At most `depth` flights are inside at once."""
        self.trace = trace
        self._shared = _Shared(threading.Semaphore(depth))
        if trace.device.type == "cuda":
            self._shared.stream = torch.cuda.Stream(trace.device)
        self._finalizer = weakref.finalize(self, _stop, self._shared)
        _open_lanes.add(self)

    def submit(
        self,
        stages: Sequence[Stage],
        transfer: Transfer | None = None,
        reads: Sequence[Tensor] = (),
        cleanup: Stage | None = None,
    ) -> Flight:
        """Starts the stages; `reads` are the tensors of the current stream that they use.

        `cleanup` runs in a thread of its own after the last stage, with its result: nobody waits for it, and only after
        it the transfer counts as over.
        """
        if not self._finalizer.alive:
            raise RuntimeError("the lane is closed")
        shared, flight = self._shared, Flight(self.trace, transfer)
        if not shared.room.acquire(blocking=False):
            with self.trace.waiting(transfer):
                shared.room.acquire()
        with shared.lock:
            failure = shared.failure
            if failure is None:
                shared.pending.append(flight)
        if failure is not None:
            shared.room.release()
            flight.result.set_exception(failure)
            return flight
        shared.queue(0).put((_Item(flight, stages, cleanup, self._after(reads)), None))
        return flight

    def _after(self, reads: Sequence[Tensor]) -> "torch.cuda.Event | None":
        """On CUDA, an event after everything issued so far; the side stream will be using `reads`."""
        if self._shared.stream is None:
            return None
        for tensor in reads:
            tensor.record_stream(self._shared.stream)
        return torch.cuda.current_stream().record_event()

    def close(self, wait_s: float = 0.0) -> None:
        """Ends the threads once they have done what was submitted, and waits that long for them to end."""
        self._finalizer()
        deadline = time.monotonic() + wait_s
        for thread in self._shared.threads:
            thread.join(max(0.0, deadline - time.monotonic()))


_open_lanes: "weakref.WeakSet[Lane]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for lane in list(_open_lanes):
        lane.close(EXIT_S)


def _stop(shared: _Shared, position: int = 0) -> None:
    """Ends a thread, which ends the next one once it has handed over all it had."""
    if position < len(shared.queues):
        shared.queues[position].put(None)


def _serve(shared: _Shared, position: int) -> None:
    """Thread `position` of a lane."""
    queue = shared.queue(position)
    stream = torch.cuda.stream(shared.stream) if shared.stream is not None else contextlib.nullcontext()
    with torch.no_grad(), stream:
        while (entry := queue.get()) is not None:
            item, value = entry
            if shared.failure is None:
                try:
                    _advance(shared, item, position, value)
                except BaseException as error:
                    shared.fail(error)
            del entry, item, value
    _stop(shared, position + 1)


def _advance(shared: _Shared, item: _Item, position: int, value: Any) -> None:
    """Runs one stage and hands its result on."""
    flight, last = item.flight, len(item.stages) - 1
    if position <= last:
        if position == 0 and item.ready is not None:
            torch.cuda.current_stream().wait_event(item.ready)
        value = item.stages[position](value)
        if position == last:
            if shared.stream is not None:
                flight.arrived = shared.stream.record_event()
            with contextlib.suppress(InvalidStateError):
                flight.result.set_result(value)
        if position < last or item.cleanup is not None:
            shared.queue(position + 1).put((item, value))
            return
    elif item.cleanup is not None:
        item.cleanup(value)
    if flight.transfer is not None:
        flight.trace.end(flight.transfer)
    shared.leave(flight)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a result: a tensor, or tuples of them."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple) else []
