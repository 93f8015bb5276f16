"""What quantising does to the tensors of a step: their largest magnitude, and what is lost.

    underflow   numbers that are not zero and become zero, as a share of those that are not zero
    overflow    numbers in tiles that no scale fits, as a share of all

for each class of tensor: "activation", "swiglu" (cached inputs of SwiGLU), "attention" (cached in E5M6), "weight",
"gradient". Looking costs a second quantisation, so it is done on some steps only; scales are found in the tensors
themselves, so any overflow says that a tensor holds NaN or infinity. What comes quantised has lost its digits before:
gradients that arrive in FP8, and weights that are gathered so, of which none vanishes here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dstrain.precision import e5m6
from dstrain.precision.backend import Scheme
from dstrain.precision.quantize import Quantized, quantize_blocks, quantize_rows, spread

CLASSES = ("activation", "swiglu", "attention", "weight", "gradient")
# Per class: the largest magnitude; numbers, those that aren't zero, those that become zero, those out of range.
LARGEST, ALL, NONZERO, VANISHED, BEYOND = range(5)


class Watch:
    """Counts while it is switched on."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(len(CLASSES), 5, dtype=torch.float64, device=device)
        # Class and product of the tensors with NaN or infinity, in the order in which they are met; None: nobody asks.
        self.broken: list[tuple[str, str]] | None = None
        self._counts = False

    @property
    def is_on(self) -> bool:
        return self._counts or self.broken is not None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """From zero."""
        self.counts.zero_()
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    @contextmanager
    def naming(self) -> Iterator[list[tuple[str, str]]]:
        """Fills the list with class and product of tensors that hold NaN or infinity; the host waits for the device."""
        found: list[tuple[str, str]] = []
        self.broken = found
        try:
            yield found
        finally:
            self.broken = None

    def look(self, kind: str, name: str, x: Tensor | Quantized, scheme: Scheme) -> None:
        """At a matrix, or for "weight" a stack of them, that is about to be quantised or has arrived so."""
        if not self.is_on or _size(x) == 0:
            return
        kept, scale = _kept(kind, x, scheme)
        if self.broken is not None and scale.isnan().any():
            self.broken.append((kind, name))
        if self._counts:
            self._count(CLASSES.index(kind), x, kept, scale)

    def _count(self, row: int, x: Tensor | Quantized, kept: Tensor, scale: Tensor) -> None:
        counts, good = self.counts[row], ~scale.isnan()
        magnitude = (kept.abs() * scale if isinstance(x, Quantized) else x.float().abs()).masked_fill(~good, 0.0)
        counts[LARGEST] = torch.maximum(counts[LARGEST], magnitude.max())
        counts[ALL] += kept.numel()
        counts[NONZERO] += (magnitude != 0).sum()
        counts[VANISHED] += ((magnitude != 0) & (kept == 0)).sum()
        counts[BEYOND] += kept.numel() - good.sum()


def figures(counts_C5: Tensor) -> dict[str, float]:
    """Of classes that were met: "<class>_amax", "<class>_underflow", "<class>_overflow"."""
    found = {}
    for kind, row in zip(CLASSES, counts_C5.tolist(), strict=True):
        if row[ALL]:
            found[f"{kind}_amax"] = row[LARGEST]
            found[f"{kind}_underflow"] = row[VANISHED] / max(1.0, row[NONZERO])
            found[f"{kind}_overflow"] = row[BEYOND] / row[ALL]
    return found


def _kept(kind: str, x: Tensor | Quantized, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The numbers in their format, FP32, and the scale of each, both in the shape of `x`."""
    if isinstance(x, Quantized):
        return x.values.float(), spread(x.scale, x.values.shape[-1], x.tile)
    if kind == "attention":
        packed = e5m6.pack(x)
        scale = spread(packed.scale, packed.width)
        return e5m6.unpack(packed, torch.float32) / scale, scale
    if kind == "weight" and scheme.blocks:
        q = quantize_blocks(x, scheme.activations)
        rows, columns = q.values.shape[-2:]
        return q.values.float(), spread(spread(q.scale, columns).mT, rows).mT
    q = quantize_rows(x, scheme.gradients if kind == "gradient" else scheme.activations, scheme.tile)
    return q.values.float(), spread(q.scale, q.values.shape[-1], q.tile)


def _size(x: Tensor | Quantized) -> int:
    return (x.values if isinstance(x, Quantized) else x).numel()
