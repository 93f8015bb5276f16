"""Which rank sits where: the mesh as pure integers.

Ranks are laid out pp x dp x ep with ep innermost, so that an expert-parallel group is a run of neighbouring ranks and
stays inside a node where it fits.

    rank = (pp_index * dp + dp_index) * ep + ep_index

Which stages of a pipeline the ranks with one pp index hold is up to its schedule (schedule/pipeline.py). Where two pp
indices hold the same stages, ranks of both hold the same parameters, and their gradients are summed together.
"""

from dataclasses import dataclass
from itertools import pairwise

from dstrain.schedule.pipeline import Layout


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
    # The stages of every pp index; None: one each.
    layout: Layout | None = None

    @property
    def stages(self) -> Layout:
        return self.layout or Layout(tuple((stage,) for stage in range(self.pp)))

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

    def _holders(self) -> list[list[int]]:
        """The pp indices that hold the same stages."""
        if not self.stages.mirrored:
            return [[p] for p in range(self.pp)]
        return [[p, self.pp - 1 - p] for p in range(self.pp // 2)]

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts."""
        return [
            [self.rank(p, d, e) for p in holders for d in range(self.dp)]
            for holders in self._holders()
            for e in range(self.ep)
        ]

    def data_groups(self) -> list[list[int]]:
        """Ranks that hold the same dense parameters: whole stages."""
        return [[rank for p in holders for rank in self._stage(p)] for holders in self._holders()]

    def _stage(self, p: int) -> range:
        return range(p * self.data, (p + 1) * self.data)

    def embedding_groups(self) -> list[list[int]]:
        """Ranks that hold the first or the last stage, where none holds both: the embedding may be on all of them."""
        first, last = ([p for p in range(self.pp) if s in self.stages.held[p]] for s in (0, self.stages.num_stages - 1))
        return [] if set(first) & set(last) else [[rank for p in first + last for rank in self._stage(p)]]

    def hops(self) -> list[tuple[int, int]]:
        """The pp indices (from, to) between which micro-batches pass from stage to stage in their forward pass."""
        held = self.stages.held
        if self.stages.mirrored:
            ways = [list(range(self.pp)), list(reversed(range(self.pp)))]
        else:
            ways = [[next(p for p in range(self.pp) if s in held[p]) for s in range(self.stages.num_stages)]]
        return sorted({(a, b) for way in ways for a, b in pairwise(way) if a != b})

    def pp_groups(self) -> list[list[int]]:
        """Ranks that a micro-batch travels through."""
        return [[self.rank(p, d, e) for p in range(self.pp)] for d in range(self.dp) for e in range(self.ep)]

    def local_experts(self, num_experts: int, ep_index: int) -> range:
        """The contiguous experts that an ep index holds; `num_experts` is a multiple of ep."""
        share = num_experts // self.ep
        return range(ep_index * share, (ep_index + 1) * share)
