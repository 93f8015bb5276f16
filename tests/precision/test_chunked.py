import pytest
import torch
from torch import Tensor

from dstrain.precision.chunked import chunked
from dstrain.precision.grouped import grouped_linear
from dstrain.precision.swiglu import swiglu
from dstrain.precision.weight_gradients import Job, WeightGradients

D, I, E = 16, 8, 4
COUNTS = [[5, 0, 9, 3], [17, 0, 0, 0], [0, 0, 0, 17], [1, 1, 1, 14]]


def inputs(dtype: torch.dtype, rows: int = 17) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, D), (E, 2 * I, D), (E, D, I))
    made = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    # Of a router, and so never narrow.
    return [*made, torch.randn(rows, generator=generator).requires_grad_()]


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


def whole(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor, weights: Tensor | None = None) -> Tensor:
    return grouped_linear(swiglu(grouped_linear(rows, gate_up, ends), weights), down, ends)


def in_chunks(chunk_rows: int):
    def run(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor, weights: Tensor | None = None) -> Tensor:
        def compute(rows: Tensor, weights: Tensor | None, ends: Tensor) -> Tensor:
            return whole(rows, gate_up, down, ends, weights)

        return chunked(compute, (gate_up, down), rows, weights, ends, chunk_rows)

    return run


def results(run, dtype: torch.dtype, counts: list[int], weighted: bool = True) -> list[Tensor]:
    """The output and the gradients of rows, weights of the experts, and weights of the rows."""
    rows, gate_up, down, weights = inputs(dtype, sum(counts))
    out = run(rows, gate_up, down, ends(counts), *[weights] * weighted)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    return [out, rows.grad, gate_up.grad, down.grad, *[weights.grad] * weighted]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 4, 8, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_chunks_compute_what_the_whole_does(counts: list[int], chunk_rows: int, dtype: torch.dtype, tolerance: float):
    for weighted in (False, True):
        expected = results(whole, dtype, counts, weighted)
        found = results(in_chunks(chunk_rows), dtype, counts, weighted)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_no_rows():
    out, *grads = results(in_chunks(4), torch.float32, [0] * E)
    assert out.shape == (0, D)
    assert [grad.abs().sum().item() for grad in grads] == [0, 0, 0, 0]


@pytest.mark.parametrize("deferred", [False, True])
def test_weight_gradients_go_where_they_are_wanted(deferred: bool):
    expected = results(whole, torch.float32, COUNTS[0])
    gradients, jobs = WeightGradients(defers=deferred), list[Job]()
    rows, gate_up, down, weights = inputs(torch.float32)
    with gradients.active(forward=True):
        out = in_chunks(4)(rows, gate_up, down, ends(COUNTS[0]), weights)
    with gradients.active(later=jobs):
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    gradients.check_complete()
    assert torch.allclose(rows.grad, expected[1], atol=1e-6)
    assert torch.allclose(weights.grad, expected[4], rtol=1e-5, atol=1e-5)
    assert (gate_up.grad is None and down.grad is None) is deferred
    for job in jobs:
        job()
    assert torch.allclose(gate_up.grad, expected[2], rtol=1e-5, atol=1e-5)
    assert torch.allclose(down.grad, expected[3], rtol=1e-5, atol=1e-5)


def test_nothing_but_the_rows_and_their_weights_is_kept_for_the_backward_pass():
    rows, gate_up, down, weights = inputs(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        in_chunks(4)(rows, gate_up, down, ends(COUNTS[0]), weights)
    given = {id(gate_up), id(down)}
    assert sum(x.numel() for x in kept if id(x) not in given) == rows.numel() + weights.numel() + E
