"""Rows that are taken several times are kept once, and taken again for the backward pass."""

import torch
from torch import Tensor

from dstrain.precision.backend import Scheme
from dstrain.precision.formats import Scaling
from dstrain.precision.products import Products, product
from dstrain.precision.quantize import Quantized, quantize_rows
from dstrain.precision.reference import Reference
from dstrain.precision.rows import take_rows
from dstrain.precision.tensor import Origin, QuantizedTensor
from dstrain.precision.watch import Watch
from tests.precision.cases import matrix, same

ROW_N = torch.tensor([4, 0, 0, 2, 4, 1, 3, 0, 4, 2])


def test_values_and_scales_are_taken_together():
    for columns in (256, 200, 3):
        rows = quantize_rows(matrix(7, columns), Scaling())
        taken = take_rows(rows, ROW_N)
        assert torch.equal(taken.values.view(torch.uint8), rows.values.view(torch.uint8)[ROW_N])
        assert same(taken.scale, rows.scale[ROW_N])


def test_rows_inside_of_wider_ones():
    wide = torch.randint(0, 100, (7, 40), dtype=torch.uint8)
    for begin, end in ((0, 32), (8, 24), (3, 30)):
        rows = Quantized(wide[:, begin:end].view(torch.float8_e4m3fn), torch.ones(7, 1))
        assert torch.equal(take_rows(rows, ROW_N).values.view(torch.uint8), wide[ROW_N, begin:end])


def test_few_rows_are_kept_and_the_gradients_are_the_same():
    rows = quantize_rows(matrix(40, 256)[7:12], Scaling())
    taken, ends_E = take_rows(rows, ROW_N), torch.tensor([3, 10], dtype=torch.int32)
    found = []
    for origin in (None, Origin(rows, ROW_N)):
        weight = matrix(2 * 24, 256, seed=1)[:48].nan_to_num(0, 0, 0).clamp(-1, 1).view(2, 24, 256).requires_grad_()
        x = QuantizedTensor(taken.values, taken.scale, torch.float32, origin=origin).requires_grad_()
        products, kept = Products("w", Reference(Scheme(), torch.float32), Watch(torch.device("cpu"))), list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = product(x.detach().requires_grad_(), weight, ends_E, products, None)
        y.backward(torch.ones_like(y))
        found.append((y.detach(), weight.grad, sum(t.nbytes for t in kept if t.dtype is torch.float8_e4m3fn)))
    (y, grad, whole), (y_again, grad_again, few) = found
    assert torch.equal(y, y_again)
    assert torch.equal(grad, grad_again)
    assert grad.any()
    assert (whole, few) == (10 * 256, 5 * 256)
