"""The warning about a slow link: from real transfers, and not from a link that had nothing to do."""

import time
from dataclasses import replace

import pytest
import torch

from dstrain.comm.flat import FlatCollectives
from dstrain.comm.trace import Label, Transfer
from dstrain.config.hardware import HardwareConfig
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.mesh.topology import Link
from dstrain.metrics.links import LinkWatch, best_rate
from tests.gloo.spawn import spawn

MIB = 2**20


def transfer(start_s: float, end_s: float | None, **sent: int) -> Transfer:
    links = {Link[name.upper()]: num_bytes for name, num_bytes in sent.items()}
    return Transfer("dispatch", "ep", Label(), start_s, end_s, 0.0, links)


@pytest.mark.parametrize(
    ("transfers", "rate"),
    [
        ([transfer(0, 2, network=4 * MIB)], 2 * MIB),
        # Two that share the link for a while, and a better stretch after idle time.
        ([transfer(0, 2, network=MIB), transfer(1, 4, network=3 * MIB), transfer(9, 10, network=5 * MIB)], 5 * MIB),
        ([transfer(0, 2, network=MIB), transfer(1, 4, network=3 * MIB)], MIB),
        # Too short, too small, under way, on another link.
        ([transfer(0, 0.004, network=MIB), transfer(1, 2, network=1000), transfer(3, None, network=MIB)], 0.0),
        ([transfer(0, 2, node=4 * MIB)], 0.0),
    ],
)
def test_best_rate(transfers: list[Transfer], rate: float):
    assert best_rate(transfers, Link.NETWORK) == rate


def test_two_hops_say_nothing_about_the_node():
    transfers = [transfer(0, 10, network=MIB, node=MIB), transfer(20, 21, node=3 * MIB)]
    assert best_rate(transfers, Link.NODE) == 3 * MIB


def test_a_stage_that_is_busy_is_no_slow_link():
    held_up = replace(transfer(0, 100, network=2 * MIB), kind="pipe")
    assert best_rate([held_up, transfer(20, 21, network=3 * MIB)], Link.NETWORK) == 3 * MIB
    assert best_rate([held_up], Link.NETWORK) == 0


def watched(rank: int, world: int, gbytes_per_s: float, late_s: float, steps: int) -> list[str]:
    """Warnings of steps in which `late_s` pass before rank 0 takes part."""
    groups = connect(Mesh(dp=world), Place(rank, world, torch.device("cpu")), ranks_per_node=1)
    assert groups.data is not None
    watch = LinkWatch(HardwareConfig(inter_node_gbytes_per_s=gbytes_per_s), groups, window=2)
    flat, x, warnings = FlatCollectives(groups.trace), torch.ones(8 * MIB), []
    for _ in range(steps):
        if late_s:
            time.sleep(late_s if rank == 0 else 0.0)
            flat.reduce_scatter(x, groups.data, torch.float32, "grad").wait()
            # The end of a transfer is noted after its result.
            flat.reduce_scatter(x[:2], groups.data, torch.float32, "end").wait()
        warnings += watch.after_step(groups.trace.take())
    return warnings


def test_a_slow_link_is_named_once():
    for warnings in spawn(watched, 2, 1e6, 0.01, 4):
        (warning,) = warnings
        assert warning.startswith("warning: in the last 2 steps none of the ranks 0 to 1 sent more than")
        assert "GB/s over the network; hardware.inter_node_gbytes_per_s=1e+06. Check which interface" in warning


@pytest.mark.parametrize(("gbytes_per_s", "late_s"), [(0.05, 1.0), (1e6, 0.0), (0.0, 0.01)])
def test_no_warning(gbytes_per_s: float, late_s: float):
    """About a rank that keeps the others waiting, an idle link, and one that the hardware file doesn't know."""
    assert spawn(watched, 2, gbytes_per_s, late_s, 2) == [[], []]
