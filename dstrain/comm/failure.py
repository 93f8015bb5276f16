"""Who is to blame when a transfer breaks: a rank that notices says whom it waited for, and reads what the others say.

A rank that dies or stalls takes others with it: those that wait for it, then those that wait for them. Each writes its
suspects into the store of the launch. Whoever is suspected and has nothing to say is the cause.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from dstrain.comm.trace import Trace, Transfer
from dstrain.errors import PeerError

# How long a rank listens to the others before it leaves; they may notice a little later.
GRACE_S = 3.0
# The store may have died with its rank: then there is nothing to hear.
STORE_TIMEOUT_S = 2.0
KEY = "dstrain/failures"
# More names than anybody reads.
MOST_NAMES = 8


@contextmanager
def naming(who: str, suspects: Sequence[int], transfer: Transfer) -> Iterator[None]:
    """Turns an error of the transport into one that says who was waited for, and in what."""
    began = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        what = ", ".join(filter(None, (transfer.kind, str(transfer.label))))
        raise broken(who, suspects, what, time.perf_counter() - began, str(error)) from error


@contextmanager
def blaming(rank: int, world: int, trace: Trace) -> Iterator[None]:
    """Around a run: a broken transfer, whoever made it, ends with a PeerError that says who was first to go."""
    try:
        yield
    except PeerError as error:
        raise explain(error, rank) from error
    except RuntimeError as error:
        # DeepSpeed's collectives, a checkpoint's, or those of agreement.
        if not is_of_transport(error):
            raise
        others = [other for other in range(world) if other != rank]
        what = ", ".join(filter(None, ("a collective", str(trace.label))))
        raise explain(broken(f"one of {names(others)}", others, what, None, str(error)), rank) from error


def unless_broken(leave: Callable[[], None]) -> Callable[..., None]:
    """For an ExitStack: what needs the other ranks is left undone where one of them is lost."""

    def exit_(kind: type[BaseException] | None, error: BaseException | None, where: Any) -> None:
        if not isinstance(error, PeerError):
            leave()

    return exit_


def broken(who: str, suspects: Sequence[int], what: str, waited_s: float | None, cause: str) -> PeerError:
    waited = "" if waited_s is None else f" after {waited_s:.1f} s of waiting"
    if "timed out" in cause.lower() or "timeout" in cause.lower():
        return PeerError(
            f"{who} did not answer in {what}{waited}: it is stalled or cut off. Check that its process still runs and "
            "that its network is up; if it is merely slow, raise mesh.timeout_s.",
            suspects,
        )
    reason = cause.splitlines()[0].partition(". ")[0] if cause else "no cause given"
    return PeerError(
        f"{who} is gone: the connection broke in {what}{waited}. Its process has probably ended; the first error in "
        f"its output says why. ({reason})",
        suspects,
    )


def is_of_transport(error: RuntimeError) -> bool:
    """Whether gloo or NCCL raised it, outside of anything that could have named a peer."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error) or "NCCL" in str(error)


def explain(error: PeerError, rank: int) -> PeerError:
    """Tells the others, listens to them for some seconds, and adds who was first to go if that is somebody else."""
    # torchrun ends all ranks as soon as one has left; what this one knows is still to be said.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The store is rank 0's, unless torchrun keeps it: it leaves last.
    rank_0_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    grace_s = 2 * GRACE_S if rank == 0 and rank_0_keeps_store else GRACE_S
    said: dict[int, list[int]] = {}
    listener = threading.Thread(target=_listen, args=(rank, error, said, grace_s), daemon=True)
    listener.start()
    listener.join(grace_s + STORE_TIMEOUT_S)
    culprits = causes({**said, rank: list(error.suspects)})
    told = f"rank {rank}: {error}"
    if culprits and not set(culprits) >= set(error.suspects):
        told += f" The first to fail: {names(culprits)}. Others waited for it and heard nothing."
    elif rank not in said and rank_0_keeps_store and 0 not in (rank, *error.suspects):
        told += " Rank 0, which keeps the store of the launch, does not answer either."
    elif 1 < len(error.suspects) != len(culprits) > 0:
        told += f" Nothing was heard of {names(culprits)}."
    return PeerError(told, culprits or error.suspects)


def causes(suspects_of: dict[int, list[int]]) -> list[int]:
    """Of those that failed ranks waited for, the ones that did not fail by waiting themselves.

    Who waited for a single rank knows more than who waited for a whole group.
    """
    certain = [suspects for suspects in suspects_of.values() if len(suspects) == 1]
    for found in (certain, list(suspects_of.values())):
        silent = {rank for suspects in found for rank in suspects} - suspects_of.keys()
        if silent:
            return sorted(silent)
    return []


def names(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:MOST_NAMES]))
    more = f" and {len(ranks) - MOST_NAMES} more" if len(ranks) > MOST_NAMES else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _listen(rank: int, error: PeerError, said: dict[int, list[int]], grace_s: float) -> None:
    """Fills `said` for as long as the store answers."""
    deadline = time.monotonic() + grace_s
    try:
        store, read = dist.distributed_c10d._get_default_store(), 0
        store.set(f"{KEY}/{store.add(KEY, 1)}", json.dumps([rank, error.suspects]))
        while time.monotonic() < deadline:
            while read < store.add(KEY, 0):
                read += 1
                who, suspects = json.loads(store.get(f"{KEY}/{read}"))
                said[who] = suspects
            time.sleep(grace_s / 10)
    except (RuntimeError, ValueError):
        # Gone with its rank, or never there.
        return
