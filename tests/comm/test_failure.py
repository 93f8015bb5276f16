"""Who is to blame: pure reasoning, then real ranks that die or stop."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dstrain.comm.collectives import Peers, all_reduce_sum
from dstrain.comm.failure import causes, explain, is_of_transport, names
from dstrain.comm.flat import FlatCollectives
from dstrain.comm.trace import Trace
from dstrain.errors import PeerError
from tests.gloo.spawn import spawn


@pytest.mark.parametrize(
    ("suspects_of", "found"),
    [
        ({0: [3]}, [3]),
        # 0 waited for 1, which waited for 3.
        ({0: [1], 1: [3]}, [3]),
        # Who waited for a single rank knows more than who waited for all.
        ({0: [1, 2, 3], 1: [3]}, [3]),
        ({0: [1, 2, 3], 1: [0, 2, 3]}, [2, 3]),
        ({0: [1], 1: [0]}, []),
        # 1 and 2 waited for each other, and for the rest of a group.
        ({0: [1], 1: [2], 2: [0, 1, 3]}, [3]),
    ],
)
def test_the_cause_is_who_is_suspected_and_silent(suspects_of: dict[int, list[int]], found: list[int]):
    assert causes(suspects_of) == found


def test_names():
    assert names([4]) == "rank 4"
    assert names([1, 2]) == "ranks 1, 2"
    assert names(range(11)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


def test_other_errors_are_not_those_of_the_transport():
    assert not is_of_transport(RuntimeError("shapes [2] and [3] do not match"))
    assert is_of_transport(RuntimeError("[../gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1"))
    assert is_of_transport(dist.DistBackendError("NCCL error"))


def chain(rank: int, world: int, how: int) -> str | None:
    """Rank 3 goes. 2 reduces with it, 1 with 2 and so on: what each says."""
    trace = Trace(torch.device("cpu"))
    pairs = [dist.new_group([r, r + 1], timeout=timedelta(seconds=2)) for r in range(world - 1)]
    dist.barrier()
    if rank == 3:
        # The others have left the barrier, too.
        time.sleep(0.5)
        os.kill(os.getpid(), how)
    message = None
    for first in (rank, rank - 1):
        if 0 <= first < world - 1 and message is None:
            peers = Peers(pairs[first], trace, "pair", (first, first + 1))
            try:
                with trace.at(step=7):
                    all_reduce_sum(torch.ones(4), peers)
            except PeerError as error:
                message = str(explain(error, rank))
    dist.destroy_process_group()
    return message


@pytest.mark.parametrize(
    ("how", "sign"),
    [
        (signal.SIGKILL, "is gone: the connection broke in reduce, step 7 after"),
        (signal.SIGSTOP, "did not answer in reduce, step 7 after 2."),
    ],
)
def test_ranks_that_fail_through_others_name_the_first(how: int, sign: str):
    first, second, third, _ = spawn(chain, 4, int(how), victims=[3])
    assert third.startswith(f"rank 2: rank 3 (group pair) {sign}")
    assert "The first to fail" not in third
    for message in (first, second):
        assert message.endswith("The first to fail: rank 3. Others waited for it and heard nothing.")


def reduce_without(rank: int, world: int) -> str:
    peers = Peers(dist.group.WORLD, Trace(torch.device("cpu")), "data")
    flat = FlatCollectives(peers.trace)
    dist.barrier()
    if rank == 1:
        # The other one has left the barrier, too.
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    with peers.trace.at(step=3), pytest.raises(PeerError) as raised:
        flat.reduce_scatter(torch.ones(32), peers, torch.float32, "grad").wait()
    dist.destroy_process_group()
    return str(raised.value)


def test_a_sum_names_the_rank_that_is_missing():
    message, _ = spawn(reduce_without, 2, victims=[1])
    assert message.startswith("rank 1 (group data) is gone: the connection broke in grad, step 3 after")
