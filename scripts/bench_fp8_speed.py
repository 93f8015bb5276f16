"""What emulating FP8 costs on a CPU: the step time of FP8 training, as a multiple of BF16's, on the same model.

    python scripts/bench_fp8_speed.py [--rounds 7] [model.hidden_size=256 ...]

The model is that of tiny_cpu with random tokens; overrides change it. Both trainers live in one process and take turns
step by step, so that a busy machine disturbs them alike; the ratio is the median over rounds, with its quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dstrain import host
from dstrain.config.load import compose
from dstrain.config.schema import Config
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import Trainer
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.parallel.apply import build_model

VOCABULARY = 320
KINDS = {
    "BF16": ["precision=bf16"],
    "FP8": ["precision=fp8"],
    "FP8, plain scales": ["precision=fp8", "precision.scales=plain"],
    "MXFP8": ["precision=mxfp8"],
    "FP32": ["precision=fp32"],
}


def trainer(config: Config, groups: Groups) -> Trainer:
    def batches(first: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(first)
        return torch.randint(256, (count, config.train.seq_len + 1 + config.model.mtp.depth), generator=generator)

    model = build_model(config, groups)
    return Trainer(config, groups, model, make_engine(model, config, groups), batches, Progress())


@contextmanager
def timed(times_s: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    times_s.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments, overrides = parser.parse_known_args()
    host.tune_cpu()
    groups = connect(Mesh(), Place(0, 1, torch.device("cpu")))
    usual = ["+experiment=tiny_cpu", f"model.vocab_size={VOCABULARY}", *overrides, "precision.watch_every_steps=0"]
    trainers = {name: trainer(compose("train", [*usual, *kind]), groups) for name, kind in KINDS.items()}
    times_s: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(arguments.rounds + 1):
        for name, each in trainers.items():
            with timed(times_s[name]):
                each.step()
            if turn == 0:
                times_s[name].clear()
    print(f"median of {arguments.rounds} steps in turns, {torch.get_num_threads()} threads")
    for name, times in times_s.items():
        ratios = [ours / base for ours, base in zip(times, times_s["BF16"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:18} {statistics.median(times) * 1e3:8.0f} ms   x {middle:.2f} (quartiles {low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
