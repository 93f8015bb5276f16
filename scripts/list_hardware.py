"""Writes docs/hardware.md: every machine of conf/hardware with its constants and the evidence for each.

python scripts/list_hardware.py            writes the page
python scripts/list_hardware.py --check    exits with 1 if the page is not what would be written now
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from dstrain.config.hardware import HardwareConfig
from dstrain.config.machine import CONSTANTS
from dstrain.hardware import SPREAD, named, names

DOCUMENT = Path(__file__).parents[1] / "docs" / "hardware.md"
DEFAULTS = {entry.name: entry.default for entry in fields(HardwareConfig)}

TEXT = """# Machines

Written by `python scripts/list_hardware.py` out of `conf/hardware/*.yaml`; `make check` compares. These are the numbers
that `dstrain plan` computes with, per device, links in one direction. Peaks are dense. Capacities are in GiB, as CUDA
reports them; speeds are in GB of 10^9 bytes. No constant was taken from how long a whole training step took.

{overview}

Choose one by `hardware=<name>`, and change what differs in yours, for example with
`hardware=h100_sxm hardware.inter_node_gbytes_per_s=25`. `dstrain calibrate` writes a file of the machine it runs on.

## Evidence

The interval of a prediction moves every constant by the spread of its evidence, one at a time, and adds the changes in
squares (`dstrain/hardware.py`): about nine of ten such machines lie within.

{spreads}

{machines}"""

MEANING = {
    "specification": "data sheet, or what the driver reports",
    "calibration": "measured on the machine by `dstrain calibrate` or `dstrain bench comm`",
    "benchmark": "single kernels or links, measured and published by others",
    "trace": "a training step of others, looked into",
    "assumed": "neighbours, or experience; what no evidence names is assumed, too",
}

# Heading and keys of the overview.
COLUMNS = {
    "BF16": "peak_bf16_tflops",
    "FP8": "peak_fp8_tflops",
    "memory GiB": "memory_gib",
    "memory GB/s": "memory_gbytes_per_s",
    "devices a node": "devices_per_node",
    "GB/s inside": "intra_node_gbytes_per_s",
    "GB/s outside": "inter_node_gbytes_per_s",
    "$ an hour": "price_per_hour",
}


def page() -> str:
    machines = [named(name) for name in names()]
    return TEXT.format(
        overview=table(
            ["machine", *COLUMNS],
            ([each.name, *(number(getattr(each, key)) for key in COLUMNS.values())] for each in machines),
        ),
        spreads=table(
            ["evidence", "what it is", "spread"],
            ([kind, MEANING[kind], f"{spread:.0%}"] for kind, spread in SPREAD.items()),
        ),
        machines="\n\n".join(section(machine) for machine in machines) + "\n",
    )


def section(machine: HardwareConfig) -> str:
    """A machine, a row for each piece of evidence, and what is left to defaults."""
    found = {key for evidence in machine.evidence for key in evidence.of}
    rows = [[evidence.kind, constants(machine, evidence.of), evidence.source] for evidence in machine.evidence]
    left = [key for key in CONSTANTS if key not in found and DEFAULTS[key]]
    rows.append(["assumed", constants(machine, left), "default"])
    return f"## {machine.name}\n\n{table(['evidence', 'constants', 'source'], rows)}"


def constants(machine: HardwareConfig, which: Iterable[str]) -> str:
    return "<br>".join(f"`{name}` {getattr(machine, name):g}" for name in which)


def number(value: float) -> str:
    return f"{value:g}" if value else ""


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    text = page()
    if not parser.parse_args().check:
        DOCUMENT.write_text(text, encoding="utf-8")
    elif not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
        sys.exit(f"{DOCUMENT.name} is not what conf/hardware says: run python scripts/list_hardware.py.")


if __name__ == "__main__":
    main()
