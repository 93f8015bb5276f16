"""Runs a function in real gloo processes and hands back what each of them returned.

The processes are forked from a small server that has imported torch once, so a test with four of them starts in a
fraction of a second.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.checkpoint"])


def spawn(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60, victims: Sequence[int] = ()
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` in `world_size` processes whose default group is gloo.

    `fn` is a module-level function; arguments and results are picklable, tensors included. Returns the results in the
    order of ranks, None for the `victims`: ranks that may die. Raises RuntimeError with the traceback of the first
    other process that failed, or TimeoutError; all processes have ended when it returns or raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        for rank in range(world_size):
            receiver, sender = FORKED.Pipe(duplex=False)
            process = FORKED.Process(
                target=_run, args=(sender, fn, rank, world_size, f"{folder}/store", timeout_s, args), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            survivors = {rank: pipe for rank, pipe in enumerate(pipes) if rank not in victims}
            results = _collect(survivors, time.monotonic() + timeout_s)
            return [results.get(rank) for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run(
    sender: Connection, fn: Callable[..., Any], rank: int, world_size: int, store: str, timeout_s: float, args: tuple
) -> None:
    try:
        # The loopback device always resolves; a container's host name may not.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = fn(rank, world_size, *args)
        # A whole training run leaves the group itself.
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        sender.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        # Leaving now would make the others fail too, and their complaint about the lost connection could arrive first.
        time.sleep(5)


def _collect(pipes: dict[int, Connection], deadline: float) -> dict[int, Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        missing = [rank for rank in pipes if rank not in results]
        ready = wait([pipes[rank] for rank in missing], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {missing} did not finish in time")
        for rank in missing:
            if pipes[rank] in ready:
                results[rank] = _receive(pipes[rank], rank)
    return results


def _receive(pipe: Connection, rank: int) -> Any:
    try:
        succeeded, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} died without a word") from None
    if not succeeded:
        raise RuntimeError(f"rank {rank} failed:\n{result}")
    return result
