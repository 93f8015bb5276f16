"""Where the rows of an expert lie, in a kernel: only the device knows how many each has.

Rows lie in the order of experts, without gaps, and `ends_E` (int32) says where each expert ends. A tile holds 128 rows
of one expert, so the last one of each expert may be part empty. There are as many programs as any split of the rows
could need; each finds its own by counting, and those left over find none.

Shapes: E experts, filled up to LANES, a power of two.
"""

import triton
from triton import language as tl


@triton.jit
def expert_of_tile(ends_E, tile, EXPERTS: tl.constexpr, LANES: tl.constexpr):
    """The expert whose rows a tile holds (EXPERTS or more: none), the tile's first row, and the expert's end."""
    lane = tl.arange(0, LANES)
    end_E, start_E, tiles_E = _tiles(ends_E, EXPERTS, LANES)
    tile_end_E = tl.cumsum(tiles_E)
    expert = tl.sum((tile_end_E <= tile).to(tl.int32))
    is_E = lane == expert
    before = tl.sum(tl.where(is_E, tile_end_E - tiles_E, 0))
    return expert, tl.sum(tl.where(is_E, start_E, 0)) + (tile - before) * 128, tl.sum(tl.where(is_E, end_E, 0))


@triton.jit
def tiles_of_expert(ends_E, expert, EXPERTS: tl.constexpr, LANES: tl.constexpr):
    """The first tile of an expert, and the number of its tiles."""
    lane = tl.arange(0, LANES)
    _, _, tiles_E = _tiles(ends_E, EXPERTS, LANES)
    return tl.sum(tl.where(lane < expert, tiles_E, 0)), tl.sum(tl.where(lane == expert, tiles_E, 0))


@triton.jit
def _tiles(ends_E, EXPERTS: tl.constexpr, LANES: tl.constexpr):
    """Ends, starts and numbers of tiles of all experts."""
    lane = tl.arange(0, LANES)
    end_E = tl.load(ends_E + lane, mask=lane < EXPERTS, other=0)
    start_E = tl.load(ends_E + lane - 1, mask=(lane > 0) & (lane < EXPERTS), other=0)
    return end_E, start_E, (end_E - start_E + 127) // 128
