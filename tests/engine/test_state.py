import pytest
import torch
from torch import Tensor

from dstrain.engine.state import FlatShard


def placed(shard: FlatShard, numel: int) -> Tensor:
    """The logical tensor as far as the shard fills it, -1 elsewhere."""
    flat = torch.full((numel,), -1.0)
    for offset, part in shard.ranges():
        flat[offset : offset + len(part)] = part
    return flat


def test_a_range_without_jumps_is_one_range():
    local = torch.arange(3.0)
    assert [(offset, part.tolist()) for offset, part in FlatShard((2, 4), 5, local).ranges()] == [(5, [0, 1, 2])]


@pytest.mark.parametrize("begin", range(12))
@pytest.mark.parametrize("numel", [1, 3, 4, 5])
def test_parts_lie_where_their_offsets_say(begin: int, numel: int):
    # A parameter of the parts 5, 0, 1 and 3 of a tensor of 6 parts, four elements each; every value is its own place.
    offsets = [20, 0, 4, 12]
    parameter = torch.cat([torch.arange(offset, offset + 4.0) for offset in offsets])
    shard = FlatShard.of_parts((6, 4), offsets, 4, begin, parameter[begin : begin + numel])
    flat = placed(shard, 24)
    assert sorted(flat[flat >= 0].tolist()) == sorted(parameter[begin : begin + numel].tolist())
    assert all(value in (-1, place) for place, value in enumerate(flat.tolist()))


def test_neighbours_are_one_range():
    shard = FlatShard.of_parts((6, 4), [0, 4, 12, 16], 4, 2, torch.arange(14.0))
    assert [(offset, len(part)) for offset, part in shard.ranges()] == [(2, 6), (12, 8)]


def test_ranges_are_views_of_the_storage():
    local = torch.zeros(8)
    for offset, part in FlatShard.of_parts((4, 4), [12, 0], 4, 0, local).ranges():
        part.fill_(offset + 1)
    assert local.tolist() == [13] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("offset", "jumps"), [(4, ()), (0, ((2, 5),))], ids=["first range too far", "second range too far"]
)
def test_ranges_lie_in_the_tensor(offset: int, jumps: tuple[tuple[int, int], ...]):
    with pytest.raises(ValueError, match="does not lie"):
        FlatShard((2, 3), offset, torch.zeros(4), jumps)


def test_a_shard_is_flat():
    with pytest.raises(ValueError, match="not flat"):
        FlatShard((2, 2), 0, torch.zeros(2, 2))
