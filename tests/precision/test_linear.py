"""Linear layers, embeddings and grouped products whose weight gradients are computed apart: the same bits, in time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dstrain.precision.grouped import grouped_linear
from dstrain.precision.linear import Embedding, Linear, linear
from dstrain.precision.weight_gradients import Job, WeightGradients

ENDS = torch.tensor([3, 3, 7], dtype=torch.int32)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype))


def inputs(dtype: torch.dtype) -> Tensor:
    return parameter(2, 7, 8, dtype=dtype).detach().requires_grad_()


def arrivals(weight: nn.Parameter) -> list[Tensor]:
    """Takes every gradient that arrives, as an engine does."""
    found: list[Tensor] = []

    def take(weight: Tensor) -> None:
        if weight.grad is not None:
            found.append(weight.grad)
            weight.grad = None

    weight.register_post_accumulate_grad_hook(take)
    return found


USES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, nn.Parameter], Tensor]]] = {
    "linear": ((16, 8), linear),
    "linear of strided rows": ((16, 8), lambda x, weight: linear(x.transpose(0, 1), weight)),
    "grouped": ((3, 16, 8), lambda x, weight: grouped_linear(x[0], weight, ENDS)),
    "twice": ((8, 8), lambda x, weight: linear(linear(x, weight).relu(), weight)),
    "recomputed": ((8, 8), lambda x, weight: checkpoint(linear, x.sin(), weight, use_reentrant=False)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", USES)
def test_the_gradients_are_those_of_autograd(name: str, later: bool, dtype: torch.dtype):
    shape, use = USES[name]
    weight, x, jobs = parameter(*shape, dtype=dtype), inputs(dtype), list[Job]()
    y = use(x, weight)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.autograd.grad(y, (x, weight), grad)
    gradients, found = WeightGradients(defers=later), arrivals(weight)
    with gradients.active(forward=True):
        y = use(x, weight)
    with gradients.active(later=jobs):
        (grad_x,) = torch.autograd.grad(y, x, grad) if later else (None,)
        if not later:
            y.backward(grad)
            grad_x = x.grad
    assert len(found) == (0 if later else 1)
    gradients.check_complete()
    for job in jobs:
        job()
    assert torch.equal(grad_x, expected[0])
    assert len(found) == 1
    assert torch.equal(found[0], expected[1])


def test_linear_is_that_of_torch():
    ours, theirs, x = Linear(8, 16), nn.Linear(8, 16, bias=False), inputs(torch.float32)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))


def test_a_tied_weight_gets_one_gradient():
    """Looked up and multiplied by, in two backward passes."""
    embedding, tokens = Embedding(5, 8), torch.tensor([[1, 3, 1]])
    expected = F.linear(F.embedding(tokens, embedding.weight), embedding.weight).sin().sum()
    (expected,) = torch.autograd.grad(expected, embedding.weight)
    gradients, found = WeightGradients(defers=False), arrivals(embedding.weight)
    with gradients.active(forward=True):
        x = embedding(tokens)
        cut = x.detach().requires_grad_()
        loss = linear(cut, embedding.weight, shared=True).sin().sum()
    with gradients.active():
        loss.backward()
        assert not found
        x.backward(cut.grad)
    assert len(found) == 1
    assert torch.equal(found[0], expected)


def test_what_comes_early_is_added_in_its_turn():
    """Rounding tells the orders apart."""
    weight, gradients, jobs = parameter(1), WeightGradients(defers=True), list[Job]()
    found = arrivals(weight)
    parts = [torch.tensor([part]) for part in (1e8, 1.0, -1e8)]
    with gradients.active(forward=True):
        for _ in parts:
            gradients.used(weight)
    with gradients.active(later=jobs):
        for part in parts:
            assert gradients.take(weight, lambda part=part: part) is None
    for job in reversed(jobs):
        job()
    assert [gradient.item() for gradient in found] == [0.0]
    assert (1e8 - 1e8) + 1.0 == 1.0


def test_a_use_that_is_never_met_is_an_error():
    gradients = WeightGradients(defers=True)
    with gradients.active(forward=True):
        linear(inputs(torch.float32), parameter(16, 8))
    with pytest.raises(RuntimeError, match=r"shape \(16, 8\)"):
        gradients.check_complete()


def test_a_gradient_is_handed_over_without_a_copy():
    weight, gradients, jobs, made = parameter(64), WeightGradients(defers=True), list[Job](), list[int]()
    found = arrivals(weight)

    def compute() -> Tensor:
        gradient = torch.ones(64)
        made.append(gradient.data_ptr())
        return gradient

    with gradients.active(forward=True):
        gradients.used(weight)
    with gradients.active(later=jobs):
        gradients.take(weight, compute)
    jobs[0]()
    assert [gradient.data_ptr() for gradient in found] == made
