"""Every backend for FP8 that this GPU can use, against the reference."""

import pytest
import torch
from torch import Tensor

from dstrain.config.schema import Config, ModelConfig, PrecisionConfig
from dstrain.errors import ConfigError
from dstrain.precision.backend import Backend
from dstrain.precision.backends.choose import BACKENDS, choose, make_backend
from dstrain.precision.grouped import grouped_linear
from dstrain.precision.products import Products, product
from dstrain.precision.watch import Watch
from tests.precision.backends.agreement import (
    Case,
    assert_gated_agree,
    assert_kept_agree,
    assert_products_agree,
    assert_quantised_operands_agree,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Sides of 32 fit every backend, those of 128 the fastest way through each, odd ones only Triton and BF16.
CASES = {
    "whole tiles": Case((512, 384, 256), None, "cuda"),
    "parts of tiles": Case((130, 160, 352), None, "cuda"),
    "odd": Case((77, 130, 33), None, "cuda"),
    "experts": Case((1021, 256, 384), (300, 0, 721), "cuda"),
    "experts, parts of tiles": Case((134, 96, 160), (0, 129, 0, 5), "cuda"),
    "no rows": Case((0, 64, 128), (0, 0), "cuda"),
}
CHECKS = [assert_products_agree, assert_quantised_operands_agree, assert_kept_agree, assert_gated_agree]


def backend(name: str, scales: str = "power_of_two") -> Backend:
    """Skips the test where this machine can't use it."""
    products = "mxfp8" if name == "mxfp8" else "fp8"
    config = Config(
        precision=PrecisionConfig(products=products, scales=scales, backend=name),
        model=ModelConfig(intermediate_size=704, moe_intermediate_size=192),
    )
    try:
        choice = choose(config, torch.device("cuda"))
    except ConfigError as error:
        pytest.skip(str(error))
    return make_backend(choice.backend, config.precision)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_agrees_with_the_reference(name: str, case: str, check):
    if name == "mxfp8" and case == "odd":
        pytest.skip("mxfp8 needs sides in multiples of 32")
    check(backend(name), CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["deepgemm", "scaled_mm", "triton"])
def test_agrees_with_plain_scales(name: str, case: str):
    assert_products_agree(backend(name, "plain"), CASES[case])


@pytest.mark.parametrize("name", ["deepgemm", "scaled_mm", "triton", "bf16"])
def test_experts_train_without_waiting_for_the_device(name: str):
    """Forward and backward pass of a product of experts, near that in BF16; the host learns no counts."""
    case = CASES["experts"]
    rows, out, depth = case.shape
    x, weight = case.random(rows, depth, dtype=torch.bfloat16), case.random(3, out, depth, dtype=torch.bfloat16)
    products = Products("experts", backend(name), Watch(torch.device("cuda")))
    grad = case.random(rows, out, dtype=torch.bfloat16)

    def run(compute) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
        y = compute(*leaves)
        y.backward(grad)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    ends = case.ends
    run(lambda x, w: product(x, w, ends, products, None))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(lambda x, w: product(x, w, ends, products, None))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, run(lambda x, w: grouped_linear(x, w, ends)), strict=True):
        assert (ours - theirs).float().norm() <= 0.1 * theirs.float().norm()
