"""Backends run their kernels in the interpreter, too; a CPU gets what torch has on GPUs alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.precision.kernels.conftest import _exact_casts  # noqa: F401


@pytest.fixture(autouse=True, scope="package")
def _wide_results() -> Iterator[None]:
    """Products of BF16 whose sums are not rounded to it."""
    library = torch.library.Library("aten", "IMPL")

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        return (left.float() @ right.float()).to(out_dtype)

    library.impl("mm.dtype", mm, "CPU")
    yield
    library._destroy()
