"""Where rows and scales lie for libraries that want the rows of every expert to begin a tile of their own.

Everything is computed on the device, where alone the counts are known.

Shapes: R rows, E experts, P rows of all experts, each filled up to a multiple of 128; M rows of scales, S their
columns; B blocks of 128 rows, C blocks of four columns.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.precision.formats import TILE
from dstrain.precision.quantize import padded_rows


def padded_ends(ends_E: Tensor) -> Tensor:
    """Where each expert's rows end among P, int32 [E]."""
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    return ((counts_E + TILE - 1) // TILE * TILE).cumsum(0, dtype=torch.int32)


def padded_places(ends_E: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Where each row lies among P rows, int64 [R], and whose row each of those is: int32 [P], -1 for none.

    Rows behind the end of all experts count as the last one's.
    """
    row_R = torch.arange(rows, device=ends_E.device, dtype=ends_E.dtype)
    expert_R = torch.searchsorted(ends_E, row_R, right=True).clamp_(max=len(ends_E) - 1)
    moved_E = F.pad((padded_ends(ends_E) - ends_E)[:-1], (1, 0))
    place_R = (row_R + moved_E[expert_R]).long()
    owner_P = torch.full((padded_rows(rows, len(ends_E)),), -1, dtype=torch.int32, device=ends_E.device)
    return place_R, owner_P.index_copy_(0, place_R, expert_R.int())


def placed(rows: Tensor, place_R: Tensor, length: int) -> Tensor:
    """Rows [R, ...] of E4M3 or FP32 in their places among `length`, zeros around them."""
    bits = {1: torch.uint8, 4: torch.int32}[rows.itemsize]  # for E4M3 tensors know few operations
    return rows.new_zeros(length, *rows.shape[1:]).view(bits).index_copy_(0, place_R, rows.view(bits)).view(rows.dtype)


def swizzled(scale: Tensor) -> Tensor:
    """Powers of two [..., M, S] as tensor cores of capability 10.0 read them, E8M0 [..., B, C, 512].

    A block of 128 rows and 4 columns is 512 bytes in a row: that of row 32 a + b and column c is number 16 b + 4 a + c
    (SWIZZLE_32_4_4). Zero bytes fill up.
    """
    rows, columns = scale.shape[-2:]
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    whole = F.pad(exponents, (0, -columns % 4, 0, -rows % TILE))
    abc = whole.reshape(-1, whole.shape[-2] // TILE, 4, 32, whole.shape[-1] // 4, 4)
    blocks = abc.permute(0, 1, 4, 3, 2, 5).flatten(-3)
    return blocks.reshape(*scale.shape[:-2], *blocks.shape[1:]).view(torch.float8_e8m0fnu)


def by_expert(blocks_BC: Tensor, ends_E: Tensor) -> Tensor:
    """Blocks [B, C, ...] of columns P / 128, whose memory has the blocks of one expert behind those of another."""
    rows, columns = blocks_BC.shape[:2]
    place_C = torch.arange(columns, device=ends_E.device)
    # Those behind the last expert are one more.
    bounds = F.pad(padded_ends(ends_E) // TILE, (1, 1))
    bounds[-1] = columns
    expert_C = torch.searchsorted(bounds[1:-1], place_C, right=True)
    first_C, count_C = bounds[expert_C], bounds.diff()[expert_C]
    place_BC = first_C * rows + torch.arange(rows, device=ends_E.device)[:, None] * count_C + place_C - first_C
    flat = blocks_BC.flatten(0, 1).view(torch.uint8)
    return torch.empty_like(flat).index_copy_(0, place_BC.flatten(), flat).view(blocks_BC.dtype).view(blocks_BC.shape)
