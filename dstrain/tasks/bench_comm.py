"""`dstrain bench comm`: the links and collectives of a cluster, as a table and as a hardware file."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dstrain.bench.comm import Exchange, exchanges, speeds
from dstrain.bench.hardware_file import HardwareFile, calibrated
from dstrain.comm.agreement import on_first
from dstrain.comm.failure import blaming, unless_broken
from dstrain.comm.probe import Speed
from dstrain.config.bench import CommRoot
from dstrain.config.hardware import HardwareConfig
from dstrain.errors import UserError
from dstrain.mesh.groups import Groups, Place, connect, disconnect, mesh_of
from dstrain.mesh.topology import Link

# A pipe has no width of its own.
PIPE_WIDTH = 120
PLACES = {Link.NODE: "inside a node", Link.NETWORK: "between nodes"}


def run(config: CommRoot) -> None:
    """Measures on all ranks; the first one prints and writes comm.out."""
    place = Place.from_environment()
    mesh = mesh_of(config)
    groups = connect(mesh, place, config.mesh.timeout_s)
    with ExitStack() as stack:
        stack.push(unless_broken(disconnect))
        with blaming(place.rank, place.world, groups.trace):
            if groups.world is None:
                raise UserError("dstrain bench comm needs several processes.")
            on_first(_file(config).make_room, groups.background)
            links = speeds(groups.world)
            measured = list(exchanges(config, groups, groups.world, config.comm.rounds))
            on_first(lambda: _report(config, groups, links, measured), groups.background)


def _report(config: CommRoot, groups: Groups, links: Mapping[Link, Speed], measured: Sequence[Exchange]) -> None:
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    about = _about(config, groups)
    console.print(about, highlight=False, soft_wrap=True)
    console.print("\nEvery rank to all its peers of a kind at once, one direction:", _links_table(links), sep="\n")
    console.print("\nAt the sizes of the config, bytes of the busiest rank:", _exchanges_table(measured), sep="\n")
    file = _file(config)
    file.write(hardware(config.hardware, links, groups), [f"Measured by `dstrain bench comm`, {date.today()}.", about])
    console.print(f"Written: {file.path}.{file.use('train')}", highlight=False, soft_wrap=True, markup=False)


def _file(config: CommRoot) -> HardwareFile:
    return HardwareFile("comm.out", Path(config.comm.out))


def _about(config: CommRoot, groups: Groups) -> str:
    """What was measured on, and what the sizes are those of."""
    nodes = groups.topology.nodes(range(groups.place.world))
    device = torch.cuda.get_device_name() if groups.place.device.type == "cuda" else "CPU"
    model, train = config.model, config.train
    return (
        f"{groups.place.world} ranks on {len(nodes)} node{'s' * (len(nodes) > 1)}, {device}, "
        f"{dist.get_backend()}, torch {torch.__version__}; {train.micro_batch * train.seq_len} tokens x "
        f"{model.hidden_size} in {config.precision.compute_dtype}, "
        f"top {model.experts_per_token} of {model.num_experts} experts"
    )


def hardware(given: HardwareConfig, links: Mapping[Link, Speed], groups: Groups) -> HardwareConfig:
    """`given` with what was measured in the place of what it says about links; what was not measured stays."""
    nodes = groups.topology.nodes(range(groups.place.world))
    names, constants = {Link.NODE: "intra_node", Link.NETWORK: "inter_node"}, dict[str, float]()
    for link, speed in links.items():
        rate, us = _rounded(speed)
        constants |= {f"{names[link]}_gbytes_per_s": rate, f"{names[link]}_latency_us": us}
    found = replace(given, devices_per_node=max(map(len, nodes)))
    return calibrated(found, f"dstrain bench comm, {date.today()}", **constants)


def _rounded(speed: Speed) -> tuple[float, float]:
    """GB/s and microseconds, as far as a measurement can be trusted."""
    return float(f"{speed.gbytes_per_s:.3g}"), float(f"{speed.latency_s * 1e6:.3g}")


def _links_table(links: Mapping[Link, Speed]) -> Table:
    table = Table()
    for name in ("link", "GB/s a rank", "latency us"):
        table.add_column(name, justify="left" if name == "link" else "right")
    for link, speed in links.items():
        table.add_row(PLACES[link], f"{speed.gbytes_per_s:.3g}", f"{speed.latency_s * 1e6:.0f}")
    return table


def _exchanges_table(measured: Sequence[Exchange]) -> Table:
    """Rates are those of the bytes on the slower kind of link over the whole time."""
    table = Table()
    for name in ("exchange", "group", "ranks", "MB in node", "MB between", "ms", "GB/s"):
        table.add_column(name, justify="left" if name in ("exchange", "group") else "right")
    for each in measured:
        inside, between = each.sent_bytes[Link.NODE], each.sent_bytes[Link.NETWORK]
        rate = (between or inside) / each.ms / 1e6
        cells = f"{inside / 1e6:.3g}", f"{between / 1e6:.3g}", f"{each.ms:.3g}", f"{rate:.3g}"
        table.add_row(each.what, each.group, str(each.ranks), *cells)
    return table
