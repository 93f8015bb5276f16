"""Which rank sits where: the mesh as pure integers.

Ranks are laid out pp x dp x ep with ep innermost, so that an expert-parallel group is a run of neighbouring ranks and
stays inside a node where it fits.

    rank = (pp_index * dp + dp_index) * ep + ep_index
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinate:
    """A rank's place on each axis."""

    pp: int
    dp: int
    ep: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes; every method is arithmetic on rank numbers."""

    pp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.ep

    @property
    def data(self) -> int:
        """Ranks of one stage that read different parts of the batch."""
        return self.dp * self.ep

    def coordinate(self, rank: int) -> Coordinate:
        rest, ep = divmod(rank, self.ep)
        pp, dp = divmod(rest, self.dp)
        return Coordinate(pp, dp, ep)

    def rank(self, pp: int, dp: int, ep: int) -> int:
        return (pp * self.dp + dp) * self.ep + ep

    def data_index(self, rank: int) -> int:
        """Position among the ranks that share the batch, 0 <= index < self.data."""
        return rank % self.data

    def ep_groups(self) -> list[list[int]]:
        """Ranks that together hold all experts of a layer."""
        return [[self.rank(p, d, e) for e in range(self.ep)] for p in range(self.pp) for d in range(self.dp)]

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts."""
        return [[self.rank(p, d, e) for d in range(self.dp)] for p in range(self.pp) for e in range(self.ep)]

    def data_groups(self) -> list[list[int]]:
        """Ranks that hold the same dense parameters: a whole stage."""
        return [list(range(p * self.data, (p + 1) * self.data)) for p in range(self.pp)]

    def pp_groups(self) -> list[list[int]]:
        """Ranks that a micro-batch travels through."""
        return [[self.rank(p, d, e) for p in range(self.pp)] for d in range(self.dp) for e in range(self.ep)]

    def local_experts(self, num_experts: int, ep_index: int) -> range:
        """The contiguous experts that an ep index holds; `num_experts` is a multiple of ep."""
        share = num_experts // self.ep
        return range(ep_index * share, (ep_index + 1) * share)
