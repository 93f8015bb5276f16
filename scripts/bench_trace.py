"""What the account of communication costs, in a step of conf/experiment/tiny_cpu.yaml on several processes.

    python scripts/bench_trace.py [--ranks 2] [--steps 20] [--calls 20000]

Counted are the calls of a step; timed is each call by itself, in a loop; their product is set against the step. A
difference between steps with and without the account would be far below their scatter.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import multiprocessing as mp

from dstrain.comm.trace import Trace
from dstrain.config import load
from dstrain.config.schema import DataConfig
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import Trainer
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect, disconnect, free_port
from dstrain.mesh.topology import Link
from dstrain.parallel.apply import build_model
from dstrain.tasks.verify import batches

CALLS = ("at", "begin", "sent", "end", "waiting", "computing", "take")


def costs_us(calls: int) -> dict[str, float]:
    """Microseconds of each call, with the account of a step behind it."""
    trace = Trace(torch.device("cpu"))
    transfer = trace.begin("dispatch", "ep")

    def context(enter: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        with enter(*args, **kwargs):
            pass

    works: dict[str, Callable[[], Any]] = {
        "at": lambda: context(trace.at, block=1, micro_batch=2, direction="forward"),
        "begin": lambda: trace.begin("dispatch", "ep"),
        "sent": lambda: trace.sent(transfer, Link.NODE, 4096),
        "end": lambda: trace.end(transfer),
        "waiting": lambda: context(trace.waiting, transfer),
        "computing": lambda: context(trace.computing, "attend"),
    }
    return {name: per_call_us(work, calls) for name, work in works.items()} | {"take": take_us()}


def per_call_us(work: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls * 1e6


def take_us() -> float:
    """With a hundred transfers to account for."""
    trace, seconds = Trace(torch.device("cpu")), []
    for _ in range(50):
        for _ in range(100):
            trace.end(trace.begin("dispatch", "ep"))
        began = time.perf_counter()
        trace.take()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e6


def count(trace: Trace, counter: Counter[str]) -> None:
    """Makes the account count its calls."""
    for name in CALLS:
        call = getattr(trace, name)

        def counted(*args: Any, _name: str = name, _call: Callable[..., Any] = call, **kwargs: Any) -> Any:
            counter[_name] += 1
            return _call(*args, **kwargs)

        setattr(trace, name, counted)


def work(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    words = ["+experiment=tiny_cpu", "data.path=none", "model.vocab_size=320", f"mesh.ep={args.ranks}", "mesh.dp=1"]
    config = load.compose("train", words, world_size=args.ranks)
    groups = connect(Mesh(ep=args.ranks), Place.on_this_machine(rank, args.ranks, port))
    model = build_model(config, groups)
    draw = batches(replace(config, data=DataConfig()))
    trainer = Trainer(config, groups, model, make_engine(model, config, groups), draw, Progress())
    reports = [trainer.step() for _ in range(args.steps)]
    counter: Counter[str] = Counter()
    count(groups.trace, counter)
    trainer.step()
    if rank == 0:
        report(counter, costs_us(args.calls), statistics.median(r.seconds for r in reports[2:]))
    disconnect()


def report(counter: Counter[str], cost_us: dict[str, float], step_s: float) -> None:
    total_us = sum(counter[name] * cost_us[name] for name in CALLS)
    for name in CALLS:
        print(f"{name:10} {counter[name]:5} calls x {cost_us[name]:6.2f} us")
    share = total_us / (step_s * 1e6)
    print(f"{total_us:.0f} us of a step of {step_s * 1e3:.1f} ms: {share:.2%}; {counter['begin']} transfers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("steps", 20), ("calls", 20000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    mp.spawn(work, (args, free_port()), nprocs=args.ranks)


if __name__ == "__main__":
    main()
