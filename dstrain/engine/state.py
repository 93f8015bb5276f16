"""What a training run has to remember, under names that do not depend on the layout.

Every tensor of the run is known by a logical name and its logical shape: `master/layers.3.moe.experts.down` is the FP32
weight of all experts of layer 3 whatever the layout. A rank holds ranges of the flattened tensor, mostly a single one,
and they are all a checkpoint needs to know to be read back in another layout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class FlatShard:
    """The range [offset, offset + local.numel()) of a logical tensor of `shape`, flattened in row-major order.

    Experts that have been moved are no run of neighbours any more: the range goes on elsewhere at every jump.
    `local` is a 1-D view of the live storage: loading a checkpoint writes into it.
    """

    shape: tuple[int, ...]
    offset: int
    local: Tensor
    # Where the range does not go on: (position in `local`, offset of its element in the tensor), in order.
    jumps: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.local.dim() != 1:
            raise ValueError(f"a range of {tuple(self.local.shape)} is not flat")
        for offset, part in self.ranges():
            if offset + part.numel() > prod(self.shape):
                raise ValueError(f"range {offset}+{tuple(part.shape)} does not lie in a tensor of {self.shape}")

    def ranges(self) -> Iterator[tuple[int, Tensor]]:
        """The contiguous ranges: offset in the tensor, and the part of `local` that holds them."""
        begins = ((0, self.offset), *self.jumps)
        ends = (*(position for position, _ in self.jumps), self.local.numel())
        for (begin, offset), end in zip(begins, ends, strict=True):
            yield offset, self.local[begin:end]

    @staticmethod
    def of_parts(shape: tuple[int, ...], offsets: Sequence[int], size: int, begin: int, local: Tensor) -> "FlatShard":
        """What `local` holds: the elements from `begin` on of a flat parameter made of parts of `size` elements, each
        of which begins at its own of `offsets` in the logical tensor."""
        first, last = begin // size, (begin + local.numel() - 1) // size
        jumps = tuple(
            (part * size - begin, offsets[part])
            for part in range(first + 1, last + 1)
            if offsets[part] != offsets[part - 1] + size
        )
        return FlatShard(shape, offsets[first] + begin % size, local, jumps)


# Logical name -> this rank's ranges. Ranks without a part of a tensor leave its name out; ranks that hold equal ranges
# hold equal values.
Shards = dict[str, FlatShard]


@dataclass(frozen=True)
class Progress:
    """How far the run is. Samples consumed is the whole state of the data loader."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
