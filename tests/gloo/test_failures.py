"""Training runs that lose a rank: every other one ends with a message that names it, and nothing hangs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from dstrain.bench.testbed import Fabric, Testbed
from dstrain.comm import failure
from dstrain.comm.trace import Trace, Transfer
from dstrain.config.schema import Config
from dstrain.errors import PeerError
from dstrain.mesh.groups import Place, free_port
from dstrain.metrics.run_directory import RunDirectory
from dstrain.tasks import pretrain
from tests.bench.lab import needs_testbed
from tests.gloo.spawn import spawn
from tests.tasks.training import arguments, config, write_corpus

# A busy machine adds less than two time-outs, so that three in a row are too long. Until a run has lost a rank it may
# be as slow as it likes.
TIMEOUT_S, BUSY_S, BEGIN_S = 8, 12, 120
WHERE = r"layer \d, micro-batch \d, (forward|backward|weight), step \d+"
# Between the passes there is no micro-batch, and the sums of the loads belong to none.
TRANSFER = rf"((dispatch|combine|grad), {WHERE}|(param|reduce|a collective), (.*, )?step \d+)"


def most_s(rank: int) -> float:
    """From the loss of a rank until another one has to be gone: it waits, listens to the others, and reads a store that
    may be lost as well. Rank 0 listens for longer, as it keeps the store."""
    grace_s = failure.GRACE_S * (2 if rank == 0 else 1)
    return TIMEOUT_S + grace_s + failure.STORE_TIMEOUT_S + BUSY_S


def lose_a_rank(rank: int, world: int, made: Config, victim: int, how: int, port: int, kind: str = "dispatch") -> str:
    """The victim goes as soon as it has ended a transfer of this kind in step 2; what the others say, and that they
    leave the run in time."""
    # The run builds its default group itself: the present one has the patience of `spawn`.
    dist.destroy_process_group()
    Place.on_this_machine(rank, world, port)
    failure.GRACE_S = 1.0
    end, lost = Trace.end, Path(f"{made.run.dir}-lost")

    def stop(trace: Trace, transfer: Transfer) -> None:
        end(trace, transfer)
        if transfer.kind == kind and transfer.label.step == 2:
            # One clock for all processes of a machine.
            lost.write_text(str(time.monotonic()))
            os.kill(os.getpid(), how)

    if rank == victim:
        Trace.end = stop
    with pytest.raises(PeerError) as raised:
        pretrain.run(made)
    assert time.monotonic() - float(lost.read_text()) < most_s(rank)
    if rank == 0:
        # Nobody holds it any more.
        RunDirectory(made.run.dir).lock()
    dist.destroy_process_group()
    return str(raised.value)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "stalls"])
def test_a_rank_that_goes_in_mid_dispatch_is_named(tmp_path: Path, how: int):
    made = config(tmp_path, "run", "mesh.ep=2", f"mesh.timeout_s={TIMEOUT_S}", "train.steps=90", world=4)
    messages = spawn(lose_a_rank, 4, made, 2, int(how), free_port(), victims=[2], timeout_s=BEGIN_S)
    sign = "is gone: the connection broke" if how == signal.SIGKILL else "did not answer"
    partner = messages[3]
    assert re.search(rf"^rank 3: rank 2 \(group [a-z-]+\) {sign} in (dispatch|combine|grad), {WHERE} after", partner), (
        partner
    )
    for rank in (0, 1):
        assert messages[rank].startswith(f"rank {rank}: ")
        # Either the one it waited for itself, or the one that others waited for.
        assert "rank 2 (" in messages[rank] or "The first to fail: rank 2." in messages[rank], messages[rank]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "stalls"])
@pytest.mark.parametrize("kind", ["pipe", "dispatch"])
def test_a_rank_that_goes_in_mid_pipeline_is_named(tmp_path: Path, how: int, kind: str):
    """Rank 2 is the second stage of rank 0, and holds experts with rank 3."""
    layout = ("mesh.pp=2", "mesh.ep=2", "train.micro_batch=1", "schedule.pipeline=zb_1p")
    made = config(tmp_path, "run", *layout, f"mesh.timeout_s={TIMEOUT_S}", "train.steps=90", world=4)
    messages = spawn(lose_a_rank, 4, made, 2, int(how), free_port(), kind, victims=[2], timeout_s=BEGIN_S)
    sign = "is gone: the connection broke" if how == signal.SIGKILL else "did not answer"
    where = rf"(pipe|dispatch|combine), stage \d, {WHERE} after"
    for rank in (0, 1, 3):
        assert re.search(
            rf"^rank {rank}: rank \d \(group (pp|ep)\) (did not answer|is gone: .*) in {where}", messages[rank]
        )
        assert "rank 2 (" in messages[rank] or "The first to fail: rank 2." in messages[rank], messages[rank]
    assert any(re.search(rf"rank 2 \(group (pp|ep)\) {sign} in {where}", messages[rank]) for rank in (0, 3))


Start = Callable[..., "subprocess.Popen[str]"]


def command(folder: Path, *overrides: str) -> list[str]:
    write_corpus(folder / "corpus.txt")
    words = arguments(folder, "run", "train.steps=100000", f"mesh.timeout_s={TIMEOUT_S}", *overrides)
    return [sys.executable, "-m", "dstrain", "train", *words]


@contextmanager
def training(world: int, start: Start) -> Iterator[list["subprocess.Popen[str]"]]:
    """`dstrain train` on each rank."""
    place = {"WORLD_SIZE": str(world), "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [start(rank, {"RANK": str(rank), "LOCAL_RANK": str(rank), **place}) for rank in range(world)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + BEGIN_S
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists():
            lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            if any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n")):
                return
        time.sleep(0.1)
    raise TimeoutError(f"{run} did not get to step {step}")


def test_the_command_ends_with_a_message_and_status_2(tmp_path: Path):
    words = command(tmp_path)

    def start(rank: int, env: dict[str, str]) -> "subprocess.Popen[str]":
        here = {**os.environ, **env, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen(words, env=here, stderr=subprocess.PIPE, text=True, start_new_session=True)

    with training(2, start) as (survivor, victim):
        wait_for_step(tmp_path / "run", 2)
        victim.kill()
        _, said = survivor.communicate(timeout=most_s(0))
    assert survivor.returncode == 2
    assert re.search(r"^dstrain: rank 0: rank 1 \(group [a-z-]+\) is gone", said, re.MULTILINE), said
    assert "Traceback" not in said


@needs_testbed
def test_a_cut_cable(tmp_path: Path):
    words = command(tmp_path, "mesh.ep=4", "dispatch=hierarchical")
    with Testbed(Fabric(nodes=2)) as testbed:

        def start(rank: int, env: dict[str, str]) -> "subprocess.Popen[str]":
            return testbed.start(rank // 2, words, env, stderr=subprocess.PIPE, text=True)

        with training(4, start) as processes:
            wait_for_step(tmp_path / "run", 2)
            testbed.cut(1)
            cut_s, said = time.monotonic(), []
            for rank, process in enumerate(processes):
                rest_s = max(0.0, cut_s + most_s(rank) - time.monotonic())
                said.append(process.communicate(timeout=rest_s)[1])
    for rank, (process, text) in enumerate(zip(processes, said, strict=True)):
        assert process.returncode == 2
        lost = "[23]" if rank < 2 else "[01]"
        # It waited for the other side; or also for its neighbour, and says that the other side failed first, or, where
        # the other side keeps the store of the launch, that it does not answer.
        waited = rf"(one of )?ranks? {lost}.* in {TRANSFER}"
        passed_on = rf"(one of )?ranks? \d.* in {TRANSFER}.* (The first to fail: ranks? {lost}|Rank 0, which keeps)"
        assert re.search(rf"^dstrain: rank {rank}: ({waited}|{passed_on})", text, re.M), text
