"""Does FP8 train as well as BF16? Small MLA/MoE models on real text, several seeds, the same batches for each seed.

    python scripts/compare_precisions.py [--out DIR] [--seeds 3] [--tokens 2100000] [--only NAME ...] [overrides ...]

A run is `dstrain train` in a process of its own; a finished one in --out is not made again. The mean loss of the last
eighth of the steps, when the learning rate has come down, is compared: relative to BF16 of the same seed, and beside
the spread of BF16 over seeds. DeepSeek-V3 (arXiv:2412.19437, section B.1) found less than 0.25 %, and divergence of a
16B model where gradients of activations were quantised in blocks (B.2). With --out, the curves go to precisions.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOKENS_PER_STEP = 4096
FP8 = ("precision=fp8",)
RECIPES = {
    "bf16": ("precision=bf16",),
    # How far apart runs drift by rounding alone.
    "fp32": ("precision=fp32",),
    "fp8": FP8,
    # Over a wire in FP8 the gradients of the experts' outputs would arrive in tiles, quantised.
    "fp8, gradients in blocks": (*FP8, "precision.gradient_tiles=blocks", "dispatch.wire=bfloat16"),
    "fp8, plain scales": (*FP8, "precision.scales=plain"),
    "fp8, attention in bf16": (*FP8, 'precision.exclude=["*.attn.*"]'),
}
MODEL = (
    "+experiment=tiny_cpu",
    "model.num_experts=8",
    "model.experts_per_token=2",
    "model.moe_intermediate_size=128",
    "model.intermediate_size=256",
    "model.num_heads=2",
    "train.seq_len=128",
    "train.sequences=32",
    "train.micro_batch=16",
    # With the rate of tiny_cpu, runs that differ by rounding alone end 1 % apart.
    "optim.lr=1e-3",
    "optim.warmup_steps=60",
    "checkpoint.every_steps=0",
)


@dataclass(frozen=True)
class Curve:
    losses: list[float]

    @property
    def final(self) -> float:
        """The mean of the last eighth."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 8) :])


def train(directory: Path, overrides: list[str]) -> Curve:
    if not (directory / "done").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [sys.executable, "-m", "dstrain", "train", *MODEL, *overrides, f"run.dir={directory}"]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        (directory / "done").touch()
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return Curve([record["loss_main"] for record in records])


def report(curves: dict[str, list[Curve]]) -> None:
    base = [curve.final for curve in curves["bf16"]]
    print(f"{'recipe':26} " + " ".join(f"seed {n:<7}" for n in range(len(base))) + " mean   against bf16")
    for name, found in curves.items():
        gaps = [curve.final / reference - 1 for curve, reference in zip(found, base, strict=True)]
        against = f"{statistics.fmean(gaps):+.3%} ({min(gaps):+.3%} to {max(gaps):+.3%})" if name != "bf16" else ""
        mean = statistics.fmean(curve.final for curve in found)
        print(f"{name:26} " + " ".join(f"{curve.final:<12.5f}" for curve in found) + f" {mean:.5f} {against}")
    mean = statistics.fmean(base)
    print(f"spread of bf16 over seeds: {min(base) / mean - 1:+.3%} to {max(base) / mean - 1:+.3%}")


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    from matplotlib import pyplot

    figure, (whole, gap) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for color, (name, found) in enumerate(curves.items()):
        for seed, curve in enumerate(found):
            label = name if seed == 0 else None
            tokens = [TOKENS_PER_STEP * (n + 1) / 1e6 for n in range(len(curve.losses))]
            whole.plot(tokens, curve.losses, color=f"C{color}", linewidth=0.7, label=label)
            if name != "bf16":
                ratio = [100 * (a / b - 1) for a, b in zip(curve.losses, curves["bf16"][seed].losses, strict=True)]
                smooth = [statistics.fmean(ratio[max(0, n - 31) : n + 1]) for n in range(len(ratio))]
                gap.plot(tokens, smooth, color=f"C{color}", linewidth=0.9, label=label)
    gap.axhspan(-0.25, 0.25, color="0.9", label="0.25 % (DeepSeek-V3, B.1)")
    whole.set(ylabel="loss (nats per byte)", yscale="log", title="FP8 against BF16, several seeds")
    gap.set(ylabel="loss over BF16's (%), mean of 32 steps", xlabel="tokens (millions)", ylim=(-2, 2))
    for axes in (whole, gap):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2_100_000)
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    arguments, overrides = parser.parse_known_args()
    steps = -(-arguments.tokens // TOKENS_PER_STEP)
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        curves: dict[str, list[Curve]] = {}
        for name in ["bf16", *(name for name in arguments.only if name != "bf16")]:
            for seed in range(arguments.seeds):
                keys = [f"train.steps={steps}", f"train.seed={seed}", *RECIPES[name], *overrides]
                directory = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                curves.setdefault(name, []).append(train(directory, keys))
                print(f"{name}, seed {seed}: {curves[name][-1].final:.5f}", flush=True)
        report(curves)
        if arguments.out:
            draw(curves, out / "precisions.png")


if __name__ == "__main__":
    main()
