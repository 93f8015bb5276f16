"""What limiting each token to few nodes costs in loss, and what it saves on the slow link.

    OMP_NUM_THREADS=1 python scripts/bench_routing.py [--steps 120] [--seeds 2] [--routings free,2/4,1/4]

Trains the model of experiment/tiny_cpu with 32 experts in one process, in FP32, on equal batches from equal initial
weights, once for each routing and seed. `2/4` lets a token choose experts in 2 of 4 groups, and a group is a node. The
loss is the mean over the last steps of the run, on text not seen before; its spread is that of seeds, and differences
to the first routing are taken seed by seed. Bytes are expected ones (plan/traffic.py) of a token, layer, forward and
backward pass, if 4 nodes of 2 ranks held the experts and the transport were hierarchical.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from dstrain.config import load
from dstrain.config.schema import Config
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.mesh.topology import Link
from dstrain.plan.traffic import Router, Rows, expected, link_bytes
from dstrain.tasks.pretrain import make_trainer, open_loader, with_vocabulary

NODES, RANKS_PER_NODE = 4, 2
WIRES = ("bfloat16", "fp8")


@dataclass(frozen=True)
class Routing:
    """A token visits at most `groups_per_token` of `num_groups` nodes."""

    name: str
    num_groups: int
    groups_per_token: int

    @staticmethod
    def of(name: str) -> "Routing":
        allowed, _, groups = name.partition("/")
        return Routing(name, 1, 1) if name == "free" else Routing(name, int(groups), int(allowed))


def make_config(routing: Routing, seed: int, arguments: argparse.Namespace) -> Config:
    groups = [
        f"model.router.num_groups={routing.num_groups}",
        f"model.router.groups_per_token={routing.groups_per_token}",
    ]
    sizes = [f"train.steps={arguments.steps}", f"train.seed={seed}", f"data.path={arguments.data}"]
    config: Config = load.compose("train", ["+experiment=tiny_cpu", "model.num_experts=32", *groups, *sizes])
    return config


def final_loss(config: Config, groups: Groups, last: int) -> float:
    """Trains and returns the mean loss of the last steps."""
    loader = open_loader(config)
    trainer = make_trainer(with_vocabulary(config, loader), groups)
    trainer.batches = loader.batch
    losses = [trainer.step().loss_main for _ in range(config.train.steps)]
    return statistics.fmean(losses[-last:])


def slow_bytes(config: Config, wire: str) -> float:
    """Expected bytes that a token puts on the slow link in one layer."""
    model = config.model
    router = Router(model.num_experts, model.experts_per_token, model.router.num_groups, model.router.groups_per_token)
    tokens = 4096
    messages = expected("hierarchical", [RANKS_PER_NODE] * NODES, router, tokens)
    node_of_rank = [rank // RANKS_PER_NODE for rank in range(NODES * RANKS_PER_NODE)]
    totals = link_bytes(messages, node_of_rank, Rows.of(wire, "bfloat16", model.hidden_size))
    return sum(num_bytes for (_, link), num_bytes in totals.items() if link is Link.NETWORK) / tokens


def report(losses: dict[str, list[float]], configs: dict[str, Config], arguments: argparse.Namespace) -> None:
    table = Table(title=f"{arguments.steps} steps, mean of the last {arguments.last}, {arguments.seeds} seeds")
    for heading in ("routing", "loss", "spread", "minus first", "spread", *(f"bytes, {wire}" for wire in WIRES)):
        table.add_column(heading, justify="left" if heading == "routing" else "right")
    first = next(iter(losses.values()))
    for name, values in losses.items():
        differences = [value - other for value, other in zip(values, first, strict=True)]
        figures = [f"{value:.4f}" for sample in (values, differences) for value in (mean(sample), spread(sample))]
        table.add_row(name, *figures, *(f"{slow_bytes(configs[name], wire):.0f}" for wire in WIRES))
    Console(width=120).print(table)


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def spread(values: list[float]) -> float:
    """Standard deviation between seeds."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="What limiting each token to few nodes costs in loss.")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--last", type=int, default=20, help="steps at the end whose losses are averaged")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--routings", default="free,2/4,1/4")
    parser.add_argument("--data", default="python-stdlib")
    arguments = parser.parse_args()
    groups = connect(Mesh(), Place(0, 1, torch.device("cpu")))
    losses: dict[str, list[float]] = {name: [] for name in arguments.routings.split(",")}
    configs: dict[str, Config] = {}
    for seed in range(arguments.seeds):
        for name in losses:
            began = time.perf_counter()
            configs[name] = make_config(Routing.of(name), seed, arguments)
            losses[name].append(final_loss(configs[name], groups, arguments.last))
            print(f"seed {seed}, {name}: {losses[name][-1]:.4f} ({time.perf_counter() - began:.0f} s)", flush=True)
    report(losses, configs, arguments)


if __name__ == "__main__":
    main()
