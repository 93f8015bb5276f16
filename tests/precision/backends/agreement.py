"""Whether a backend computes what the reference does, for every product and every kind of operand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dstrain.precision.backend import Backend
from dstrain.precision.formats import E4M3, E5M6
from dstrain.precision.quantize import quantize_rows
from dstrain.precision.reference import Reference

# Operands are rounded alike, so products differ by the rounding of their sums and results alone. The tensor cores of
# Hopper cut sums off behind some 14 bits, and torch rounds MXFP8 weight gradients of experts to BF16.
SHARES = {
    ("cpu", torch.float32): 2e-5,
    ("cpu", torch.bfloat16): 2**-7,
    ("cuda", torch.float32): 2**-8,
    ("cuda", torch.bfloat16): 2**-7,
}


@dataclass(frozen=True)
class Case:
    """Rows, out, in; of a SwiGLU's second product, in is its inner width."""

    shape: tuple[int, int, int]
    # Rows of each expert; None: one weight for all.
    counts: tuple[int, ...] | None = None
    device: str = "cpu"

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        x = torch.randn(*shape, generator=generator)
        x *= 2.0 ** torch.randint(-6, 7, (*shape[:-1], 1), generator=generator)
        return torch.where(torch.rand(*shape, generator=generator) < 0.01, 30 * x, x).to(self.device, dtype)

    @property
    def ends(self) -> Tensor | None:
        return (
            None if self.counts is None else torch.tensor(self.counts, device=self.device).cumsum(0, dtype=torch.int32)
        )

    @property
    def experts(self) -> tuple[int, ...]:
        return () if self.counts is None else (len(self.counts),)


def assert_products_agree(backend: Backend, case: Case) -> None:
    rows, out, depth = case.shape
    x, grad = (case.random(rows, width, dtype=backend.dtype) for width in (depth, out))
    weight = case.random(*case.experts, out, depth, dtype=backend.dtype)
    _assert_all_near(*(_products(b, x, grad, weight, case.ends) for b in _pair(backend)))


def assert_quantised_operands_agree(backend: Backend, case: Case) -> None:
    """What arrives quantised is used as it is."""
    rows, out, depth = case.shape
    scheme = backend.scheme
    x = quantize_rows(case.random(rows, depth, dtype=backend.dtype), scheme.activations, scheme.tile)
    grad = quantize_rows(case.random(rows, out, dtype=backend.dtype), scheme.gradients, scheme.tile)
    assert backend.activation(x)[1] is x
    weight = case.random(*case.experts, out, depth, dtype=backend.dtype)
    _assert_all_near(*(_products(b, x, grad, weight, case.ends) for b in _pair(backend)))


def assert_kept_agree(backend: Backend, case: Case) -> None:
    """What is kept in E4M3 and in E5M6, and what a weight gradient makes of it."""
    rows, out, depth = case.shape
    x, grad = (case.random(rows, width, dtype=backend.dtype) for width in (depth, out))
    found, expected = [], []
    for b, results in zip(_pair(backend), (found, expected), strict=True):
        for number in (E4M3, E5M6):
            kept = b.keep(x, number)
            columns = b.gradient(grad, case.ends)[1]
            results += [b.restore(kept), b.weight_gradient(columns, b.columns(kept, case.ends), case.ends)]
    _assert_all_near(found, expected)


def assert_gated_agree(backend: Backend, case: Case) -> None:
    """SwiGLU before a product, with weights of rows where there are experts. Its gradients on a slack of one E4M3 code:
    an exponential that differs in its last digit may round to the next."""
    rows, out, inner = case.shape
    gate_up, grad = (case.random(rows, width, dtype=backend.dtype).clamp_(-20, 20) for width in (2 * inner, inner))
    weight_R = None if case.counts is None else case.random(rows, 1, dtype=torch.float32).abs().flatten()
    weight = case.random(*case.experts, out, inner, dtype=backend.dtype)
    grad_out = case.random(rows, out, dtype=backend.dtype)

    def run(b: Backend) -> list[Tensor]:
        y = b.forward(b.gated(gate_up, weight_R), b.weight(weight), case.ends)
        back, back_R, columns = b.gated_back(b.keep(gate_up, E4M3), weight_R, grad, case.ends)
        dw = b.weight_gradient(b.gradient(grad_out, case.ends)[1], columns, case.ends)
        return [y, back, dw] + ([] if back_R is None else [back_R])

    for ours, theirs in zip(*(run(b) for b in _pair(backend)), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= 1e-2 * theirs.float().norm()


def _pair(backend: Backend) -> tuple[Backend, Backend]:
    return backend, Reference(backend.scheme, backend.dtype)


def _products(b: Backend, x, grad, weight: Tensor, ends: Tensor | None) -> list[Tensor]:
    operand, kept = b.activation(x)
    quantised = b.weight(weight)
    rows, columns = b.gradient(grad, ends)
    return [
        b.forward(operand, quantised, ends),
        b.input_gradient(rows, quantised, ends),
        b.weight_gradient(columns, b.columns(kept, ends), ends),
    ]


def _assert_all_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        # As a share of the row's size: single sums may cancel out.
        size = theirs.float().norm(dim=-1, keepdim=True)
        assert ((ours - theirs).float().abs() <= SHARES[ours.device.type, ours.dtype] * size).all()
