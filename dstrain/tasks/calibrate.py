"""`dstrain calibrate`: what the planner needs to know of this machine, measured, as a table and as a hardware file."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dstrain.bench.calibrate import Measured, measure
from dstrain.bench.hardware_file import HardwareFile
from dstrain.comm.agreement import on_first
from dstrain.comm.failure import blaming, unless_broken
from dstrain.config.bench import CalibrateRoot
from dstrain.config.hardware import HardwareConfig
from dstrain.data.tokenizer import embedding_rows, load_tokenizer
from dstrain.mesh.groups import Groups, Place, connect, disconnect, mesh_of

# A pipe has no width of its own.
PIPE_WIDTH = 120


def run(config: CalibrateRoot) -> None:
    """Measures on all ranks at once; the first one prints and writes calibrate.out."""
    place = Place.from_environment()
    groups = connect(mesh_of(config), place, config.mesh.timeout_s)
    with ExitStack() as stack:
        stack.push(unless_broken(disconnect))
        with blaming(place.rank, place.world, groups.trace):
            file = HardwareFile("calibrate.out", Path(config.calibrate.out))
            on_first(file.make_room, groups.background)
            config = on_first(lambda: _with_vocabulary(config), groups.background)
            measured = measure(config, groups, config.calibrate.rounds)
            on_first(lambda: _report(config, groups, measured, file), groups.background)


def _with_vocabulary(config: CalibrateRoot) -> CalibrateRoot:
    if config.model.vocab_size is not None:
        return config
    rows = embedding_rows(load_tokenizer(config.data.tokenizer))
    return replace(config, model=replace(config.model, vocab_size=rows))


def _report(config: CalibrateRoot, groups: Groups, measured: Measured, file: HardwareFile) -> None:
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    about = _about(config, groups)
    source = f"dstrain calibrate, {date.today()}: {about}"
    hardware = measured.constants(config.hardware, source)
    console.print(about, highlight=False, soft_wrap=True)
    console.print(_table(measured, hardware))
    file.write(hardware, [f"Measured by `dstrain calibrate`, {date.today()}.", about])
    console.print(f"Written: {file.path}.{file.use('plan')}", highlight=False, soft_wrap=True, markup=False)


def _about(config: CalibrateRoot, groups: Groups) -> str:
    """What was measured on, and at which sizes."""
    nodes = groups.topology.nodes(range(groups.place.world))
    device = torch.cuda.get_device_name() if groups.place.device.type == "cuda" else "CPU"
    model, train = config.model, config.train
    ranks = f"{groups.place.world} rank{'s' * (groups.place.world > 1)} on {len(nodes)} node{'s' * (len(nodes) > 1)}"
    return (
        f"{ranks}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; layers of "
        f"{model.hidden_size} x {model.moe_intermediate_size} x {model.num_experts} experts, {train.micro_batch} x "
        f"{train.seq_len} tokens in {config.precision.compute_dtype}"
    )


def _table(measured: Measured, hardware: HardwareConfig) -> Table:
    """Every constant with what was timed for it, what the plan makes of that, and where it is farthest off."""
    table = Table()
    for name in ("constant", "value", "from", "measured ms", "planned ms", "farthest off"):
        table.add_column(name, justify="left" if name in ("constant", "from", "farthest off") else "right")
    for key in (key for key in (*measured.facts, *measured.speeds) if key not in measured.samples):
        table.add_row(key, f"{getattr(hardware, key):.4g}", "", "", "", "")
    for key, samples in measured.samples.items():
        planned = [sample.predicted_s(hardware) for sample in samples]
        off = [plan / sample.seconds - 1 for plan, sample in zip(planned, samples, strict=True) if sample.seconds]
        worst = max(range(len(off)), key=lambda n: abs(off[n]), default=0)
        times = f"{sum(sample.seconds for sample in samples) * 1e3:.4g}", f"{sum(planned) * 1e3:.4g}"
        many = len(samples) > 1
        source = f"{len(samples)} shapes" if many else samples[0].what
        note = f"{off[worst]:+.0%} {samples[worst].what}" if many else ""
        table.add_row(key, f"{getattr(hardware, key):.4g}", source, *times, note)
    return table
