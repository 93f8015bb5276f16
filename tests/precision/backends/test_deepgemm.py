"""DeepGEMM's kernels run on no CPU: plain products with the arguments and the rules of its own take their place."""

import sys

import pytest
import torch
from torch import Tensor

from dstrain.precision.backend import Scheme
from dstrain.precision.backends.deepgemm import DeepGemmBackend
from dstrain.precision.quantize import Quantized, dequantize_blocks, dequantize_rows
from tests.precision.backends.agreement import Case, assert_products_agree

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_fp8.py runs these on the GPU")
Pair = tuple[Tensor, Tensor]


class StandIn:
    """The part of `deep_gemm` that is used; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def fp8_gemm_nt(
        self, a: Pair, b: Pair, d: Tensor, c: Tensor | None = None, recipe: tuple[int, int, int] | None = None
    ) -> None:
        self.calls.append("fp8_gemm_nt")
        wide = dequantize_rows if recipe == (1, 1, 128) else dequantize_blocks
        assert (c is None) == (recipe is None)
        d.copy_(dequantize_rows(Quantized(*a)) @ wide(Quantized(*b)).T + (0 if c is None else c))

    def m_grouped_fp8_gemm_nt_contiguous(self, a: Pair, b: Pair, d: Tensor, grouped_layout: Tensor) -> None:
        self.calls.append("m_grouped_fp8_gemm_nt_contiguous")
        assert grouped_layout.dtype is torch.int32
        x_PK, weight_EMK = dequantize_rows(Quantized(*a)), dequantize_blocks(Quantized(*b))
        d.fill_(torch.nan)
        for x, y, owner in zip(x_PK.split(128), d.split(128), grouped_layout.split(128), strict=True):
            owners = set(owner.tolist()) - {-1}
            assert len(owners) <= 1, "a block of 128 rows has one expert"
            for expert in owners:
                y[owner >= 0] = (x @ weight_EMK[expert].T)[owner >= 0].to(d.dtype)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in)
    return stand_in


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(power_of_two=False)], ids=["power of two", "plain"])
def test_single_weights(library: StandIn, scheme: Scheme):
    assert_products_agree(DeepGemmBackend(scheme, torch.float32), Case((130, 192, 64)))
    assert library.calls == ["fp8_gemm_nt"] * 3


@pytest.mark.parametrize("counts", [(3, 0, 130), (0, 0, 5), (128, 1, 0)], ids=str)
def test_experts(library: StandIn, counts: tuple[int, ...]):
    case = Case((sum(counts), 64, 128), counts)
    assert_products_agree(DeepGemmBackend(Scheme(), torch.float32), case)
    assert library.calls == ["m_grouped_fp8_gemm_nt_contiguous"] * 2


@pytest.mark.parametrize("case", [Case((9, 40, 64)), Case((9, 64, 72), (4, 5)), Case((0, 64, 64), (0, 0))], ids=str)
def test_what_it_does_not_take_is_left_to_triton(library: StandIn, case: Case):
    assert_products_agree(DeepGemmBackend(Scheme(), torch.float32), case)
    assert not library.calls
