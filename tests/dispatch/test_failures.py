"""A peer that dies or stalls in the middle of a transfer: the others say who, where and in what, in time."""

import os
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dstrain.comm.collectives import Peers
from dstrain.comm.trace import Trace
from dstrain.dispatch.rank import RankDispatcher
from dstrain.errors import PeerError
from tests.dispatch.cases import EXPERTS, balanced, route_of, tokens
from tests.gloo.spawn import spawn

# A busy machine adds less than two time-outs, so that three in a row are too long.
TIMEOUT_S, BUSY_S = 5, 9
LOST = 1


def vanish(how: str) -> None:
    if how == "stalls":
        time.sleep(60)
    os._exit(1)


def lose_a_peer(rank: int, world: int, how: str, where: str) -> tuple[str, float, float]:
    """One rank leaves before its share of a transfer; what the others get, and how long that takes them, once and for
    whatever they try after it."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    trace = Trace(torch.device("cpu"))
    dispatcher = RankDispatcher(EXPERTS, Peers(group, trace, "ep"))
    x_TD, route = tokens(6, rank, torch.float32), route_of(balanced(rank), rank)

    def leave(place: str) -> float:
        if rank == LOST and where == place:
            time.sleep(0.5)
            vanish(how)
        return time.perf_counter()

    try:
        with trace.at(block=2, micro_batch=4):
            began_s = leave("dispatch, layer 2, micro-batch 4, forward")
            outbound = dispatcher.dispatch(x_TD, route)
            # Another one behind it fails at once.
            dispatcher.dispatch(x_TD, route)
            arrived = outbound.wait()
            began_s = leave("combine, layer 2, micro-batch 4, forward")
            y_TD = dispatcher.combine(arrived.rows_RD, arrived.ticket).wait()
        began_s = leave("combine, layer 2, micro-batch 4, backward")
        y_TD.sum().backward()
    except PeerError as error:
        took_s = time.perf_counter() - began_s
        again_s = time.perf_counter()
        with pytest.raises(PeerError, match=re.escape(str(error))):
            dispatcher.dispatch(x_TD, route).wait()
        again_s = time.perf_counter() - again_s
        dist.destroy_process_group()
        return str(error), took_s, again_s
    raise AssertionError("nobody missed the peer")


@pytest.mark.parametrize("how", ["dies", "stalls"])
@pytest.mark.parametrize("where", ["dispatch, {}, forward", "combine, {}, forward", "combine, {}, backward"])
def test_a_lost_peer_is_named_with_what_it_was_needed_for(how: str, where: str):
    where = where.format("layer 2, micro-batch 4")
    found = spawn(lose_a_peer, 4, how, where, victims=[LOST])
    for rank in (0, 2, 3):
        message, took_s, again_s = found[rank]
        assert f"rank {LOST} (group ep)" in message
        assert f"in {where}" in message
        assert ("is gone" in message) == (how == "dies")
        assert ("did not answer" in message) == (how == "stalls")
        # A connection that breaks is noticed at once, silence after one time-out; what follows waits for nothing more.
        assert took_s < (TIMEOUT_S if how == "stalls" else 0) + BUSY_S
        assert again_s < TIMEOUT_S
