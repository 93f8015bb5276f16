"""Counts the operations of matrix products while they run, on a device or on no memory at all (torch's meta device).

A product of [..., M, K] with [..., K, N] takes 2 M K N operations; everything else is not counted, as everywhere in the
field. Without a fused kernel attention is two products over all S x S scores, of which a causal kernel needs half.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_GROUPED = torch.ops.aten._grouped_mm.default
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, _GROUPED)


class FlopCounter(TorchDispatchMode):
    """Counts inside its `with`, the backward pass included, under what `place` says at the time."""

    def __init__(self, place: Callable[[], Hashable]):
        super().__init__()
        self._place = place
        self.flops: Counter[Hashable] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            left, right, *rest = args
            self.flops[self._place()] += 2 * left.numel() * right.shape[-1]
            if func is _GROUPED and left.is_meta:
                return _grouped_on_meta(left, right, rest[0])
        return func(*args, **(kwargs or {}))


def _grouped_on_meta(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """What comes out of a grouped product, without values: torch's own form for meta knows BF16 alone."""
    groups = (len(ends_E),) if right.dim() == 2 else ()
    return left.new_empty(*groups, left.shape[0], right.shape[-1])
