"""Products in FP8 against the plain quantisers and FP64 sums, forward and backward; what is kept, when, and by whom.

Shapes: R rows, K in, M out, F inner width of a SwiGLU, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dstrain.precision import e5m6
from dstrain.precision.backend import Scheme
from dstrain.precision.chunked import chunked
from dstrain.precision.formats import E4M3, E5M6, FLOOR, Format, Scaling
from dstrain.precision.linear import Linear
from dstrain.precision.products import Products, cached_weights, gated, product, quantized
from dstrain.precision.quantize import (
    Quantized,
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)
from dstrain.precision.reference import Reference
from dstrain.precision.swiglu import swiglu_reference
from dstrain.precision.tensor import QuantizedTensor
from dstrain.precision.watch import CLASSES, Watch
from dstrain.precision.weight_gradients import Job, WeightGradients, used

M, K, F = 24, 296, 136
CPU = torch.device("cpu")
COUNTS = [None, (140, 0, 20), (0, 0, 0)]
PLAIN, POWER = Scheme(power_of_two=False), Scheme()
KINDS = [(PLAIN, torch.float32), (POWER, torch.float32), (POWER, torch.bfloat16)]
# Shares of the size of a row: of sums in FP32, and of results in BF16.
NEAR = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tiles of very different sizes, an outlier here and there."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-5, 5, (*shape[:-1], 1), generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.01, 30 * x, x).to(dtype)


def products(
    scheme: Scheme = POWER, dtype: torch.dtype = torch.float32, keeps: Format = E4M3, watch: Watch | None = None
) -> Products:
    return Products("w", Reference(scheme, dtype), watch or Watch(CPU), keeps)


def ends(counts: Sequence[int] | None) -> Tensor | None:
    return None if counts is None else torch.tensor(counts).cumsum(0, dtype=torch.int32)


def weight_of(counts: Sequence[int] | None, columns: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    weight = nn.Parameter(random(*(() if counts is None else (len(counts),)), M, columns, seed=7, dtype=dtype))
    # As an engine that adds up in FP32 says it.
    weight.grad_dtype = torch.float32
    return weight


def rows(x: Tensor, scaling: Scaling) -> Tensor:
    return dequantize_rows(quantize_rows(x, scaling))


def columns(x: Tensor, scaling: Scaling) -> Tensor:
    """Of one expert."""
    return dequantize_rows(quantize_columns(x, scaling)).t()[: len(x)]


def multiplied(x: Tensor, weight: Tensor, counts: Sequence[int] | None) -> Tensor:
    """x W in FP64, by expert."""
    if counts is None:
        return x.double() @ weight.double()
    parts = zip(x.double().split(list(counts)), weight.double(), strict=True)
    return torch.cat([part @ expert for part, expert in parts])


def weight_gradient(grad: Tensor, x: Tensor, counts: Sequence[int] | None, scheme: Scheme) -> Tensor:
    """Of both sides in columns of each expert, FP64."""
    split = [len(x)] if counts is None else list(counts)
    sums = [
        columns(g, scheme.gradients).double().t() @ columns(part, scheme.activations).double()
        for g, part in zip(grad.split(split), x.split(split), strict=True)
    ]
    return sums[0] if counts is None else torch.stack(sums)


def near(found: Tensor, expected: Tensor, share: float) -> bool:
    size = expected.norm(dim=-1, keepdim=True)
    return found.shape == expected.shape and bool(((found.double() - expected).abs() <= share * size).all())


def quantised_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    return dequantize_blocks(quantize_blocks(weight.detach(), scheme.activations))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("scheme", "dtype"), KINDS, ids=str)
def test_a_product_is_one_of_quantised_operands(scheme: Scheme, dtype: torch.dtype, counts: Sequence[int] | None):
    for count in [0, 160] if counts is None else [sum(counts)]:
        x, grad = random(count, K, dtype=dtype).requires_grad_(), random(count, M, dtype=dtype) * 2.0**-30
        weight = weight_of(counts, K, dtype)
        y = product(x, weight, ends(counts), products(scheme, dtype), None)
        y.backward(grad)
        weight8 = quantised_weight(weight, scheme)
        assert y.dtype == x.grad.dtype == dtype
        assert near(y, multiplied(rows(x.detach(), scheme.activations), weight8.mT, counts), NEAR[dtype])
        assert near(x.grad, multiplied(rows(grad, scheme.gradients), weight8, counts), NEAR[dtype])
        kept = rows(x.detach(), scheme.activations)
        assert weight.grad.dtype == torch.float32
        assert near(weight.grad, weight_gradient(grad, kept, counts, scheme), NEAR[torch.float32])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("scheme", "dtype"), KINDS, ids=str)
def test_swiglu_is_computed_again_from_what_was_kept(scheme: Scheme, dtype: torch.dtype, counts: Sequence[int] | None):
    count = 160 if counts is None else sum(counts)
    gate_up = (random(count, 2 * F, dtype=dtype) / 8).requires_grad_()
    grad, weight = random(count, M, seed=1, dtype=dtype), weight_of(counts, F, dtype)
    weight_R = None if counts is None else random(count, 1, seed=2).abs().flatten().requires_grad_()
    y = gated(gate_up, weight_R, weight, ends(counts), products(scheme, dtype), None)
    y.backward(grad)
    weight8 = quantised_weight(weight, scheme)
    inner = rows(swiglu_reference(gate_up.detach(), weight_R), scheme.activations)
    assert near(y, multiplied(inner, weight8.mT, counts), NEAR[dtype])
    kept = rows(gate_up.detach(), scheme.activations).to(dtype).requires_grad_()
    weights = None if weight_R is None else weight_R.detach().requires_grad_()
    again = swiglu_reference(kept, weights)
    again.backward(multiplied(rows(grad, scheme.gradients), weight8, counts).to(dtype))
    # Gradients are rounded before they are multiplied by SwiGLU's slopes, and after it.
    assert near(gate_up.grad, kept.grad.double(), 2 * NEAR[dtype])
    if weights is not None:
        assert weight_R.grad.dtype == torch.float32
        assert torch.allclose(weight_R.grad, weights.grad, rtol=4 * NEAR[dtype], atol=NEAR[dtype] * 100)
    assert near(weight.grad, weight_gradient(grad, again.detach(), counts, scheme), NEAR[torch.float32])


def kept_by(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and what the backward pass will need."""
    kept = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        return run(), kept


def test_activations_are_kept_in_one_byte():
    x, gate_up = random(160, 256).bfloat16().requires_grad_(), random(160, 512).bfloat16().requires_grad_()
    scales = 160 * 4
    _, kept = kept_by(lambda: product(x, weight_of(None, 256), None, products(dtype=torch.bfloat16), None))
    assert sum(t.nbytes for t in kept) == 160 * 256 + 2 * scales
    _, kept = kept_by(lambda: gated(gate_up, None, weight_of(None, 256), None, products(dtype=torch.bfloat16), None))
    assert sum(t.nbytes for t in kept) == 160 * 512 + 4 * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_input_kept_in_e5m6(dtype: torch.dtype):
    """It is multiplied in E4M3, and what is kept makes the weight gradient."""
    x, grad = random(160, K, dtype=dtype).requires_grad_(), random(160, M, seed=1, dtype=dtype)
    weight = weight_of(None, K, dtype)
    y, kept = kept_by(lambda: product(x, weight, None, products(POWER, dtype, E5M6), None))
    y.backward(grad)
    assert torch.equal(y, product(x, weight, None, products(POWER, dtype), None))
    packed = e5m6.pack(x.detach())
    assert {t.nbytes for t in kept} == {packed.values.nbytes, packed.scale.nbytes}
    expected = weight_gradient(grad, e5m6.unpack(packed, torch.float32), None, POWER)
    assert near(weight.grad, expected, NEAR[torch.float32])
    assert not near(weight.grad, weight_gradient(grad, rows(x.detach(), POWER.activations), None, POWER), 1e-3)


def coarse(x: Tensor) -> Quantized:
    """With scales that nobody would choose: quantised once more, it would be other numbers."""
    q = quantize_rows(x, Scaling(power_of_two=True))
    return Quantized(q.values, q.scale * 0.9)


class ArrivesAs(torch.autograd.Function):
    """The identity, whose gradient comes quantised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: QuantizedTensor) -> Tensor:
        ctx.grad = grad
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.grad, None


@pytest.mark.parametrize("counts", [None, (140, 0, 20)], ids=str)
def test_what_arrives_quantised_is_taken_as_it_is(counts: Sequence[int] | None):
    x8, grad8, weight = coarse(random(160, K)), coarse(random(160, M, seed=1)), weight_of(counts, K)
    x = QuantizedTensor(x8.values, x8.scale, torch.float32).requires_grad_()
    grad = QuantizedTensor(grad8.values, grad8.scale, torch.float32)
    y = product(x, weight, ends(counts), products(PLAIN), None)
    ArrivesAs.apply(y, grad).sum().backward()
    weight8 = quantised_weight(weight, PLAIN)
    assert near(y, multiplied(dequantize_rows(x8), weight8.mT, counts), NEAR[torch.float32])
    assert near(x.grad, multiplied(dequantize_rows(grad8), weight8, counts), NEAR[torch.float32])
    expected = weight_gradient(dequantize_rows(grad8), dequantize_rows(x8), counts, PLAIN)
    assert near(weight.grad, expected, NEAR[torch.float32])
    again, grad_again = rows(dequantize_rows(x8), PLAIN.activations), rows(dequantize_rows(grad8), PLAIN.gradients)
    assert not near(y, multiplied(again, weight8.mT, counts), 1e-3)
    assert not near(x.grad, multiplied(grad_again, weight8, counts), 1e-3)


def test_other_tiles_are_quantised_once_more():
    x8 = quantize_rows(random(160, K), Scaling(power_of_two=False), 32)
    x, weight = QuantizedTensor(x8.values, x8.scale, torch.float32, 32), weight_of(None, K)
    assert torch.equal(
        product(x, weight, None, products(), None), product(dequantize_rows(x8), weight, None, products(), None)
    )


def test_what_several_share_is_quantised_and_counted_once():
    watch, x = Watch(CPU), random(2, 80, K).requires_grad_()
    both = [products(watch=watch) for _ in range(2)]
    weight = weight_of(None, K)
    with watch.counting():
        shared = quantized(x, both[0])
        y, z = (product(shared, weight, None, each, None) for each in both)
    assert isinstance(shared, QuantizedTensor)
    assert watch.counts[0, 1] == x.numel()
    alone = product(x, weight, None, products(), None)
    assert torch.equal(y, alone)
    (y + 2 * z).sum().backward()
    (expected,) = torch.autograd.grad(3 * alone.sum(), x)
    assert torch.allclose(x.grad, expected, rtol=1e-5)


def test_what_swiglu_makes_is_looked_at_too():
    watch, gate_up, weight = Watch(CPU), random(160, 2 * F) / 8, weight_of(None, F)
    with watch.counting():
        gated(gate_up, None, weight, None, products(watch=watch), None)
    inner = swiglu_reference(gate_up)
    swiglu_row, activation_row = (watch.counts[CLASSES.index(kind)] for kind in ("swiglu", "activation"))
    assert swiglu_row[:2].tolist() == [gate_up.abs().max().item(), gate_up.numel()]
    assert activation_row[:2].tolist() == [inner.abs().max().item(), inner.numel()]
    with watch.naming() as broken:
        # Its square is beyond FP32.
        gated(torch.full((1, 2 * F), 1e20), None, weight, None, products(watch=watch), None)
    assert broken == [("activation", "w")]


def twice(x: Tensor, gate_up: nn.Parameter, down: nn.Parameter, each: Products) -> Tensor:
    hidden = product(x, gate_up, None, each, used(gate_up))
    return gated(hidden.repeat(1, 2), None, down, None, each, used(down))


def test_weight_gradients_may_be_computed_later():
    gate_up, down = weight_of(None, K, torch.bfloat16), weight_of(None, M, torch.bfloat16)
    x, each = random(160, K, dtype=torch.bfloat16).requires_grad_(), products(dtype=torch.bfloat16)
    grad = random(160, M, dtype=torch.bfloat16)
    expected = torch.autograd.grad(twice(x, gate_up, down, each), (x, gate_up, down), grad)
    gradients, jobs = WeightGradients(defers=True), list[Job]()
    with gradients.active(forward=True):
        y = twice(x, gate_up, down, each)
    with gradients.active(later=jobs):
        y.backward(grad)
    gradients.check_complete()
    assert gate_up.grad is None
    assert down.grad is None
    assert torch.equal(x.grad, expected[0])
    for job in jobs:
        job()
    for weight, theirs in zip((gate_up, down), expected[1:], strict=True):
        assert weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad, theirs)
        assert not torch.equal(theirs, theirs.bfloat16().float())


def test_recomputation_changes_nothing():
    gate_up, down, x = weight_of(None, K), weight_of(None, M), random(160, K).requires_grad_()
    results = []
    for again in (False, True):
        each = products()

        def run(x: Tensor, each: Products = each) -> Tensor:
            return twice(x.sin(), gate_up, down, each)

        y = checkpoint(run, x, use_reentrant=False) if again else run(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, gate_up, down))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_chunks_add_their_weight_gradients_in_fp32():
    counts, chunk, dtype = (140, 0, 116), 128, torch.bfloat16
    weight, each = weight_of(counts, M, dtype), products(dtype=dtype)
    x, grad = random(256, M, dtype=dtype), random(256, M, seed=1, dtype=dtype)

    def compute(x: Tensor, _: Tensor | None, ends_E: Tensor) -> Tensor:
        return product(x, weight, ends_E, each, None)

    chunked(compute, (weight,), x.requires_grad_(), None, ends(counts), chunk).backward(grad)
    whole, expected = ends(counts), torch.zeros(weight.shape)
    for begin in range(0, 256, chunk):
        y = compute(x[begin : begin + chunk], None, whole.clamp(begin, begin + chunk) - begin)
        expected += torch.autograd.grad(y, weight, grad[begin : begin + chunk])[0]
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, expected)


def test_chunks_take_what_arrives_quantised_as_it_is():
    counts, chunk, each = (140, 0, 116), 128, products(PLAIN)
    x8, grad8, weight = coarse(random(256, M)), coarse(random(256, M, seed=1)), weight_of(counts, M)
    x = QuantizedTensor(x8.values, x8.scale, torch.float32).requires_grad_()
    grad = QuantizedTensor(grad8.values, grad8.scale, torch.float32)

    def compute(x: Tensor, _: Tensor | None, ends_E: Tensor) -> Tensor:
        return product(x, weight, ends_E, each, None)

    y = chunked(compute, (weight,), x, None, ends(counts), chunk)
    ArrivesAs.apply(y, grad).sum().backward()
    weight8 = quantised_weight(weight, PLAIN)
    assert near(y, multiplied(dequantize_rows(x8), weight8.mT, counts), NEAR[torch.float32])
    assert near(x.grad, multiplied(dequantize_rows(grad8), weight8, counts), NEAR[torch.float32])


class Counting(Reference):
    """Counts how often it quantises a weight."""

    weights = 0

    def weight(self, weight: Tensor) -> Any:
        self.weights += 1
        return super().weight(weight)


def test_inside_cached_weights_each_is_quantised_once():
    layer, x, backend = Linear(K, M), random(160, K).requires_grad_(), Counting(POWER, torch.float32)
    layer.products = {"weight": Products("w", backend, Watch(CPU))}
    first = layer(x)
    first.sum().backward()
    assert backend.weights == 2
    with cached_weights(layer):
        for _ in range(2):
            y = layer(x)
            y.sum().backward()
    assert backend.weights == 3
    assert torch.equal(y, first)
    with torch.no_grad():
        layer.weight.mul_(-1)
    with cached_weights(layer):
        assert torch.equal(layer(x), -first)
    assert torch.equal(layer(x), -first)
    assert backend.weights == 5


def test_products_of_nothing_learnable():
    """Inputs without gradients, and weights that are not trained."""
    x, weight = random(160, K), weight_of(None, K)
    product(x, weight, None, products(), None).sum().backward()
    assert x.grad is None
    assert weight.grad.any()
    x, frozen = x.requires_grad_(), weight.detach()
    product(x, frozen, None, products(), None).sum().backward()
    assert x.grad.any()
    assert frozen.grad is None


def test_floors():
    """Gradients may be far smaller than 1e-4; activations below it count as so large."""
    assert POWER.activations.floor == FLOOR
    tiny = torch.full((128, 128), 1e-12)
    x, weight = torch.eye(128).requires_grad_(), torch.eye(128)
    y = product(x, weight, None, products(), None)
    y.backward(tiny)
    assert torch.allclose(x.grad, tiny, rtol=2**-4, atol=0)
    assert not product(tiny, weight, None, products(), None).any()
