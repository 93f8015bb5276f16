"""The ranks of a bench on the nodes of a testbed, and the pipes to them."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dstrain.bench.messages import Failure
from dstrain.bench.testbed import Testbed
from dstrain.errors import UserError
from dstrain.mesh.axes import Mesh

PORT = 29500
LOG_LINES = 20


class Launch:
    """A context. `request` asks all ranks the same, and returns their answers in the order of ranks.

    `pp`: ranks of a pipeline, all of them on one node, so that an expert-parallel group is spread over all nodes.
    """

    def __init__(self, testbed: Testbed, ranks_per_node: int, timeout_s: float, pp: int = 1):
        self.testbed, self.ranks_per_node, self.timeout_s, self.pp = testbed, ranks_per_node, timeout_s, pp
        self.world = testbed.fabric.nodes * ranks_per_node
        self.pipes: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Launch":
        self.logs = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dstrain-bench-")))
        try:
            for rank in range(self.world):
                self._start(rank)
            # Every rank says when it has joined.
            self._answers()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """The testbed ends what doesn't end by itself."""
        if kind is None:
            for pipe in self.pipes:
                pipe.send(None)
            for process in self.processes:
                process.wait(self.timeout_s)
        self._stack.close()

    def request(self, message: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(message)
        return self._answers()

    def _start(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        self.pipes.append(self._stack.enter_context(Connection(ours.detach())))
        log = self._stack.enter_context((self.logs / f"{rank}").open("wb"))
        place = {"RANK": rank, "LOCAL_RANK": rank % self.ranks_per_node, "WORLD_SIZE": self.world, "MASTER_PORT": PORT}
        env = {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _path()}
        with theirs:
            numbers = map(str, (theirs.fileno(), self.timeout_s, self.pp))
            command = [sys.executable, "-m", "dstrain.bench.worker", *numbers]
            ep_index = Mesh(pp=self.pp, ep=self.world // self.pp).coordinate(rank).ep
            node = ep_index // (self.ranks_per_node // self.pp)
            process = self.testbed.start(node, command, env, pass_fds=[theirs.fileno()], stdout=log, stderr=log)
        self.processes.append(process)

    def _answers(self) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout_s
        while len(answers) < self.world:
            missing = {self.pipes[rank]: rank for rank in range(self.world) if rank not in answers}
            ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = ", ".join(map(str, missing.values()))
                raise UserError(
                    f"Ranks {ranks} of the bench did not answer within {self.timeout_s:.0f} s. Raise timeout_s."
                )
            for pipe, rank in missing.items():
                if pipe in ready:
                    answers[rank] = self._receive(pipe, rank)
        return [answers[rank] for rank in range(self.world)]

    def _receive(self, pipe: Connection, rank: int) -> Any:
        try:
            answer = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(self._obituary(rank)) from None
        if isinstance(answer, Failure):
            raise RuntimeError(f"rank {rank} of the bench failed:\n{answer.trace}")
        return answer

    def _obituary(self, rank: int) -> str:
        status = self.processes[rank].wait(self.timeout_s)
        cause = signal.Signals(-status).name if status < 0 else f"status {status}"
        log = (self.logs / f"{rank}").read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f"rank {rank} of the bench died without a word ({cause}); its log ends:", *log])


def _path() -> str:
    """Where this process finds the package; a worker starts in the same place."""
    return os.pathsep.join(path for path in sys.path if path)
