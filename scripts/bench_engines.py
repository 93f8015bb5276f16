"""Compares the engines on one model in real gloo processes: step time and bytes on the wire.

    python scripts/bench_engines.py [--ranks 2] [--ep 2] [--rounds 8] [--micro-batches 2] [--compute-dtype float32]

All engines live in the same processes and take turns step by step, so that a busy machine disturbs them alike; a ratio
is the median over rounds, with its quartiles. Bytes come from wrapped torch.distributed calls, not from the engines'
own account.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import multiprocessing as mp

from dstrain.config.schema import (
    Config,
    EngineConfig,
    MeshConfig,
    ModelConfig,
    PrecisionConfig,
    TrainConfig,
)
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import Trainer
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect, disconnect, free_port
from dstrain.parallel.apply import build_model

SEQ_LEN = 64

ENGINES = {
    "torch": EngineConfig("torch"),
    "deepspeed, stage 1": EngineConfig("deepspeed", zero_stage=1),
    "deepspeed, stage 2": EngineConfig("deepspeed", zero_stage=2),
}

# What DeepSpeed uses a collective for, and the bytes that a rank in a ring of n sends for it, in parts of the larger of
# its tensors.
RING: dict[str, tuple[str, Callable[[int], float]]] = {
    "all_reduce": ("grad", lambda n: 2 * (n - 1) / n),
    "all_gather_single": ("param", lambda n: (n - 1) / n),
    "all_gather_into_tensor": ("param", lambda n: (n - 1) / n),
}


@dataclass
class Wire:
    """Counts the bytes of wrapped collectives, those of the dispatcher left out."""

    dispatcher: dist.ProcessGroup | None = None
    sent_bytes: Counter[str] = field(default_factory=Counter)

    def wrap(self) -> None:
        for name in RING:
            setattr(dist, name, self._wrapped(name, getattr(dist, name)))
        dist.isend = self._sending(dist.isend)

    def _sending(self, isend: Callable[..., Any]) -> Callable[..., Any]:
        """The messages of comm/flat.py: sums have the tag 0."""

        def counted(message: Tensor, **kwargs: Any) -> Any:
            if kwargs["group"] is not self.dispatcher:
                self.sent_bytes["grad" if kwargs["tag"] == 0 else "param"] += message.numel() * message.element_size()
            return isend(message, **kwargs)

        return counted

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        kind, share = RING[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            group = kwargs["group"]
            if group is not self.dispatcher:
                tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
                num_bytes = max(x.numel() * x.element_size() for x in tensors)
                self.sent_bytes[kind] += int(share(dist.get_world_size(group)) * num_bytes)
            return call(*args, **kwargs)

        return counted


class Contestant:
    """An engine with its own copy of the model; the figures of its steps."""

    def __init__(self, config: Config, groups: Groups):
        model = build_model(config, groups)
        self.trainer = Trainer(config, groups, model, make_engine(model, config, groups), batch, Progress())
        self.seconds: list[float] = []
        self.sent_bytes: Counter[str] = Counter()

    def step(self, wire: Wire) -> None:
        """Forward, backward, reduction, update and gather of one global batch."""
        wire.sent_bytes = self.sent_bytes = Counter()
        dist.barrier()
        began = time.perf_counter()
        self.trainer.accumulate()
        engine = self.trainer.engine
        engine.reduce()
        engine.step(1e-4)
        engine.settle()
        self.seconds.append(time.perf_counter() - began)


def batch(first: int, count: int) -> Tensor:
    return torch.randint(256, (count, SEQ_LEN + 1), generator=torch.Generator().manual_seed(first))


def make_config(args: argparse.Namespace) -> Config:
    model = ModelConfig(vocab_size=320, hidden_size=args.hidden, num_layers=3, moe_intermediate_size=args.hidden // 2)
    train = TrainConfig(seq_len=SEQ_LEN, sequences=args.ranks * args.micro_batches)
    precision = PrecisionConfig(args.compute_dtype, args.moments_dtype, "float32")
    mesh = MeshConfig(ep=args.ep, dp=args.ranks // args.ep)
    return Config(mesh=mesh, model=model, train=train, precision=precision)


def work(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    config = make_config(args)
    groups = connect(Mesh(dp=args.ranks // args.ep, ep=args.ep), Place.on_this_machine(rank, args.ranks, port))
    wire = Wire(groups.ep.group if groups.ep else None)
    wire.wrap()
    contestants = {name: Contestant(replace(config, engine=engine), groups) for name, engine in ENGINES.items()}
    for turn in range(args.rounds + 1):
        names = list(ENGINES)[turn % len(ENGINES) :] + list(ENGINES)[: turn % len(ENGINES)]
        for name in names:
            contestants[name].step(wire)
    if rank == 0:
        report(contestants, args)
    disconnect()


def report(contestants: dict[str, Contestant], args: argparse.Namespace) -> None:
    """Medians over the rounds but the first, which warms up."""
    parameters = sum(p.numel() for p in next(iter(contestants.values())).trainer.model.parameters())
    title = f"{args.ranks} ranks, ep={args.ep}, {parameters / 1e6:.2f}M parameters on a rank, {args.compute_dtype}"
    table = Table(title=f"{title}, {args.micro_batches} micro-batches, {args.rounds} rounds")
    for heading in ("engine", "step, ms", "time / torch", "gradients, MB", "parameters, MB"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    base = next(iter(contestants.values())).seconds[1:]
    for name, one in contestants.items():
        ratios = [mine / torchs for mine, torchs in zip(one.seconds[1:], base, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            name,
            f"{statistics.median(one.seconds[1:]) * 1e3:.0f}",
            f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})",
            f"{one.sent_bytes['grad'] / 1e6:.2f}",
            f"{one.sent_bytes['param'] / 1e6:.2f}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("ep", 2), ("rounds", 8), ("micro-batches", 2), ("hidden", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("compute-dtype", "moments-dtype"):
        parser.add_argument(f"--{name}", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    mp.spawn(work, (args, free_port()), nprocs=args.ranks)


if __name__ == "__main__":
    main()
