"""Compiles every Triton kernel for every GPU that has a use for it, and writes docs/kernels.md. Needs no GPU.

    python scripts/compile_kernels.py            writes the table
    python scripts/compile_kernels.py --check    exits with 1 if the table is not what is compiled now

Both exit with 1 if a kernel spills registers, or needs more shared memory than a chip has.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton

from dstrain.precision.kernels.ahead import BUILDS, SHARED_LIMIT, Compiled, compile_build
from dstrain.precision.kernels.build import CAPABILITIES, Work

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
NAMES = {80: "sm_80", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}

TEXT = """# Kernels

Written by `python scripts/compile_kernels.py`; `make check` compiles all of it again and compares. **Nothing here was
run on a GPU**: values are compared with plain PyTorch in Triton's interpreter (`tests/precision/kernels`), and what a
kernel takes of a chip is read out of the compiled code. Triton {version}.

## Registers, spills, shared memory

For each chip: registers of a thread / bytes spilled by it / KiB of shared memory of a block. The check fails if
anything is spilled, or if a block needs more than the chip has. Products on FP8 need capability 8.9; before that,
products are in BF16.

{resources}

## Matrix products

Instructions as they stand in the PTX. Intensity: operations per byte, if every operand came out of memory once.
Expected: how much of the chip's FP8 peak is left if tensor cores and memory ran at their peaks at the same time, and
scales and promotion (some FP32 operations per output for every 128 products) came on top, since the same warps do both.
It is an upper bound from vendors' data sheets, **not run on a GPU**.

{products}

## Chips

Dense FP8 with FP32 sums, FP32 outside the tensor cores, memory, and what one block may have of shared memory.

{chips}
"""


@dataclass(frozen=True)
class Chip:
    """Dense FP8 products with FP32 sums and FP32 outside the tensor cores (TFLOP/s), and memory (TB/s), from vendors'
    data sheets. `fp8` is 0 where products are in BF16."""

    name: str
    fp8: float
    fp32: float
    memory: float

    def expected(self, work: Work) -> float:
        tensor = work.flops / self.fp8
        return tensor / (max(tensor, work.bytes / self.memory) + work.fp32_flops / self.fp32)


CHIPS = {
    80: Chip("A100", 0, 19.5, 2.0),
    89: Chip("L40S", 733, 91.6, 0.864),
    90: Chip("H100 SXM", 1979, 67, 3.35),
    100: Chip("B200", 4500, 75, 7.7),
    120: Chip("RTX 5090", 419, 104.8, 1.79),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    table = compile_all()
    wrong = [f"{row.name}, {NAMES[row.capability]}: {fault}" for row in table for fault in row.faults]
    text = document(table)
    if not arguments.check:
        DOCUMENT.write_text(text, encoding="utf-8")
    elif not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
        wrong.append(f"{DOCUMENT.name} is not what is compiled now. Run python scripts/compile_kernels.py.")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(BUILDS)} kernels, {len(table)} times compiled: {'wrong' if wrong else 'well'}")
    return 1 if wrong else 0


def compile_all() -> list[Compiled]:
    pairs = [(place, capability) for place, build in enumerate(BUILDS) for capability in build.capabilities]
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(pool.map(_compile, *zip(*pairs, strict=True), chunksize=5))


def _compile(place: int, capability: int) -> Compiled:
    return compile_build(BUILDS[place], capability)


def document(table: list[Compiled]) -> str:
    resources = _resources({(row.name, row.capability): row for row in table})
    return TEXT.format(version=triton.__version__, resources=resources, products=_products(table), chips=_chips())


def _resources(found: dict[tuple[str, int], Compiled]) -> str:
    rows = []
    for build in BUILDS:
        cells = [found.get((build.name, capability)) for capability in CAPABILITIES]
        taken = [f"{c.registers} / {c.stack} / {c.shared / 1024:.1f}" if c else "-" for c in cells]
        rows.append([build.name, str(build.num_warps), *taken])
    return _table(["kernel", "warps", *(NAMES[c] for c in CAPABILITIES)], rows)


def _products(table: list[Compiled]) -> str:
    rows, works = [], {build.name: build.work for build in BUILDS}
    for row in table:
        if (work := works[row.name]) is not None:
            figures = [f"{work.flops / work.bytes:.0f}", f"{CHIPS[row.capability].expected(work):.0%}"]
            rows.append([row.name, work.shape, NAMES[row.capability], ", ".join(row.instructions), *figures])
    return _table(["kernel", "shape", "chip", "instructions", "intensity", "expected"], rows)


def _chips() -> str:
    rows = []
    for capability, chip in CHIPS.items():
        fp8 = f"{chip.fp8} TFLOP/s" if chip.fp8 else "-"
        shared = f"{SHARED_LIMIT[capability] >> 10} KiB"
        rows.append([NAMES[capability], chip.name, fp8, f"{chip.fp32} TFLOP/s", f"{chip.memory} TB/s", shared])
    return _table(["chip", "for example", "FP8", "FP32", "memory", "shared"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    sys.exit(main())
