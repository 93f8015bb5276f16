"""A tensor that is already quantised, for functions that know of it; for all others it is what it stands for.

What arrives in FP8 and what several products share is quantised once: `QuantizedTensor` has shape and dtype of the
tensor it stands for, so that autograd gives it gradients of that dtype, and holds values and scales alone. Linears
and experts (precision/products.py) use them as they are; any other operation sees the dequantised tensor.

Shapes: ... leading dimensions, D of a row, S = ceil(D / tile), N rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dstrain.precision.formats import TILE
from dstrain.precision.quantize import Quantized, dequantize_rows

_aten = torch.ops.aten


@dataclass(frozen=True)
class Origin:
    """What rows were taken from, where they are many more: enough to keep, and to take them again."""

    rows: Quantized
    row_N: Tensor


class QuantizedTensor(Tensor):
    """`values` [..., D], float8_e4m3fn, times `scale` [..., S], FP32, seen as a tensor of `dtype`."""

    held: Quantized
    origin: Origin | None

    @staticmethod
    def __new__(
        cls, values: Tensor, scale: Tensor, dtype: torch.dtype, tile: int = TILE, origin: Origin | None = None
    ) -> "QuantizedTensor":
        seen: QuantizedTensor = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=dtype, device=values.device
        )
        seen.held, seen.origin = Quantized(values, scale, tile), origin
        return seen

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantizedTensor({tuple(self.shape)}, {self.dtype}, tiles of {self.held.tile})"

    @property
    def matrix(self) -> Quantized:
        """[N, D] and [N, S]."""
        return Quantized(self.held.values.flatten(0, -2), self.held.scale.flatten(0, -2), self.held.tile)

    def dequantize(self) -> Tensor:
        return dequantize_rows(self.held).to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        if func in (_aten.detach.default, _aten.alias.default):
            x = args[0]
            return QuantizedTensor(x.held.values, x.held.scale, x.dtype, x.held.tile, x.origin)
        if func is _aten.view.default and args[1][-1] == args[0].shape[-1]:
            return args[0]._with(lambda part: part.view(*args[1][:-1], part.shape[-1]))
        if func is _aten.slice.Tensor and args[1] == 0 and args[0].dim() > 1:
            return args[0]._with(lambda part: func(part, *args[1:]))
        plain_args, plain_kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "QuantizedTensor":
        """What `change` makes of values and scale."""
        return QuantizedTensor(change(self.held.values), change(self.held.scale), self.dtype, self.held.tile)
