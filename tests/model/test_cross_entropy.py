"""Cross entropy that writes its gradient over the logits, against the plain form."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dstrain.model import cross_entropy as module
from dstrain.model.cross_entropy import cross_entropy, cross_entropy_reference

Loss = Callable[[Tensor, Tensor], Tensor]
# A gradient in BF16 is the same number in FP32 but for its last bits, rounded: next to each other at most.
BF16_ULP = 2**-7
WIDTH = 50


@pytest.fixture(autouse=True)
def three_tokens_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * WIDTH)


def sample(tokens: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    logits = (torch.randn(tokens, WIDTH, generator=generator) * scale).to(dtype)
    return logits, torch.randint(WIDTH, (tokens,), generator=generator)


def loss_and_gradient(loss: Loss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    total = loss(leaf * 1, targets)
    (total / 12).backward()
    return total.detach(), leaf.grad


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_plain_form(dtype: torch.dtype, tokens: int, scale: float) -> None:
    logits, targets = sample(tokens, dtype, scale)
    expected, gradient = loss_and_gradient(cross_entropy_reference, logits, targets)
    total, found = loss_and_gradient(cross_entropy, logits, targets)
    assert total.dtype == torch.float32
    assert found.dtype == dtype
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    relative = BF16_ULP if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, gradient, rtol=relative, atol=2e-8)


def test_logits_that_are_not_finite() -> None:
    """Minus infinity is a token that can't come; what is not a number stays that, in its row alone."""
    logits, targets = sample(8)
    logits[0, (targets[0] + 1) % WIDTH] = -torch.inf
    logits[4, 5] = torch.nan
    _, gradient = loss_and_gradient(cross_entropy_reference, logits, targets)
    _, found = loss_and_gradient(cross_entropy, logits, targets)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=2e-8, equal_nan=True)
    assert found[4].isnan().all()
    assert found[[0, 1, 2, 3, 5, 6, 7]].isfinite().all()


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    leaf, targets = sample(8)
    logits = leaf.requires_grad_() * 1
    before = logits.detach().clone()
    total = cross_entropy(logits, targets)
    assert torch.equal(logits, before)
    total.backward()
    assert torch.equal(logits, leaf.grad)
    assert not torch.equal(logits, before)


def test_two_heads_of_one_weight() -> None:
    """As with multi-token prediction: the gradient of the weight is the sum of both."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 8, 16), torch.randn(WIDTH, 16)
    targets = [torch.randint(WIDTH, (8,)) for _ in range(2)]

    def gradients(loss: Loss) -> tuple[Tensor, ...]:
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        first, second = (loss(inputs[0][n] @ inputs[1].T, targets[n]) for n in range(2))
        return torch.autograd.grad(first + 0.3 * second, inputs)

    torch.testing.assert_close(gradients(cross_entropy), gradients(cross_entropy_reference), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_second_backward_pass_is_refused(hooked: bool) -> None:
    logits, targets = sample(8)
    keep: Callable[[Tensor], Tensor] = (lambda x: x.clone()) if hooked else (lambda x: x)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = cross_entropy(logits.requires_grad_() * 1, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        total.backward()


def test_who_else_has_kept_the_logits_is_told() -> None:
    """The square needs its input: it raises, instead of taking the gradient for it."""
    leaf, targets = sample(8)
    logits = leaf.requires_grad_() * 1
    square = logits.square().sum()
    cross_entropy(logits, targets).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_recomputed_logits() -> None:
    logits, targets = sample(8)
    _, expected = loss_and_gradient(cross_entropy, logits, targets)

    def again(x: Tensor, targets: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda: cross_entropy(x * 1, targets), use_reentrant=False)

    _, found = loss_and_gradient(again, logits, targets)
    assert torch.equal(found, expected)


def test_without_gradients_logits_stay() -> None:
    logits, targets = sample(8)
    before = logits.clone()
    with torch.no_grad():
        total = cross_entropy(logits, targets)
    assert torch.equal(logits, before)
    assert not total.requires_grad


def kept_and_peak_bytes(loss: Loss) -> tuple[int, int]:
    """What autograd keeps of logits in BF16, and the most that the backward pass has beside what was there when it
    began."""
    logits, targets = sample(1024, torch.bfloat16)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.numel() == logits.numel():
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    shift = torch.zeros((), dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = loss(logits + shift, targets)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        total.backward()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return sum(kept.values()), peak


def test_a_logit_takes_two_bytes() -> None:
    logits = 1024 * WIDTH
    kept, peak = kept_and_peak_bytes(cross_entropy)
    assert kept == 2 * logits
    # Chunks.
    assert peak < 0.1 * logits
    kept, peak = kept_and_peak_bytes(cross_entropy_reference)
    assert kept == 4 * logits
    assert peak > 7 * logits
