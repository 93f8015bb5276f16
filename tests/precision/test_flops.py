"""Operations counted while products run: on a CPU and on no memory alike."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.precision.flops import FlopCounter
from dstrain.precision.grouped import grouped_linear

ROWS, WIDTH, OUT, EXPERTS = 24, 8, 12, 3


def layers(device: str) -> tuple[Tensor, list[Tensor]]:
    """A linear layer, a product of batches and one of experts, with the tensors that get gradients."""
    x = torch.ones(2, ROWS // 2, WIDTH, device=device, requires_grad=True)
    weight = torch.ones(WIDTH, WIDTH, device=device, requires_grad=True)
    experts = torch.ones(EXPERTS, OUT, WIDTH, device=device, requires_grad=True)
    ends_E = torch.arange(1, EXPERTS + 1, dtype=torch.int32, device=device) * (ROWS // EXPERTS)
    hidden = F.linear(x, weight)
    mixed = torch.matmul(hidden, hidden.transpose(1, 2)) @ hidden
    return grouped_linear(mixed.flatten(0, 1), experts, ends_E), [x, weight, experts]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_both_passes(device: str):
    place = "forward"
    counter = FlopCounter(lambda: place)
    with counter:
        y, leaves = layers(device)
        place = "backward"
        y.sum().backward()
    assert y.shape == (ROWS, OUT)
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)
    forward = 2 * ROWS * WIDTH * WIDTH + 2 * (2 * ROWS * (ROWS // 2) * WIDTH) + 2 * ROWS * WIDTH * OUT
    # Every product has two of its size in the backward pass.
    assert counter.flops == {"forward": forward, "backward": 2 * forward}


def test_nothing_is_counted_outside():
    counter = FlopCounter(lambda: None)
    layers("cpu")
    with counter:
        pass
    layers("cpu")
    assert not counter.flops


def test_grouped_products_on_meta_have_the_dtype_and_shape_of_real_ones():
    for dtype in (torch.float32, torch.bfloat16):
        real, none = (torch.zeros(ROWS, 8, dtype=dtype, device=device) for device in ("cpu", "meta"))
        shapes = []
        for x in (real, none):
            ends_E = torch.tensor([ROWS // 2, ROWS], dtype=torch.int32, device=x.device)
            with FlopCounter(lambda: None):
                shapes.append(F.grouped_mm(x.t(), x, offs=ends_E))
        assert (shapes[0].shape, shapes[0].dtype) == (shapes[1].shape, shapes[1].dtype) == ((2, 8, 8), dtype)
