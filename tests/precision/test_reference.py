"""The reference against the meaning of a block-scaled product: sums of each 128 in FP32, times their scales, added up.

Shapes: R rows, K in, M out, E experts; S tiles of a sum's dimension.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dstrain.precision import e5m6
from dstrain.precision.backend import MXFP8_TILE, Scheme
from dstrain.precision.formats import E4M3, E5M6, Scaling
from dstrain.precision.quantize import (
    Quantized,
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)
from dstrain.precision.reference import Reference
from tests.precision.cases import matrix, same

SCHEMES = [Scheme(), Scheme(power_of_two=False), Scheme(MXFP8_TILE, blocks=False)]
R, M, K = 150, 136, 296
COUNTS = [None, (20, 0, 130)]


def ordinary(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_steps(left: Quantized, right: Quantized) -> Tensor:
    """Rows times rows: [R, K] and [M, K] with a scale for each tile of a row, [R, M]."""
    total_RM = torch.zeros(len(left.values), len(right.values))
    for step in range(left.scale.shape[1]):
        part = slice(step * left.tile, (step + 1) * left.tile)
        sums_RM = left.values[:, part].float() @ right.values[:, part].float().t()
        total_RM += sums_RM * left.scale[:, step, None] * right.scale[None, :, step]
    return total_RM


def blocks_as_rows(q: Quantized) -> Quantized:
    """Each row with the scales of its blocks."""
    return Quantized(q.values, q.scale.repeat_interleave(128, 0)[: len(q.values)])


def weight_sides(weight_MK: Tensor, scheme: Scheme) -> tuple[Quantized, Quantized]:
    """In rows [M, K], and turned, [K, M]."""
    scaling = scheme.activations
    if scheme.blocks:
        q = quantize_blocks(weight_MK, scaling)
        return blocks_as_rows(q), blocks_as_rows(Quantized(q.values.t(), q.scale.t()))
    return quantize_rows(weight_MK, scaling, scheme.tile), quantize_rows(
        weight_MK.t().contiguous(), scaling, scheme.tile
    )


def ends(counts: Sequence[int] | None) -> Tensor | None:
    return None if counts is None else torch.tensor(counts).cumsum(0, dtype=torch.int32)


def near(found: Tensor, expected: Tensor) -> bool:
    size = expected.norm(dim=-1, keepdim=True)
    return found.shape == expected.shape and bool(((found - expected).abs() <= 2e-6 * size).all())


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_are_sums_of_scaled_sums(scheme: Scheme, counts: Sequence[int] | None):
    backend, split = Reference(scheme, torch.float32), [R] if counts is None else list(counts)
    x, grad, ends_E = ordinary(R, K), ordinary(R, M, seed=1), ends(counts)
    weight = ordinary(len(split), M, K, seed=2)
    # What is small beside its neighbours loses digits: a wrong tile shows where large gradients make up for it.
    sizes_M = 2.0 ** torch.randint(-9, 10, (M,), generator=torch.Generator().manual_seed(3))
    grad, weight = grad / sizes_M, weight * sizes_M[:, None]
    ready = backend.weight(weight[0] if counts is None else weight)
    operand, kept = backend.activation(x)
    grad_rows, grad_columns = backend.gradient(grad, ends_E)
    found_y, found_x = backend.forward(operand, ready, ends_E), backend.input_gradient(grad_rows, ready, ends_E)
    found_weight = backend.weight_gradient(grad_columns, backend.columns(kept, ends_E), ends_E).view(weight.shape)
    again, tile = dequantize_rows(kept), scheme.tile
    begin = 0
    for expert, count in enumerate(split):
        part = slice(begin, begin + count)
        over_in, over_out = weight_sides(weight[expert], scheme)
        assert near(found_y[part], by_steps(quantize_rows(x[part], scheme.activations, tile), over_in))
        assert near(found_x[part], by_steps(quantize_rows(grad[part], scheme.gradients, tile), over_out))
        sides = (
            quantize_columns(grad[part], scheme.gradients, tile=tile),
            quantize_columns(again[part], scheme.activations, tile=tile),
        )
        assert near(found_weight[expert], by_steps(*sides))
        begin += count


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_kept_is_what_the_quantiser_gives(scheme: Scheme):
    backend, x = Reference(scheme, torch.float32), matrix(40, K)
    _, kept = backend.activation(x)
    expected = quantize_rows(x, scheme.activations, scheme.tile)
    assert torch.equal(kept.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert same(kept.scale, expected.scale)
    assert kept.tile == scheme.tile
    assert same(backend.restore(backend.keep(x, E4M3)), dequantize_rows(expected))
    assert same(backend.restore(backend.keep(x, E5M6)), e5m6.unpack(e5m6.pack(x), torch.float32))


def test_operands_in_bf16_are_exact():
    """With powers of two they are the very numbers; plain scales need FP32."""
    x, weight = ordinary(R, K).bfloat16(), ordinary(M, K, seed=2).bfloat16()
    exact = Reference(Scheme(), torch.bfloat16)
    assert exact.activation(x)[0].dtype == exact.weight(weight).over_in.dtype == torch.bfloat16
    assert torch.equal(exact.activation(x)[0].float(), dequantize_rows(quantize_rows(x, exact.scheme.activations)))
    assert torch.equal(exact.weight(weight).over_in.float(), dequantize_blocks(quantize_blocks(weight, Scaling())))
    plain = Reference(Scheme(power_of_two=False), torch.bfloat16)
    operand = plain.activation(x)[0]
    assert torch.equal(operand, dequantize_rows(quantize_rows(x, plain.scheme.activations)))
    assert not torch.equal(operand, operand.bfloat16().float())
    for backend in (exact, plain):
        y = backend.forward(backend.activation(x)[0], backend.weight(weight), None)
        dw = backend.weight_gradient(y, x, None)
        assert (y.dtype, dw.dtype) == (torch.bfloat16, torch.float32)


def test_gradients_in_blocks():
    """Both products take the same numbers, rounded in blocks of 128 x 128."""
    grad = ordinary(R, M) * torch.exp(ordinary(R, 1, seed=1))
    rows, columns = Reference(Scheme(gradient_blocks=True), torch.float32).gradient(grad, None)
    assert torch.equal(rows, dequantize_blocks(quantize_blocks(grad, Scaling())))
    assert torch.equal(rows, columns)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_what_is_not_finite_shows(counts: Sequence[int] | None):
    """A tile of NaN reaches all that is computed from it, and nothing else."""
    backend, x, weight = Reference(Scheme(), torch.float32), ordinary(R, K), ordinary(3, M, K, seed=2)
    x[30, 5] = torch.inf
    ready = backend.weight(weight[0] if counts is None else weight)
    y = backend.forward(backend.activation(x)[0], ready, ends(counts))
    assert y.isnan().all(1).nonzero().flatten().tolist() == [30]
    assert y.isfinite().sum() == (R - 1) * M
