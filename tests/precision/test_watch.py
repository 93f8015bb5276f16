"""What quantising loses, counted number by number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dstrain.precision import e5m6
from dstrain.precision.backend import MXFP8_TILE, Scheme
from dstrain.precision.quantize import Quantized, dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows
from dstrain.precision.watch import CLASSES, Watch, figures

BLOCKS, MXFP8 = Scheme(), Scheme(MXFP8_TILE, blocks=False)
CPU = torch.device("cpu")


def uneven(*shape: int) -> Tensor:
    """Many numbers vanish beside the largest of their tile; some are zero from the start."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-9, 1, shape, generator=generator)
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0)


def looked(kind: str, *tensors: Tensor | Quantized, scheme: Scheme = BLOCKS) -> dict[str, float]:
    watch = Watch(CPU)
    with watch.counting():
        for x in tensors:
            watch.look(kind, "somewhere", x, scheme)
    return figures(watch.counts)


def as_rows(scheme: Scheme, kind: str) -> Callable[[Tensor], Tensor]:
    scaling = scheme.gradients if kind == "gradient" else scheme.activations
    return lambda x: dequantize_rows(quantize_rows(x, scaling, scheme.tile))


ROUNDED = [
    *(
        (kind, scheme, as_rows(scheme, kind))
        for kind in ("activation", "swiglu", "gradient")
        for scheme in (BLOCKS, MXFP8)
    ),
    ("attention", BLOCKS, lambda x: e5m6.unpack(e5m6.pack(x), torch.float32)),
    ("weight", BLOCKS, lambda x: dequantize_blocks(quantize_blocks(x, BLOCKS.activations))),
    ("weight", MXFP8, as_rows(MXFP8, "weight")),
]


@pytest.mark.parametrize(("kind", "scheme", "rounded"), ROUNDED, ids=lambda x: x if isinstance(x, str) else "")
def test_figures_are_those_of_the_numbers(kind: str, scheme: Scheme, rounded: Callable[[Tensor], Tensor]):
    # The second is below the floor that activations and weights have.
    tensors = [uneven(140, 300), uneven(3, 200) * 1e-6]
    lost = sum(int(((x != 0) & (rounded(x) == 0)).sum()) for x in tensors)
    nonzero = sum(int((x != 0).sum()) for x in tensors)
    assert 0 < lost < nonzero
    assert looked(kind, *tensors, scheme=scheme) == {
        f"{kind}_amax": max(x.abs().max().item() for x in tensors),
        f"{kind}_underflow": lost / nonzero,
        f"{kind}_overflow": 0.0,
    }


def test_stacks_of_weights():
    """Of experts: each has blocks of its own."""
    stack = uneven(3, 140, 300)
    lost = sum(int(((x != 0) & (dequantize_blocks(quantize_blocks(x, BLOCKS.activations)) == 0)).sum()) for x in stack)
    assert looked("weight", stack)["weight_underflow"] == lost / int((stack != 0).sum())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_what_no_scale_fits_is_overflow(bad: float):
    """A tile of 128, and its magnitudes count for nothing else."""
    x = torch.ones(4, 256)
    x[2, 3], x[2, 4] = bad, 2e30
    found = looked("activation", x)
    assert found == {"activation_amax": 1.0, "activation_underflow": 0.0, "activation_overflow": 128 / 1024}


def test_what_arrived_quantised_is_taken_as_it_is():
    x = uneven(140, 300)
    q = quantize_rows(x, BLOCKS.gradients)
    q.scale[5, 1] = torch.nan
    found = looked("gradient", q)
    assert found["gradient_amax"] == dequantize_rows(q).nan_to_num(0.0).abs().max()
    # What it was before, nobody knows here.
    assert found["gradient_underflow"] == 0
    assert found["gradient_overflow"] == 128 / x.numel()


def test_classes_apart_and_from_zero():
    watch, x = Watch(CPU), uneven(10, 300)
    for factor in (100, 1):
        with watch.counting():
            watch.look("activation", "a", factor * x, BLOCKS)
            watch.look("gradient", "a", 2 * factor * x, BLOCKS)
    found = figures(watch.counts)
    assert set(CLASSES) > {name.partition("_")[0] for name in found} == {"activation", "gradient"}
    assert found["gradient_amax"] == 2 * found["activation_amax"] == 2 * x.abs().max()


def test_nothing_is_looked_at_unless_asked_for():
    watch = Watch(CPU)
    watch.look("activation", "a", uneven(10, 300), BLOCKS)
    with watch.counting():
        watch.look("activation", "a", uneven(0, 300), BLOCKS)
    assert not watch.counts.any()
    assert figures(watch.counts) == {}


def test_what_is_broken_is_named_in_its_order():
    watch, broken, good = Watch(CPU), torch.ones(2, 300), torch.ones(2, 300)
    broken[1, 299] = torch.nan
    arrived = quantize_rows(broken, BLOCKS.gradients)
    watch.look("activation", "before", broken, BLOCKS)
    with watch.naming() as found:
        watch.look("activation", "a", good, BLOCKS)
        watch.look("weight", "b", broken[None], BLOCKS)
        watch.look("gradient", "c", quantize_rows(good, BLOCKS.gradients), BLOCKS)
        watch.look("gradient", "d", arrived, BLOCKS)
        watch.look("attention", "e", broken, BLOCKS)
    watch.look("activation", "behind", broken, BLOCKS)
    assert found == [("weight", "b"), ("gradient", "d"), ("attention", "e")]
    assert not watch.counts.any()
