"""Memory of a training step when one rank's experts take all tokens of all ranks, with and without chunks.

    python scripts/bench_skew.py [--ranks 4] [--tokens 2048] [--chunks 0,1024] [--compute-dtype bfloat16]

The router's bias sends every token to the first experts, which lie on rank 0. Each case runs in fresh processes; the
peak is the largest resident memory of a rank less what it held before its first step. Rows are counted where the
experts get them, so that a dropped token would be seen. A step is forward, backward, reduction and update.
"""

import argparse
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import multiprocessing as mp

from dstrain.config.schema import Config, DispatchConfig, MeshConfig, ModelConfig, PrecisionConfig, TrainConfig
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import Trainer
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect, disconnect, free_port
from dstrain.model.moe import Experts
from dstrain.parallel.apply import build_model

SEQ_LEN = 512
# Two experts a token; the proportions of DeepSeek-V2-Lite.
MODEL = ModelConfig(
    vocab_size=320,
    hidden_size=512,
    num_layers=2,
    num_heads=4,
    intermediate_size=1408,
    moe_intermediate_size=352,
    num_experts=8,
    experts_per_token=2,
)


@dataclass(frozen=True)
class Case:
    skewed: bool
    # 0: all rows at once.
    chunk_rows: int

    def __str__(self) -> str:
        routing = "all tokens to rank 0" if self.skewed else "as initialised"
        return f"{routing}, {f'chunks of {self.chunk_rows}' if self.chunk_rows else 'no chunks'}"


def batch(first: int, count: int) -> Tensor:
    return torch.randint(256, (count, SEQ_LEN + 1), generator=torch.Generator().manual_seed(first))


def make_config(args: argparse.Namespace, case: Case) -> Config:
    sequences = args.tokens // SEQ_LEN
    return Config(
        mesh=MeshConfig(ep=args.ranks, dp=1),
        model=MODEL,
        train=TrainConfig(seq_len=SEQ_LEN, sequences=sequences * args.ranks, micro_batch=sequences),
        dispatch=DispatchConfig(kind=args.dispatch, expert_chunk_rows=case.chunk_rows),
        precision=PrecisionConfig(args.compute_dtype, "float32", "float32"),
    )


def count_rows(trainer: Trainer, rows: list[int]) -> None:
    """Appends the rows of every call of the experts."""
    for module in trainer.model.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def work(rank: int, args: argparse.Namespace, case: Case, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    config, rows = make_config(args, case), []
    groups = connect(Mesh(ep=args.ranks), Place.on_this_machine(rank, args.ranks, port))
    model = build_model(config, groups)
    trainer = Trainer(config, groups, model, make_engine(model, config, groups), batch, Progress())
    if case.skewed:
        for _, router in model.routers():
            router.bias[: MODEL.experts_per_token] += 100
    count_rows(trainer, rows)
    before_mib = resident_mib()
    trainer.step()
    rows.clear()
    began = time.perf_counter()
    report = trainer.step()
    seconds = time.perf_counter() - began
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before_mib
    results.put((rank, peak_mib, seconds, sum(rows), report.loss))
    disconnect()


def measure(args: argparse.Namespace, case: Case) -> list[tuple[int, float, float, int, float]]:
    """(rank, peak MiB, then of the second step: seconds, rows, loss) by rank."""
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (args, case, free_port(), results), nprocs=args.ranks)
    return sorted(results.get() for _ in range(args.ranks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a rank, in one micro-batch")
    parser.add_argument("--chunks", default="0,1024", help="rows; 0: all at once")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--dispatch", default="rank")
    args = parser.parse_args()
    pairs = args.tokens * args.ranks * MODEL.experts_per_token
    table = Table(title=f"{args.ranks} ranks, {args.tokens} tokens each, {pairs} rows in all, {args.compute_dtype}")
    for heading in ("case", "peak of rank 0, MiB", "of the others", "step, s", "rows of rank 0", "of all", "loss"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    cases = [Case(False, 0), *(Case(True, int(rows)) for rows in args.chunks.split(","))]
    for case in cases:
        ranks = measure(args, case)
        peaks, rows = [peak for _, peak, *_ in ranks], [rows for *_, rows, _ in ranks]
        seconds = max(seconds for _, _, seconds, *_ in ranks)
        cells = (f"{peaks[0]:.0f}", f"{max(peaks[1:]):.0f}", f"{seconds:.2f}", str(rows[0]), str(sum(rows)))
        table.add_row(str(case), *cells, f"{ranks[0][-1]:.7f}")
        if sum(rows) != pairs:
            raise SystemExit(f"{case}: experts got {sum(rows)} rows instead of {pairs}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
