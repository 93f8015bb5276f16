"""1F1B and interleaved 1F1B (Narayanan et al. 2021, Megatron-LM): after a warm-up, forward and backward alternate.

    rank 0 of 2    F0.0  F0.1  B0.0  F0.2  B0.1  B0.2
    rank 1 of 2    F1.0  B1.0  F1.1  B1.1  F1.2  B1.2

With overlap the two of an alternation are a pair, which begins when both inputs are there and gives both outputs at its
end. A micro-batch then goes one rank further with every pair, in both directions, so the warm-up is twice as long: in
step t rank p of P runs forward op number t - p and backward op number t - (stages + P - 1 - p).
"""

from collections.abc import Sequence

from dstrain.schedule.pipeline import Kind, Layout, Op, Pipeline, Slot


def one_f_one_b(ranks: int, micro_batches: int, overlap: bool = False) -> Pipeline:
    """Rank p of P has at most P - p micro-batches in flight, with overlap 2 (P - p)."""
    slots = []
    for rank in range(ranks):
        forwards, backwards = (
            [Op(kind, rank, i) for i in range(micro_batches)] for kind in (Kind.FORWARD, Kind.BACKWARD)
        )
        behind = ranks - 1 - rank
        slots.append(_alternating(forwards, backwards, 2 * behind + 1 if overlap else behind, overlap))
    return Pipeline("1f1b", Layout.looped(ranks, 1), micro_batches, tuple(slots))


def interleaved(ranks: int, micro_batches: int, chunks: int, overlap: bool = False) -> Pipeline:
    """Rank p holds stages p, P + p, 2 P + p, ... and lets P micro-batches pass one of them before it goes to the next.

    `micro_batches` is a multiple of `ranks`.
    """
    layout = Layout.looped(ranks, chunks)
    slots = []
    for rank, stages in enumerate(layout.held):
        forwards = _rounds(Kind.FORWARD, stages, ranks, micro_batches)
        backwards = _rounds(Kind.BACKWARD, stages[::-1], ranks, micro_batches)
        # The first micro-batch reaches the last stage, and its gradient this rank, after so many forward ops.
        warm_up = (chunks - 1) * ranks + 2 * (ranks - 1 - rank) + overlap
        slots.append(_alternating(forwards, backwards, warm_up, overlap))
    return Pipeline("interleaved", layout, micro_batches, tuple(slots))


def _rounds(kind: Kind, stages: Sequence[int], ranks: int, micro_batches: int) -> list[Op]:
    """Round by round: a batch of `ranks` micro-batches through each stage in turn."""
    return [
        Op(kind, stage, start + i) for start in range(0, micro_batches, ranks) for stage in stages for i in range(ranks)
    ]


def _alternating(forwards: Sequence[Op], backwards: Sequence[Op], warm_up: int, overlap: bool) -> tuple[Slot, ...]:
    warm_up = min(warm_up, len(forwards))
    slots: list[Slot] = [(op,) for op in forwards[:warm_up]]
    for pair in zip(forwards[warm_up:], backwards, strict=False):
        slots += [pair] if overlap else [(op,) for op in pair]
    slots += [(op,) for op in backwards[len(forwards) - warm_up :]]
    return tuple(slots)
