"""Weights on their way to other ranks in FP8 (precision.gather): half the bytes of BF16, and no digit less.

What multiplies in FP8 is rounded to E4M3 with a scale for each 128x128 block of a matrix in any case, so it may be
rounded before it is gathered. Shares of a bucket cut matrices anywhere, and a block may lie in several of them:

    largest   each rank finds the largest magnitudes in its part of every block that it touches; these are gathered, and
              the larger one counts where two know of a block, so that all ranks have the same scales
    values    each rank rounds its share; the E4M3 are gathered, and become parameters again where they arrive

Scales are powers of two: what arrives is exact in BF16, and products that round it once more find the same values. One
process alone rounds its weights in the same way, so that any number of ranks compute with the same ones.

Shapes: S elements of a bucket, N ranks, B blocks of a bucket, T the most blocks that the rows of a share touch; of a
piece r rows and c columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.comm.collectives import Peers
from dstrain.comm.flat import FlatCollectives
from dstrain.comm.lane import Flight
from dstrain.precision.formats import FLOOR, TILE, Scaling
from dstrain.precision.rounding import e4m3_values, round_blocks

WEIGHTS = Scaling(power_of_two=True, floor=FLOOR)
# Of what is rounded at once, whose scales are spread over all elements.
PIECE_ELEMENTS = 1 << 20

Row = TypeVar("Row", int, Tensor)


def _tiles(length: int) -> int:
    return -(-length // TILE)


@dataclass(frozen=True)
class Stack:
    """Matrices [rows, columns], one below the other, that begin at element `start` of a bucket and at its block
    `first_block`. Blocks are counted matrix by matrix, row by row."""

    start: int
    count: int
    rows: int
    columns: int
    first_block: int

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.columns

    @property
    def block_shape(self) -> tuple[int, int]:
        return self.count * _tiles(self.rows), _tiles(self.columns)

    @property
    def blocks(self) -> slice:
        return slice(self.first_block, self.first_block + prod(self.block_shape))

    def block_row(self, row: Row) -> Row:
        """The row of blocks of a row: those of each matrix begin anew."""
        return row // self.rows * _tiles(self.rows) + row % self.rows // TILE


@dataclass(frozen=True)
class Piece:
    """A rectangle of a stack whose elements are neighbours: whole rows, or a part of one; they begin at `begin`."""

    stack: Stack
    begin: int
    row: int
    rows: int
    column: int
    columns: int

    def cut(self, flat: Tensor, offset: int = 0) -> Tensor:
        """Of a tensor whose first element is `offset` of the bucket, [r, c]."""
        begin = self.begin - offset
        return flat[begin : begin + self.rows * self.columns].view(self.rows, self.columns)

    def spread(self, of_block_B: Tensor) -> Tensor:
        """What each element's block has, [r, c]."""
        of_block = of_block_B[self.stack.blocks].view(self.stack.block_shape)
        first, last = self.stack.block_row(self.row), self.stack.block_row(self.row + self.rows - 1)
        column_c = torch.arange(self.column, self.column + self.columns, device=of_block.device) // TILE
        # Columns first, of few rows: whole rows are copied many times as fast as single elements.
        return of_block[first : last + 1][:, column_c][self._block_row(of_block.device) - first]

    def note_largest(self, x_rc: Tensor, largest_B: Tensor) -> None:
        """Raises the blocks' largest magnitudes to those of `x_rc`."""
        before, behind = self.column % TILE, -(self.column + self.columns) % TILE
        columns = slice(self.column // TILE, _tiles(self.column + self.columns))
        largest_rb = F.pad(x_rc.abs(), (before, behind)).unflatten(1, (-1, TILE)).amax(2)
        block_row_rb = self._block_row(x_rc.device)[:, None].expand_as(largest_rb)
        of_blocks = largest_B[self.stack.blocks].view(self.stack.block_shape)[:, columns]
        of_blocks.scatter_reduce_(0, block_row_rb, largest_rb, "amax")

    def _block_row(self, device: torch.device) -> Tensor:
        return self.stack.block_row(torch.arange(self.row, self.row + self.rows, device=device))


def stacks_of(starts: Sequence[int], shapes: Sequence[Sequence[int]]) -> list[Stack]:
    """Parameters [..., rows, columns] that begin at `starts`."""
    stacks, blocks = [], 0
    for start, shape in zip(starts, shapes, strict=True):
        stacks.append(Stack(start, prod(shape[:-2]), shape[-2], shape[-1], blocks))
        blocks = stacks[-1].blocks.stop
    return stacks


@dataclass
class Fp8Gather:
    """Of a bucket that holds `stacks`, gathered by `peers`; `shares` are the ranges that its ranks own."""

    stacks: list[Stack]
    shares: list[slice]
    peers: Peers | None
    device: torch.device
    _blocks: list[slice] = field(init=False)

    def __post_init__(self) -> None:
        self._blocks = [self._touched(share) for share in self.shares]

    @property
    def num_blocks(self) -> int:
        return self.stacks[-1].blocks.stop

    @property
    def sent_sizes(self) -> tuple[int, int]:
        """Bytes of the two buffers that are gathered."""
        return len(self.shares) * self._most_blocks * torch.float32.itemsize, self.shares[-1].stop

    @property
    def _most_blocks(self) -> int:
        return max(blocks.stop - blocks.start for blocks in self._blocks)

    def start(self, flat: FlatCollectives, master_share: Tensor, compute_S: Tensor) -> Flight | None:
        """Writes what all ranks' master weights are rounded to into `compute_S`; None if that has been done.

        Until the flight ends, neither tensor may be changed.
        """
        if self.peers is None:
            self.round(master_share, compute_S)
            return None
        own = self.shares[self.peers.index]
        made = partial(self._own_largest, self.peers.index, master_share)
        scales = flat.all_gather_made(made, self._scales, self.peers, "param", [master_share])

        def values() -> Tensor:
            bits_S = torch.empty(self.shares[-1].stop, dtype=torch.uint8, device=self.device)
            bits_S[own] = self._rounded(master_share, own, scales.result.result())
            return bits_S

        def write(bits_S: Tensor) -> Tensor:
            return self._write(bits_S, scales.result.result(), compute_S)

        return flat.all_gather_made(values, write, self.peers, "param", [master_share, compute_S])

    def round(self, wide_S: Tensor, compute_S: Tensor) -> None:
        """What the gather leaves behind, from the master weights of all ranks."""
        for stack in self.stacks:
            wide, out = (flat[stack.start : stack.start + stack.numel] for flat in (wide_S, compute_S))
            matrices = wide.view(stack.count, stack.rows, stack.columns)
            out.copy_(round_blocks(matrices, WEIGHTS, compute_S.dtype).view(-1))

    def _pieces(self, part: slice) -> Iterator[Piece]:
        for stack in self.stacks:
            first = max(part.start, stack.start) - stack.start
            last = min(part.stop, stack.start + stack.numel) - stack.start
            while first < last:
                (row, column), left = divmod(first, stack.columns), last - first
                rows, columns = 1, min(left, stack.columns - column)
                if columns == stack.columns:
                    rows = min(left // columns, max(1, PIECE_ELEMENTS // columns))
                yield Piece(stack, stack.start + first, row, rows, column, columns)
                first += rows * columns

    def _touched(self, part: slice) -> slice:
        """The rows of blocks in which a part of the bucket lies, as a range of blocks."""
        pieces = list(self._pieces(part))
        if not pieces:
            return slice(0, 0)
        first, last = pieces[0], pieces[-1]
        begin = first.stack.first_block + first.stack.block_row(first.row) * first.stack.block_shape[1]
        rows = last.stack.block_row(last.row + last.rows - 1) + 1
        return slice(begin, last.stack.first_block + rows * last.stack.block_shape[1])

    @cached_property
    def _sent_blocks(self) -> Tensor:
        """Which block each of the largest magnitudes that are gathered is of, [N * T]; B: of none."""
        block_NT = torch.full((len(self.shares), self._most_blocks), self.num_blocks)
        for block_T, blocks in zip(block_NT, self._blocks, strict=True):
            block_T[: blocks.stop - blocks.start] = torch.arange(blocks.start, blocks.stop)
        return block_NT.view(-1).to(self.device)

    def _own_largest(self, own: int, wide: Tensor) -> Tensor:
        """Of the share of rank `own`, in its place of [N * T]."""
        largest_NT = torch.zeros(len(self.shares), self._most_blocks, device=self.device)
        found = self._largest(wide, self.shares[own])[self._blocks[own]]
        largest_NT[own, : len(found)] = found
        return largest_NT.view(-1)

    def _scales(self, largest_NT: Tensor) -> Tensor:
        """Of all blocks, from what all ranks know of them."""
        largest_B = torch.zeros(self.num_blocks + 1, device=self.device)
        return WEIGHTS.scales(largest_B.scatter_reduce_(0, self._sent_blocks, largest_NT, "amax")[:-1])

    def _largest(self, wide: Tensor, part: slice) -> Tensor:
        """The largest magnitude of each block in a part of the bucket, [B]."""
        largest_B = torch.zeros(self.num_blocks, device=self.device)
        for piece in self._pieces(part):
            piece.note_largest(piece.cut(wide, part.start), largest_B)
        return largest_B

    def _rounded(self, wide: Tensor, part: slice, scale_B: Tensor) -> Tensor:
        """A part of the bucket as the bits of E4M3; 0 where a scale is NaN."""
        bits = torch.zeros(len(wide), dtype=torch.uint8, device=self.device)
        for piece in self._pieces(part):
            scaled_rc = piece.cut(wide, part.start) / piece.spread(scale_B)
            piece.cut(bits, part.start).copy_(scaled_rc.nan_to_num_(0.0).to(torch.float8_e4m3fn).view(torch.uint8))
        return bits

    def _write(self, bits_S: Tensor, scale_B: Tensor, compute_S: Tensor) -> Tensor:
        for piece in self._pieces(slice(0, len(bits_S))):
            piece.cut(compute_S).copy_(e4m3_values(piece.cut(bits_S)).mul_(piece.spread(scale_B)))
        return compute_S
