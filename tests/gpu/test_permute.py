"""Rows taken and summed by kernels on a GPU, against what a CPU does."""

import pytest
import torch

from dstrain.dispatch.permute import Bags
from dstrain.precision.formats import Scaling
from dstrain.precision.quantize import Quantized, quantize_rows
from dstrain.precision.rows import has_kernels, take_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_rows_are_taken_and_summed_as_on_a_cpu():
    rows_ND = torch.randn(5000, 1100).bfloat16()
    bags = Bags.by_target(torch.randint(0, 700, (5000,)), 701)
    assert has_kernels(rows_ND.cuda())
    ours = Bags(bags.order_N.cuda(), bags.start_R.cuda()).sum(rows_ND.cuda())
    assert torch.equal(ours.cpu(), bags.sum(rows_ND))
    q = quantize_rows(rows_ND, Scaling())
    taken = take_rows(Quantized(q.values.cuda(), q.scale.cuda()), bags.order_N.cuda())
    expected = take_rows(q, bags.order_N)
    assert torch.equal(taken.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(taken.scale.cpu(), expected.scale)
