"""How far FP8 is from BF16 and from FP32: the second half of `dstrain verify`, where precision.products says so.

Rounding differs in every product, and a token whose experts are nearly tied may choose another one, so single tensors
are far off even where all is well: what decides are the loss and the gradient as a whole. The loss may differ by 0.25 %
from that of BF16 (DeepSeek-V3, section B.1), as relative error of any step; a gradient of all parameters, by norm, by a
quarter; that of a single tensor, by its own length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Column, Table
from torch import Tensor

LOSS, WHOLE, TENSOR = 0.0025, 0.25, 1.0


@dataclass(frozen=True)
class Distance:
    """Relative errors of one run from another."""

    loss: float
    grad_norm: float
    # Of all gradients of the first step as one vector.
    whole: float
    # Of each of them, by norm.
    tensors: Mapping[str, float]

    @property
    def worst(self) -> str:
        return max(self.tensors, key=lambda name: self.tensors[name])

    def breaches(self, tolerance: float | None) -> list[str]:
        """What is too far off, with its limit. `tolerance`: instead of that for the gradient as a whole."""
        limits = {
            "loss": (self.loss, LOSS),
            "gradient": (self.whole, WHOLE if tolerance is None else tolerance),
            f"gradient of {self.worst}": (self.tensors[self.worst], TENSOR),
        }
        return [f"{name} {error:.2g} > {limit:g}" for name, (error, limit) in limits.items() if not error <= limit]


def limits(tolerance: float | None) -> str:
    """In words."""
    whole = WHOLE if tolerance is None else tolerance
    return f"limits: loss {LOSS:.2%}, whole gradient {whole:g}, any gradient {TENSOR:g}"


def distance(run: Mapping[str, Any], reference: Mapping[str, Any]) -> Distance:
    """Between two results of `verify.run_processes`; a tensor that one of them lacks is infinitely off."""
    ours, theirs = run["grads"], reference["grads"]
    names = sorted({*ours, *theirs})
    gaps = {name: _gap(ours.get(name), theirs.get(name)) for name in names}
    sizes = {name: _norm(theirs[name]) if name in theirs else 0.0 for name in names}
    return Distance(
        loss=_largest(run["losses"], reference["losses"]),
        grad_norm=_largest(run["norms"], reference["norms"]),
        whole=_length(gaps.values()) / _length(sizes.values()),
        tensors={name: 0.0 if gaps[name] == 0 else gaps[name] / (sizes[name] or 1e-45) for name in names},
    )


def table(distances: Mapping[str, Distance]) -> Table:
    """A column for each pair of runs."""
    drawn = Table(Column("relative error", no_wrap=True), *(Column(pair, overflow="fold") for pair in distances))
    rows = {
        "loss, any step": lambda d: d.loss,
        "norm, any step": lambda d: d.grad_norm,
        "whole gradient": lambda d: d.whole,
        "gradients, median": lambda d: median(d.tensors.values()),
        "gradients, worst": lambda d: d.tensors[d.worst],
    }
    for name, figure in rows.items():
        drawn.add_row(name, *(f"{figure(each):.1e}" for each in distances.values()))
    drawn.add_row("  of", *(each.worst for each in distances.values()))
    return drawn


def _gap(ours: Tensor | None, theirs: Tensor | None) -> float:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return torch.inf
    return _norm(ours.double() - theirs.double())


def _norm(x: Tensor) -> float:
    return float(x.double().norm())


def _length(parts: Any) -> float:
    return float(torch.tensor(list(parts), dtype=torch.float64).norm())


def _largest(ours: list[float], theirs: list[float]) -> float:
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(gaps) if all(gap == gap for gap in gaps) else torch.inf
