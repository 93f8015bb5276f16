"""Kills a training run again and again, and shows that nothing is lost.

    python scripts/kill_test.py --kills 10 --world 2 --seed 0

One run trains without interruption. Another one, with the same config, is killed with SIGKILL at moments drawn from
`--seed` and resumed each time:

    start      somewhere between the start of the processes and their first step
    step       somewhere in the middle of the steps
    saving     as soon as a checkpoint is being written (its directory still ends in .partial)

Either all ranks are killed at once, or (not at the start) a single one, whose peers must then end by themselves. In the
end every figure of metrics.jsonl that does not measure time, and every tensor of the last checkpoint, must equal those
of the first run bit by bit, and no checkpoint that was complete may have been lost on the way. Leaves with 1 if
anything differs.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
# Steps between two checkpoints.
EVERY = 3
# Steps that a round may take before its kill.
ROUND = 12
MOMENTS = ("saving", "step", "start", "saving", "step")
TIMES = {"tokens_per_s", "tokens_per_s_per_gpu", "mfu", "step_ms", "memory_gib", "placement/ms"}
CONFIG = (
    "precision=bf16",
    "model=micro",
    "train.seq_len=32",
    "train.sequences=8",
    "train.micro_batch=2",
    "train.resume=auto",
    "optim.warmup_steps=5",
    f"checkpoint.every_steps={EVERY}",
    "metrics.moe_every_steps=1",
    "dispatch.placement.every_steps=2",
    "dispatch.placement.min_gain=0",
)


@dataclass(frozen=True)
class Kill:
    """What was killed and when, and what the run directory held afterwards."""

    moment: str
    victims: str
    last_step: int
    newest_checkpoint: int
    left_partial: bool


@dataclass(frozen=True)
class Run:
    """A run directory, seen from outside."""

    path: Path

    def records(self) -> list[dict[str, Any]]:
        text = self.text().rpartition("\n")[0]
        return [json.loads(line) for line in text.splitlines()]

    def text(self) -> str:
        path = self.path / "metrics.jsonl"
        return path.read_text() if path.exists() else ""

    def last_step(self) -> int:
        found = self.records()
        return found[-1]["step"] if found else 0

    def names(self) -> list[str]:
        folder = self.path / "checkpoints"
        return sorted(os.listdir(folder)) if folder.exists() else []

    def newest_checkpoint(self) -> int:
        return max((int(name[5:]) for name in self.names() if name[5:].isdigit()), default=0)

    def is_saving(self) -> bool:
        return any(name.endswith(".partial") for name in self.names())


class Processes:
    """The ranks of one start, each in a session of its own, so that nothing else can be hit."""

    def __init__(self, run: Run, world: int, steps: int, text: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(world)}
        environment = os.environ | here | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [f"mesh.ep={world}", f"train.steps={steps}", f"run.dir={run.path}", f"data.path={text}"]
        command = [sys.executable, "-m", "dstrain", "train", *CONFIG, *words, f"data.cache_dir={run.path}.tokens"]
        self._log = (run.path.parent / f"{run.path.name}.log").open("a")
        self.ranks = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
            for rank in range(world)
        ]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._log.close()

    def running(self) -> bool:
        return all(rank.poll() is None for rank in self.ranks)

    def kill(self, only: int | None = None) -> None:
        """SIGKILL for one rank or all; returns when every rank has ended."""
        for rank in self.ranks if only is None else [self.ranks[only]]:
            rank.kill()
        for rank in self.ranks:
            rank.wait(timeout=120)

    def finish(self) -> None:
        codes = [rank.wait(timeout=900) for rank in self.ranks]
        if any(codes):
            raise RuntimeError(f"the ranks left with {codes}; see {self._log.name}")


def kill_at(moment: str, processes: Processes, run: Run, draw: random.Random, startup_s: float) -> Kill:
    """Waits for the moment, kills, and reports."""
    if moment == "start":
        time.sleep(draw.uniform(0, startup_s))
    else:
        aim = run.last_step() + draw.randint(1, ROUND - EVERY)
        wait_for(lambda: run.last_step() >= aim, processes)
        if moment == "saving":
            wait_for(run.is_saving, processes)
        else:
            time.sleep(draw.uniform(0, 0.05))
    world = len(processes.ranks)
    # Whoever waits for a peer at the start would wait for torch's ten minutes: ending him is the launcher's part.
    alone = moment != "start" and world > 1 and draw.random() < 0.4
    victim = draw.randrange(world) if alone else None
    processes.kill(victim)
    victims = "all" if victim is None else f"rank {victim}"
    return Kill(moment, victims, run.last_step(), run.newest_checkpoint(), run.is_saving())


def wait_for(condition: Any, processes: Processes) -> None:
    while not condition():
        if not processes.running():
            raise RuntimeError("the run ended before it was killed")
        time.sleep(0.0005)


def differences(whole: Run, killed: Run) -> list[str]:
    """What is not bit by bit the same."""
    found = []
    ours, theirs = killed.records(), whole.records()
    if [record["step"] for record in ours] != [record["step"] for record in theirs]:
        found.append(f"steps: {len(ours)} records instead of {len(theirs)}, or not in order")
    for one, other in zip(ours, theirs, strict=False):
        # A start that resumes brings experts back to where they were, and counts those bytes, too.
        keys = [key for key in other if key not in TIMES and not key.startswith("comm_") and one.get(key) != other[key]]
        found += [f"step {other['step']}: {key} is {one.get(key)!r}, not {other[key]!r}" for key in keys]
    if contents(killed) != contents(whole):
        found.append("the tensors of the last checkpoint")
    return found


def contents(run: Run) -> dict[str, bytes]:
    """The tensor files of the newest checkpoint."""
    folder = run.path / "checkpoints" / f"step-{run.newest_checkpoint():08}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def show(kills: list[Kill]) -> None:
    table = Table("kill", "aimed at", "victims", "last step", "newest checkpoint", "left .partial", "steps to repeat")
    for number, kill in enumerate(kills, start=1):
        repeated = kill.last_step - kill.newest_checkpoint
        partial = "yes" if kill.left_partial else ""
        table.add_row(
            *map(str, (number, kill.moment, kill.victims, kill.last_step, kill.newest_checkpoint, partial, repeated))
        )
    Console(width=100).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--world", type=int, default=2, help="processes; the experts are spread over all of them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps, draw = ROUND * (options.kills + 2), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="dstrain-kill-") as folder:
        text = Path(folder, "corpus.txt")
        text.write_text("\n".join(f"Line {draw.randrange(10**6)} of a text about nothing." for _ in range(2000)))
        whole, killed = Run(Path(folder, "whole")), Run(Path(folder, "killed"))
        began = time.monotonic()
        with Processes(whole, options.world, steps, text) as processes:
            wait_for(lambda: whole.last_step() > 0, processes)
            startup_s = time.monotonic() - began
            processes.finish()
        kills: list[Kill] = []
        for number in range(options.kills):
            before = killed.newest_checkpoint()
            with Processes(killed, options.world, steps, text) as processes:
                kills.append(kill_at(MOMENTS[number % len(MOMENTS)], processes, killed, draw, startup_s))
            if killed.newest_checkpoint() < before:
                raise RuntimeError(f"the checkpoint of step {before} was lost")
        with Processes(killed, options.world, steps, text) as processes:
            processes.finish()
        show(kills)
        found = differences(whole, killed)
    for line in found[:20]:
        print(line)
    verdict = f"DIFFERS in {len(found)} figures from" if found else "equals bit by bit"
    print(f"seed {options.seed}: the run of {steps} steps that was killed {len(kills)} times {verdict} the other one")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
