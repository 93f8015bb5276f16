"""Errors of the three products in FP8 against FP64: what quantising costs, and what the sums of tensor cores cost.

    python scripts/bench_fp8_errors.py [--depth 4096] [--out docs/fp8_errors.svg]

Operands have 128 rows and `depth` numbers to be summed over. "outliers": one channel in 100 is 50 times as large as the
others, and tokens differ by orders of magnitude, as activations and gradients do. An error is that of the norm of a row
of the result, relative to the norm of that row in FP64: the mean over rows, and the worst row. That of sums is measured
against FP64 sums over the same quantised operands.

Sums as on a Hopper GPU (DeepSeek-V3, arXiv:2412.19437, section 3.3.2; arXiv:2505.09343, section 3.1.1) are modelled
after what is published of them, not run on one: 32 products and the sum so far are aligned to the largest exponent of
them, and what lies below 13 fraction bits is cut off. With promotion such sums end after 128 products, and FP32
adds them up.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dstrain.precision.formats import FLOOR, TILE, Scaling
from dstrain.precision.quantize import dequantize_rows, quantize_blocks, quantize_rows

ROWS, STEP, FRACTION_BITS = 128, 32, 13
# E4M3 numbers of an operand, [rows, depth], and the scale of each 128 of them, [rows, depth / 128].
Operand = tuple[Tensor, Tensor]
Quantise = Callable[[Tensor], Operand]


def tiles(power_of_two: bool, floor: float = FLOOR, tile: int = TILE) -> Quantise:
    def quantise(x: Tensor) -> Operand:
        q = quantize_rows(x, Scaling(power_of_two, floor), tile)
        if tile == TILE:
            return q.values.float(), q.scale
        # Powers of two that the tensor core itself applies: it aligns numbers with them.
        return dequantize_rows(q), torch.ones(len(x), x.shape[1] // TILE)

    return quantise


def blocks(power_of_two: bool) -> Quantise:
    def quantise(x: Tensor) -> Operand:
        q = quantize_blocks(x, Scaling(power_of_two, FLOOR))
        return q.values.float(), q.scale.repeat_interleave(TILE, 0)

    return quantise


def tensorwise(x: Tensor) -> Operand:
    """One scale for all, as FP8 training began."""
    scale = Scaling(False).scales(x.abs().amax())
    return (x / scale).to(torch.float8_e4m3fn).float(), scale.expand(len(x), x.shape[1] // TILE)


@dataclass(frozen=True)
class Recipe:
    name: str
    activation: Quantise
    weight: Quantise
    gradient: Quantise


RECIPES = (
    Recipe("tiles, powers of two", tiles(True), blocks(True), tiles(True, 0.0)),
    Recipe("tiles, plain scales", tiles(False), blocks(False), tiles(False, 0.0)),
    Recipe("gradients in blocks", tiles(True), blocks(True), blocks(True)),
    Recipe("MXFP8", tiles(True, tile=32), tiles(True, tile=32), tiles(True, 0.0, tile=32)),
    Recipe("one scale a tensor", tensorwise, tensorwise, tensorwise),
)


def wide(operand: Operand) -> Tensor:
    numbers, scale = operand
    return numbers * scale.repeat_interleave(TILE, 1)


def hopper_sum(left: Operand, right: Operand) -> Tensor:
    """left @ right.T, promoted to FP32, and scaled, every 128."""
    total = torch.zeros(ROWS, ROWS)
    for n, (a, b) in enumerate(zip(left[0].split(TILE, 1), right[0].split(TILE, 1), strict=True)):
        total += tensor_core(a, b) * left[1][:, n, None] * right[1][:, n]
    return total


def tensor_core(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T in one accumulator."""
    held = torch.zeros(ROWS, ROWS)
    for a, b in zip(left.split(STEP, 1), right.split(STEP, 1), strict=True):
        parts = torch.cat((a[:, None, :] * b[None, :, :], held[..., None]), 2)
        quantum = torch.exp2(parts.abs().amax(2, keepdim=True).clamp_min(1e-38).log2().floor() - FRACTION_BITS)
        held = _cut((parts / quantum).trunc_().sum(2) * quantum[..., 0])
    return held


def _cut(x: Tensor) -> Tensor:
    """To 13 fraction bits."""
    return (x.view(torch.int32) & -(1 << 23 - FRACTION_BITS)).view(torch.float32)


def operands(kind: str, outliers: bool, depth: int) -> tuple[Tensor, Tensor]:
    """What a product of this kind multiplies: [128, depth] each, summed over the depth."""
    generator = torch.Generator().manual_seed(0)

    def normal(std: float) -> Tensor:
        return std * torch.randn(ROWS, depth, generator=generator)

    def channels(x: Tensor, dim: int) -> Tensor:
        if outliers:
            x *= torch.where(torch.rand(x.shape[dim], generator=generator) < 0.01, 50.0, 1.0).unsqueeze(1 - dim)
            x *= torch.exp(4 * torch.randn(x.shape[1 - dim], generator=generator)).unsqueeze(dim)
        return x

    if kind == "forward":  # tokens x channels, outputs x channels
        return channels(normal(1.0), 1), normal(0.02)
    if kind == "input gradient":  # tokens x outputs, inputs x outputs
        return channels(normal(1e-6), 1), normal(0.02)
    return channels(normal(1e-6), 0), channels(normal(1.0), 0)  # outputs x tokens, inputs x tokens


@dataclass(frozen=True)
class Error:
    mean: float
    worst: float

    @staticmethod
    def of(ours: Tensor, exact: Tensor) -> "Error":
        # A row that has vanished in both is no error of its sums.
        rows = (ours - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-300)
        return Error(rows.mean().item(), rows.max().item())

    def __str__(self) -> str:
        return f"{self.mean:.2%} ({self.worst:.2%})"


def errors(kind: str, recipe: Recipe, outliers: bool, depth: int) -> tuple[Error, Error, Error]:
    """Of quantising; of sums with promotion; of sums without, of the numbers before they are scaled."""
    left, right = operands(kind, outliers, depth)
    left_of, right_of = {
        "forward": (recipe.activation, recipe.weight),
        "input gradient": (recipe.gradient, recipe.weight),
        "weight gradient": (recipe.gradient, recipe.activation),
    }[kind]
    a, b = left_of(left), right_of(right)
    quantised = wide(a).double() @ wide(b).double().t()
    # Without promotion there is nowhere to apply scales, so the sums are those of the numbers.
    numbers = a[0].double() @ b[0].double().t()
    return (
        Error.of(quantised, left.double() @ right.double().t()),
        Error.of(hopper_sum(a, b), quantised),
        Error.of(tensor_core(a[0], b[0]), numbers),
    )


def draw(found: dict[tuple[str, str, bool], tuple[Error, Error, Error]], path: Path) -> None:
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dstrain"})
    kinds = list(dict.fromkeys(kind for kind, _, _ in found))
    figure, rows = pyplot.subplots(2, len(kinds), figsize=(11, 6.5), sharey=True, layout="constrained")
    for row, outliers in zip(rows, (False, True), strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            names = [recipe.name for recipe in RECIPES]
            for n, what in enumerate(("quantising", "sums, promoted every 128", "sums, not promoted")):
                heights = [found[kind, name, outliers][n].mean for name in names]
                axes.bar([place + 0.27 * (n - 1) for place in range(len(names))], heights, 0.25, label=what)
            axes.set(yscale="log", ylim=(3e-5, 1), title=f"{kind}, {'outliers' if outliers else 'random'}")
            axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7)
            axes.grid(axis="y", alpha=0.3)
        row[0].set_ylabel("relative error of a row, mean")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {}
    table = Table("product", "operands", "quantised in", "quantising", "sums, promoted", "not promoted")
    for kind in ("forward", "input gradient", "weight gradient"):
        for outliers in (False, True):
            for recipe in RECIPES:
                figures = errors(kind, recipe, outliers, arguments.depth)
                found[kind, recipe.name, outliers] = figures
                shown = ("outliers" if outliers else "random", recipe.name, *map(str, figures))
                table.add_row(kind, *shown, end_section=recipe is RECIPES[-1])
    Console(width=125).print(table)
    if arguments.out:
        draw(found, arguments.out)


if __name__ == "__main__":
    main()
