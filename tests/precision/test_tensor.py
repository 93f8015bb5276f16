"""A quantised tensor is what it stands for, unless it is asked for what it holds.

Shapes: R rows, D of a row, S tiles of a row.
"""

import pytest
import torch
from torch import Tensor

from dstrain.precision.formats import Scaling
from dstrain.precision.quantize import dequantize_rows, quantize_rows
from dstrain.precision.rows import take_rows
from dstrain.precision.tensor import Origin, QuantizedTensor

SHAPE = (2, 6, 200)


def made(dtype: torch.dtype = torch.float32, tile: int = 128) -> tuple[QuantizedTensor, Tensor]:
    """One, and the tensor that it stands for."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    q = quantize_rows(x, Scaling(), tile)
    return QuantizedTensor(q.values, q.scale, dtype, tile), dequantize_rows(q).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [128, 32])
def test_it_looks_like_what_it_stands_for(dtype: torch.dtype, tile: int):
    x, plain = made(dtype, tile)
    assert (x.shape, x.dtype, x.device, x.stride()) == (plain.shape, plain.dtype, plain.device, plain.stride())
    assert torch.equal(x.dequantize(), plain)
    assert repr(x) == f"QuantizedTensor({SHAPE}, {dtype}, tiles of {tile})"


def test_operations_that_know_nothing_of_it_see_numbers():
    x, plain = made()
    for result, expected in (
        (x + x, plain + plain),
        (torch.cat((x, plain)), torch.cat((plain, plain))),
        (x[..., 3], plain[..., 3]),
        (x[:, 1:3, :130], plain[:, 1:3, :130]),
        (x.view(2, -1), plain.view(2, -1)),
        (x.view(-1), plain.view(-1)),
        (x.to(torch.float64), plain.double()),
        (x.transpose(0, 1), plain.transpose(0, 1)),
        (torch.where(plain > 0, x, 0.0), torch.where(plain > 0, plain, 0.0)),
    ):
        assert not isinstance(result, QuantizedTensor)
        assert torch.equal(result, expected)


def test_rows_stay_quantised_and_share_their_memory():
    x, plain = made(tile=32)
    found = {
        "view": (x.view(12, 200), plain.view(12, 200)),
        "reshape": (x.reshape(-1, 200), plain.reshape(-1, 200)),
        "rows": (x[1:], plain[1:]),
        "rows of rows": (x.view(12, 200)[3:7], plain.view(12, 200)[3:7]),
        "detach": (x.detach(), plain),
    }
    memory = [part.untyped_storage().data_ptr() for part in (x.held.values, x.held.scale)]
    for name, (result, expected) in found.items():
        assert isinstance(result, QuantizedTensor), name
        assert torch.equal(result.dequantize(), expected), name
        assert result.held.tile == 32
        assert [part.untyped_storage().data_ptr() for part in (result.held.values, result.held.scale)] == memory


def test_as_a_matrix():
    x, plain = made(torch.bfloat16, 32)
    assert (x.matrix.values.shape, x.matrix.scale.shape, x.matrix.tile) == ((12, 200), (12, 7), 32)
    assert torch.equal(dequantize_rows(x.matrix).to(torch.bfloat16), plain.view(12, 200))


def test_gradients_pass_through_it():
    x, plain = made(torch.bfloat16)
    x, plain = x.requires_grad_(), plain.requires_grad_()
    for each in (x, plain):
        (each.reshape(-1, 200)[2:9].float() ** 3).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert not isinstance(x.grad, QuantizedTensor)
    assert torch.equal(x.grad, plain.grad)


def test_it_is_kept_for_a_backward_pass_as_it_is():
    x, plain = made()
    kept = list[Tensor]()
    weight = torch.ones((), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = weight * x
    (y * 2).sum().backward()
    assert [isinstance(t, QuantizedTensor) for t in kept if t.shape == SHAPE] == [True]
    assert torch.allclose(weight.grad, 2 * plain.sum(), rtol=1e-5)


def test_origin_stays_where_all_rows_do():
    """Of other rows it would be wrong."""
    few = quantize_rows(torch.randn(2, 200, generator=torch.Generator().manual_seed(0)), Scaling())
    row_N = torch.tensor([1, 0, 1, 1])
    taken = take_rows(few, row_N)
    x = QuantizedTensor(taken.values, taken.scale, torch.float32, origin=Origin(few, row_N))
    assert x.origin is not None
    assert x.detach().origin is x.origin
    assert x[1:].origin is None
    assert x.view(2, 2, 200).origin is None
