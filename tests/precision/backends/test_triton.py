import pytest
import torch

from dstrain.precision.backend import Scheme
from dstrain.precision.backends.triton import TritonBackend
from tests.precision.backends.agreement import (
    Case,
    assert_gated_agree,
    assert_kept_agree,
    assert_products_agree,
    assert_quantised_operands_agree,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_fp8.py runs these on the GPU")

SCHEMES = [Scheme(power_of_two=True), Scheme(power_of_two=False)]
CASES = {
    "dense": Case((130, 136, 200)),
    "odd": Case((3, 17, 129)),
    "experts": Case((134, 40, 144), (0, 129, 0, 5)),
    "no rows": Case((0, 24, 32), (0, 0)),
}
CHECKS = [assert_products_agree, assert_quantised_operands_agree, assert_kept_agree, assert_gated_agree]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case: str, check):
    check(TritonBackend(SCHEMES[0], torch.float32), CASES[case])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_agrees_with_plain_scales(check):
    check(TritonBackend(SCHEMES[1], torch.float32), CASES["experts"])


def test_agrees_in_bfloat16():
    assert_products_agree(TritonBackend(SCHEMES[0], torch.bfloat16), CASES["dense"])
