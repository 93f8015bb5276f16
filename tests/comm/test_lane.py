"""Work beside the main thread: order, overlap of stages, errors, and an end."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from dstrain.comm.lane import Lane
from dstrain.comm.trace import Trace


@pytest.fixture
def trace() -> Trace:
    return Trace(torch.device("cpu"))


@pytest.fixture
def lane(trace: Trace) -> Lane:
    return Lane(trace)


def test_a_stage_takes_what_the_one_before_it_returned(lane: Lane):
    flight = lane.submit([lambda nothing: (nothing, 2), lambda pair: (*pair, 3)])
    assert flight.wait() == (None, 2, 3)


def test_stages_run_in_the_order_of_flights_each_in_its_own_thread(lane: Lane):
    log: list[tuple[int, int, str]] = []

    def stage(flight: int, position: int):
        def run(_: object) -> None:
            time.sleep(0.002 * ((flight * 7 + position * 3) % 4))
            log.append((position, flight, threading.current_thread().name))

        return run

    flights = [lane.submit([stage(n, position) for position in range(3)]) for n in range(12)]
    for flight in flights:
        flight.wait()
    for position in range(3):
        here = [(flight, thread) for at, flight, thread in log if at == position]
        assert [flight for flight, _ in here] == list(range(12))
        assert len({thread for _, thread in here}) == 1
    assert len({thread for _, _, thread in log}) == 3


def test_a_flight_enters_while_the_one_before_it_is_under_way(lane: Lane):
    second_has_begun = threading.Event()
    first = lane.submit([lambda _: None, lambda _: second_has_begun.wait(20)])
    lane.submit([lambda _: second_has_begun.set(), lambda _: None])
    assert first.wait() is True


def test_submit_waits_for_room(trace: Trace):
    lane, go_on = Lane(trace, depth=2), threading.Event()
    entered: list[int] = []

    def submit_three() -> None:
        for number in range(3):
            lane.submit([lambda _: go_on.wait(20)])
            entered.append(number)

    thread = threading.Thread(target=submit_three)
    thread.start()
    thread.join(0.2)
    assert entered == [0, 1]
    go_on.set()
    thread.join(20)
    assert entered == [0, 1, 2]


def test_nobody_waits_for_the_cleanup(lane: Lane, trace: Trace):
    over, transfer = threading.Event(), trace.begin("dispatch", "ep")
    flight = lane.submit([lambda _: "result"], transfer, cleanup=lambda result: over.wait(20) and result)
    assert flight.wait() == "result"
    assert transfer.end_s is None
    over.set()
    # A cleanup has the second thread to itself: a later one comes after it.
    lane.submit([lambda _: None, lambda _: None]).wait()
    assert transfer.end_s is not None


def test_only_waiting_counts_as_exposed(lane: Lane, trace: Trace):
    hidden, awaited = trace.begin("dispatch", "ep"), trace.begin("combine", "ep")
    flight = lane.submit([lambda _: time.sleep(0.05)], hidden)
    time.sleep(0.2)
    flight.wait()
    lane.submit([lambda _: time.sleep(0.2)], awaited).wait()
    assert hidden.waited_s < 0.1 < awaited.waited_s


def test_an_error_ends_its_flight_and_all_later_ones(lane: Lane):
    go_on = threading.Event()

    def fail(_: object) -> None:
        go_on.wait(20)
        raise ValueError("lost")

    before = lane.submit([lambda _: 1, lambda _: 2])
    assert before.wait() == 2
    failing = lane.submit([lambda _: None, fail])
    behind = lane.submit([lambda _: None, lambda _: None])
    go_on.set()
    for flight in (failing, behind):
        with pytest.raises(ValueError, match="lost"):
            flight.wait()
    with pytest.raises(ValueError, match="lost"):
        lane.submit([lambda _: None]).wait()


def test_an_error_frees_the_room(trace: Trace):
    lane = Lane(trace, depth=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            lane.submit([lambda _: 1 // 0]).wait()


def test_an_error_in_a_cleanup_meets_the_next_flight(lane: Lane):
    assert lane.submit([lambda _: 1], cleanup=lambda _: 1 // 0).wait() == 1
    with pytest.raises(ZeroDivisionError):
        # Whether it has failed by now or fails on the way.
        lane.submit([lambda _: None, lambda _: time.sleep(0.2), lambda _: None]).wait()


def test_stages_record_no_graph(lane: Lane):
    x = torch.ones(2, requires_grad=True)
    assert not lane.submit([lambda _: x * 2]).wait().requires_grad


def lane_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]


def test_close_ends_the_threads_behind_the_work(trace: Trace):
    before, lane = set(lane_threads()), Lane(trace)
    flight = lane.submit([lambda _: time.sleep(0.1), lambda _: None, lambda _: "done"])
    lane.close()
    assert flight.wait() == "done"
    own = [thread for thread in lane_threads() if thread not in before]
    for thread in own:
        thread.join(20)
    assert not any(thread.is_alive() for thread in own)


def test_a_dropped_lane_ends_its_threads(trace: Trace):
    before, lane = set(lane_threads()), Lane(trace)
    lane.submit([lambda _: None]).wait()
    own, gone = [thread for thread in lane_threads() if thread not in before], weakref.ref(lane)
    assert own
    del lane
    gc.collect()
    assert gone() is None
    for thread in own:
        thread.join(20)
    assert not any(thread.is_alive() for thread in own)


STUCK = """
import threading, torch
from dstrain.comm.lane import Lane
from dstrain.comm.trace import Trace
lane = Lane(Trace(torch.device("cpu")))
lane.submit([lambda _: threading.Event().wait()])
raise SystemExit(3)
"""


def test_a_stuck_thread_does_not_keep_the_process():
    assert subprocess.run([sys.executable, "-c", STUCK], timeout=60).returncode == 3
