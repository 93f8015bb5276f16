"""Training steps per second against plain transformers: the same model, the same batch, one process.

    python scripts/bench_transformers.py [--rounds 7] [--warmup 8] [--threads 2] [--set train.seq_len=256 ...]

The model is conf/model/tiny.yaml. Every variant has a process of its own, as its user would start it, and they
take turns, so that a busy machine disturbs them alike; a ratio is the median over rounds, with its range.
Transformers runs as its documentation starts one: SDPA attention, its fastest expert path, torch's AdamW with default
settings; `autocast` is what its Trainer does for bf16=True.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import multiprocessing as mp
from transformers import AutoConfig, AutoModelForCausalLM

from dstrain.checkpoint.huggingface_config import to_json
from dstrain.config import load
from dstrain.config.schema import Config
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import Trainer
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.parallel.apply import build_model

Step = Callable[[], None]
# 9M parameters, 4096 tokens in micro-batches of 1024.
MODEL = [
    "model=tiny",
    "model.vocab_size=320",
    "train.seq_len=256",
    "train.sequences=16",
    "train.micro_batch=4",
    "data.path=python-stdlib",
]

MakeStep = Callable[[Config, Tensor, str], Step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=8, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], help="overrides, such as +experiment=tiny_cpu")
    options = parser.parse_args()
    variants = {f"dstrain {dtype}": (dstrain_step, dtype) for dtype in ("float32", "bfloat16")}
    variants |= {f"transformers {mode}": (transformers_step, mode) for mode in ("float32", "autocast")}
    with ExitStack() as stack:
        turns = {name: stack.enter_context(worker(options, *variant)) for name, variant in variants.items()}
        report(measure(turns, options.warmup, options.rounds))


@contextmanager
def worker(options: argparse.Namespace, make: MakeStep, mode: str) -> Iterator[Connection]:
    """A process that runs a step for everything it is sent, and answers with its seconds."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, options.threads, options.set, make, mode), daemon=True)
    process.start()
    yield here
    process.kill()


def _work(pipe: Connection, threads: int, overrides: list[str], make: MakeStep, mode: str) -> None:
    torch.set_num_threads(threads)
    config = load.compose("train", [*MODEL, *overrides])
    torch.manual_seed(0)
    batch = torch.randint(0, 256, (config.train.sequences, config.train.seq_len + 1 + config.model.mtp.depth))
    step = make(config, batch, mode)
    while True:
        pipe.recv()
        began = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - began)


def dstrain_step(config: Config, batch: Tensor, dtype: str) -> Step:
    """A whole step of the trainer in micro-batches of the recipe: loss, gradients, clipping, AdamW, balancing."""
    config = replace(config, precision=replace(config.precision, compute_dtype=dtype))
    groups = connect(Mesh(), Place(0, 1, torch.device("cpu")))
    model = build_model(config, groups)
    sequences = len(batch)

    def batches(first: int, count: int) -> Tensor:
        start = first % sequences
        return batch[start : start + count]

    trainer = Trainer(config, groups, model, make_engine(model, config, groups), batches, Progress())
    return lambda: trainer.step() and None


def transformers_step(config: Config, batch: Tensor, mode: str) -> Step:
    """Loss, gradients, clipping, AdamW, in the same micro-batches."""
    fields = to_json(replace(config.model, tie_embeddings=False), config.train.seq_len, None, "float32")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    inputs = batch[:, : config.train.seq_len]
    context = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()

    def step() -> None:
        optimizer.zero_grad()
        for part in inputs.split(config.train.micro_batch):
            with context:
                loss = model(input_ids=part, labels=part).loss
            (loss * len(part) / len(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def measure(turns: dict[str, Connection], warmup: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every counted step."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for n in range(warmup + rounds):
        for name, pipe in turns.items():
            # The threads of whoever came before spin for a while before they leave the cores.
            time.sleep(0.3)
            pipe.send("step")
            took = pipe.recv()
            if n >= warmup:
                seconds[name].append(took)
    return seconds


def report(seconds: dict[str, list[float]]) -> None:
    baseline = seconds["transformers float32"]
    table = Table("", "median ms", "times as fast as transformers float32", "range over rounds")
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(baseline, times, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(name, f"{statistics.median(times) * 1e3:.0f}", f"{statistics.median(ratios):.2f}", spread)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
