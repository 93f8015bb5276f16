import pytest
import torch

from dstrain.precision.backend import Scheme
from dstrain.precision.backends.bf16 import Bf16Backend, dequantize_blocks
from dstrain.precision.reference import Reference
from tests.precision.backends.agreement import (
    Case,
    assert_gated_agree,
    assert_kept_agree,
    assert_products_agree,
    assert_quantised_operands_agree,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_fp8.py runs these on the GPU")

BACKEND = Bf16Backend(Scheme(), torch.bfloat16)
EXPERTS = Case((134, 40, 72), (0, 129, 5))
CASES = {"dense": Case((130, 136, 200)), "experts": EXPERTS, "no rows": Case((0, 24, 32))}


@pytest.mark.parametrize("case", CASES)
def test_products_agree_with_the_reference(case: str):
    assert_products_agree(BACKEND, CASES[case])


@pytest.mark.parametrize("check", [assert_quantised_operands_agree, assert_kept_agree, assert_gated_agree])
def test_experts_agree_with_the_reference(check):
    check(BACKEND, EXPERTS)


def test_nothing_is_rounded_between_operands_and_results():
    """On the bound of FP32."""
    assert_products_agree(Bf16Backend(Scheme(), torch.float32), Case((20, 136, 200)))


@pytest.mark.parametrize("shape", [(130, 200), (2, 130, 72)], ids=str)
def test_operands_are_exactly_those_of_the_reference(shape: tuple[int, ...]):
    x = EXPERTS.random(*shape, dtype=torch.bfloat16)
    weight, expected = BACKEND.weight(x), Reference(BACKEND.scheme, BACKEND.dtype).weight(x).over_in
    assert torch.equal(dequantize_blocks(weight.over_in), expected)
    assert torch.equal(dequantize_blocks(weight.over_out), expected.mT)
