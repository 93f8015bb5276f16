"""The account of one rank: totals since the last time they were taken."""

import time

import torch

from dstrain.comm.trace import CommTotals, Trace


def test_bytes_add_up_by_kind():
    trace = Trace(torch.device("cpu"))
    for kind, num_bytes in (("dispatch", 100), ("grad", 7), ("dispatch", 20)):
        trace.sent(kind, num_bytes)
    assert trace.take().sent_bytes == {"dispatch": 120, "grad": 7}


def test_only_waiting_is_exposed():
    trace = Trace(torch.device("cpu"))
    time.sleep(0.05)
    for _ in range(2):
        with trace.waiting():
            time.sleep(0.02)
    time.sleep(0.05)
    assert 40 <= trace.take().exposed_ms < 90


def test_take_starts_afresh():
    trace = Trace(torch.device("cpu"))
    trace.sent("grad", 1)
    with trace.waiting():
        time.sleep(0.001)
    trace.take()
    assert trace.take() == CommTotals(0.0, {})
