"""A row per (token, rank), however many experts of the rank the token visits."""

from dstrain.dispatch.alltoall import AllToAllDispatcher


class RankDispatcher(AllToAllDispatcher):
    """As AllToAllDispatcher, with fewer rows; partial sums come home."""

    row_per_pair = False
