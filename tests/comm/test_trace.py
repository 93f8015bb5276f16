"""The account of one rank: transfers, their bytes by kind and link, and the time that compute lost to them."""

import threading
import time

import torch

from dstrain.comm.trace import CommTotals, Label, Trace, Transfer, busy
from dstrain.mesh.topology import Link


def trace_of_cpu() -> Trace:
    return Trace(torch.device("cpu"))


def test_bytes_add_up_by_kind_and_by_link():
    trace = trace_of_cpu()
    dispatch, grad = trace.begin("dispatch", "ep"), trace.begin("grad", "data")
    trace.sent(dispatch, Link.NODE, 100)
    trace.sent(grad, Link.NETWORK, 7)
    trace.sent(dispatch, Link.NETWORK, 20)
    trace.sent(dispatch, Link.SELF, 10**6)
    totals = trace.take()
    assert totals.sent_bytes == {"dispatch": 120, "grad": 7}
    assert totals.link_bytes == {Link.NODE: 100, Link.NETWORK: 27}
    assert [x.sent_bytes for x in totals.transfers] == [{Link.NODE: 100, Link.NETWORK: 20}, {Link.NETWORK: 7}]


def test_only_waiting_is_exposed():
    trace = trace_of_cpu()
    transfer = trace.begin("dispatch", "ep")
    time.sleep(0.05)
    for _ in range(2):
        with trace.waiting(transfer):
            time.sleep(0.02)
    time.sleep(0.05)
    totals = trace.take()
    assert 40 <= totals.exposed_ms < 90
    assert totals.waited_ms == {"dispatch": totals.exposed_ms}
    assert 0.04 <= transfer.waited_s < 0.09


def test_time_in_which_several_things_travel_is_busy_once():
    intervals = [(5.0, 6.0), (1.0, 2.0), (1.5, 3.0), (5.5, 5.75), (8.0, 9.5), (11.0, 12.0)]
    transfers = [Transfer("dispatch", "ep", Label(), start, end) for start, end in intervals]
    assert busy(transfers, 1.25, 9.0) == [(1.25, 3.0), (5.0, 6.0), (8.0, 9.0)]
    assert busy([Transfer("grad", "data", Label(), 4.0)], 3.0, 5.0) == [(4.0, 5.0)]


def test_hidden_is_what_was_busy_and_not_waited_for():
    assert CommTotals(250.0, 1000.0, {}, {}, [], []).hidden_share == 0.75
    assert CommTotals(1100.0, 1000.0, {}, {}, [], []).hidden_share == 0.0
    assert CommTotals(0.0, 0.0, {}, {}, [], []).hidden_share is None


def test_a_transfer_under_way_is_busy_in_both_steps():
    trace = trace_of_cpu()
    transfer = trace.begin("param", "data")
    time.sleep(0.02)
    first = trace.take()
    assert 20 <= first.busy_ms < 100
    time.sleep(0.02)
    trace.end(transfer)
    time.sleep(0.1)
    second = trace.take()
    assert 20 <= second.busy_ms < 100
    assert first.transfers == second.transfers == [transfer]
    assert first.end_s == second.start_s
    assert trace.take().transfers == []


def test_labels_nest_and_are_copied_when_a_transfer_starts():
    trace = trace_of_cpu()
    with trace.at(step=7, block=3):
        with trace.at(micro_batch=1, direction="forward"):
            transfer = trace.begin("dispatch", "ep")
        assert trace.label == Label(block=3, step=7)
    assert trace.label == Label()
    assert transfer.label == Label(block=3, micro_batch=1, direction="forward", step=7)
    assert str(transfer.label) == "layer 3, micro-batch 1, forward, step 7"


def test_spans_are_kept_on_request():
    trace = trace_of_cpu()
    with trace.computing("attend"):
        pass
    trace.keeps_spans = True
    with trace.at(block=2), trace.computing("experts"):
        time.sleep(0.01)
    with trace.waiting(trace.begin("combine", "ep")):
        pass
    compute, wait = trace.take().spans
    assert (compute.name, compute.label.block, wait.name) == ("experts", 2, "wait combine")
    assert compute.end_s - compute.start_s >= 0.01
    assert wait.start_s >= compute.end_s
    assert trace.take().spans == []


def test_threads_report_to_one_account():
    trace = trace_of_cpu()

    def carry() -> None:
        for _ in range(1000):
            transfer = trace.begin("dispatch", "ep")
            trace.sent(transfer, Link.NODE, 3)
            trace.end(transfer)

    threads = [threading.Thread(target=carry) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    totals = trace.take()
    assert totals.sent_bytes == {"dispatch": 12000}
    assert len(totals.transfers) == 4000


def test_take_starts_afresh():
    trace = trace_of_cpu()
    transfer = trace.begin("grad", "data")
    trace.sent(transfer, Link.NODE, 1)
    trace.end(transfer)
    with trace.waiting():
        time.sleep(0.001)
    first = trace.take()
    assert first.exposed_ms >= 1
    second = trace.take()
    assert second == CommTotals(0.0, 0.0, {}, {}, [], [], first.end_s, second.end_s)
