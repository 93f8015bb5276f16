"""Experts forwards and backwards through autograd: both products, SwiGLU between them, what is cached in FP8."""

import pytest
import torch
from torch import Tensor

from dstrain.precision.backend import Backend, Scheme
from dstrain.precision.backends.triton import TritonBackend
from dstrain.precision.products import Products, gated, product
from dstrain.precision.reference import Reference
from dstrain.precision.watch import Watch
from tests.precision.backends.agreement import Case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_fp8.py runs backends on the GPU")

HIDDEN, INNER = 144, 72
CASE = Case((140, HIDDEN, INNER), (129, 0, 11))


def gradients(backend: Backend) -> list[Tensor]:
    """Output and gradients, for a gradient that is spread out of one number."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((140, HIDDEN), (3, 2 * INNER, HIDDEN), (3, HIDDEN, INNER), (140,))
    leaves = [torch.randn(*shape, generator=generator).mul_(0.3).requires_grad_() for shape in shapes]
    x, gate_up, down, weight_R = leaves
    first, second = (Products(name, backend, Watch(torch.device("cpu"))) for name in ("gate_up", "down"))
    y = gated(product(x, gate_up, CASE.ends, first, None), weight_R, down, CASE.ends, second, None)
    (y.sum() + (y * y).sum()).backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def test_gradients_are_those_of_the_reference():
    ours, theirs = (gradients(kind(Scheme(), torch.float32)) for kind in (TritonBackend, Reference))
    for own, reference in zip(ours, theirs, strict=True):
        assert own.dtype is torch.float32
        # A sum in another order may round an operand of the next product to the next code.
        assert (own - reference).norm() <= 5e-3 * reference.norm()
