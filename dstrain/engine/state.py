"""What a training run has to remember, under names that do not depend on the layout.

Every tensor of the run is known by a logical name and its logical shape: `master/layers.3.moe.experts.down` is the FP32
weight of all experts of layer 3 whatever the layout. A rank holds a contiguous range of the flattened tensor, and that
range is all a checkpoint needs to know to be read back in another layout.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class FlatShard:
    """The range [offset, offset + local.numel()) of a logical tensor of `shape`, flattened in row-major order.

    `local` is a 1-D view of the live storage: loading a checkpoint writes into it.
    """

    shape: tuple[int, ...]
    offset: int
    local: Tensor

    def __post_init__(self) -> None:
        if self.local.dim() != 1 or self.offset + self.local.numel() > prod(self.shape):
            raise ValueError(f"range {self.offset}+{tuple(self.local.shape)} does not lie in a tensor of {self.shape}")


# Logical name -> this rank's range. Ranks without a part of a tensor leave its name out; ranks that hold equal ranges
# hold equal values.
Shards = dict[str, FlatShard]


@dataclass(frozen=True)
class Progress:
    """How far the run is. Samples consumed is the whole state of the data loader."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
