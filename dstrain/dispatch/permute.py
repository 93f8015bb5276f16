"""Pairs of a row and an expert, in the order of rows and in the order of experts, and sums over a row's pairs.

A token, or a row that stands for it on its way, visits some experts: pairs (row, expert), in the order of rows. Experts
want one row per pair, in the order of experts; what they return is summed over the pairs of each row, and each of the
two is the gradient of the other. All of it costs a few passes over the pairs, however many experts there are.

Shapes: R rows, N pairs, E experts, D hidden, T tokens, K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.precision.quantize import Quantized
from dstrain.precision.rows import has_kernels, take_rows

# FP32 copies of rows are made of so many elements at a time: where a rank gets the tokens of all ranks, they would be
# the largest thing of a step. On a CPU a block stays in the cache, too.
WIDE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True)
class Pairs:
    """Visits in the order of rows: row number, expert number (int64) and weight (FP32) of each."""

    rows: int
    row_N: Tensor
    expert_N: Tensor
    weight_N: Tensor

    @staticmethod
    def of_tokens(experts_TK: Tensor, weights_TK: Tensor) -> "Pairs":
        """Pair t * K + k is token t's k-th."""
        tokens, per_token = experts_TK.shape
        row_N = torch.arange(experts_TK.numel(), device=experts_TK.device) // max(1, per_token)
        return Pairs(tokens, row_N, experts_TK.flatten(), weights_TK.detach().flatten().float())


@dataclass(frozen=True)
class Bags:
    """For each of R targets the elements that are summed into it: order_N[start_R[r] : start_R[r + 1]]."""

    order_N: Tensor
    start_R: Tensor

    @staticmethod
    def by_target(target_N: Tensor, targets: int) -> "Bags":
        """Element n goes to target_N[n]; the elements of a target are summed in their order."""
        return Bags(sort(target_N), starts(target_N, targets))

    def sum(self, rows_ND: Tensor) -> Tensor:
        """The sums, [R, D], added in FP32 in a fixed order."""
        if rows_ND.dtype is torch.bfloat16 and has_kernels(rows_ND):
            from dstrain.precision.kernels.permute import sum_rows

            return sum_rows(rows_ND, self.order_N, self.start_R)
        # Narrow rows are widened first: on a CPU the kernel rounds BF16 sums away from zero where two are equally near.
        if rows_ND.dtype is torch.float32:
            return self._sum(rows_ND)
        summed_RD = rows_ND.new_empty(len(self.start_R), rows_ND.shape[1])
        # By columns: every sum is over all of them, in one go, where it would need the counts of a block of rows.
        for columns in _blocks(rows_ND.shape[1], len(rows_ND), rows_ND.device):
            wide = rows_ND[:, columns].to(torch.float32, memory_format=torch.contiguous_format)
            summed_RD[:, columns] = self._sum(wide)
        return summed_RD

    def _sum(self, wide_ND: Tensor) -> Tensor:
        return F.embedding_bag(self.order_N, wide_ND, self.start_R, mode="sum")


def sort(keys_N: Tensor) -> Tensor:
    """The stable order of small non-negative numbers, int64 [N]."""
    return keys_N.int().argsort(stable=True)


def count(keys_N: Tensor, kinds: int) -> Tensor:
    """How often each number below `kinds` occurs, int64. The host would wait for the device in `bincount`."""
    return keys_N.new_zeros(kinds).scatter_add_(0, keys_N, torch.ones_like(keys_N))


def starts(keys_N: Tensor, kinds: int) -> Tensor:
    """How many numbers lie below each of 0 ... kinds - 1."""
    counts = count(keys_N, kinds)
    return counts.cumsum(0) - counts


def invert(order_N: Tensor) -> Tensor:
    """The inverse of a permutation."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))


@dataclass(frozen=True)
class Expansion:
    """One row per pair, in the order of experts, then of rows."""

    # Row of each expanded row.
    row_N: Tensor
    # Expanded row of each pair; summed over, the pairs of a row.
    bags: Bags
    counts_E: Tensor

    @staticmethod
    def of(pairs: Pairs, num_experts: int) -> "Expansion":
        order_N = sort(pairs.expert_N)
        bags = Bags(invert(order_N), starts(pairs.row_N, pairs.rows))
        return Expansion(pairs.row_N[order_N], bags, count(pairs.expert_N, num_experts))

    def expand(self, rows_RD: Tensor) -> Tensor:
        """Each row once for each of its experts, [N, D]."""
        return rows_RD.index_select(0, self.row_N)

    def expand_quantised(self, rows: Quantized) -> tuple[Tensor, ...]:
        """The same of quantised rows: values, scale, and what they were taken from, as `as_quantised` wants it."""
        taken = take_rows(rows, self.row_N)
        return taken.values, taken.scale, rows.values, rows.scale, self.row_N

    def sum(self, rows_ND: Tensor) -> Tensor:
        """The sum over each row's experts, [R, D] in the dtype of `rows_ND`."""
        return self.bags.sum(rows_ND)

    def by_expert(self, numbers_N: Tensor) -> Tensor:
        """A number of each pair, in the order of expanded rows."""
        return torch.empty_like(numbers_N).scatter_(0, self.bags.order_N, numbers_N)

    def by_pair(self, numbers_N: Tensor) -> Tensor:
        """A number of each expanded row, in the order of pairs: the inverse of `by_expert`, and its gradient."""
        return numbers_N[self.bags.order_N]


def _blocks(length: int, width: int, device: torch.device) -> Iterator[slice]:
    """Parts of `length` lines of `width` elements, no more than WIDE_ELEMENTS each."""
    size = max(1, WIDE_ELEMENTS[device.type] // max(1, width))
    yield from (slice(begin, begin + size) for begin in range(0, length, size))
