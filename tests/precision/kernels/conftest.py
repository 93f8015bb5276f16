"""Kernels run in Triton's interpreter, whose conversions to narrower floats are wrong (triton#8322): ties go away from
zero, what carries out of the fraction is lost, BF16 is cut off. torch's take their place."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton import language as tl
from triton.runtime import interpreter

DTYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}


@pytest.fixture(autouse=True, scope="package")
def _exact_casts() -> Iterator[None]:
    """On a GPU nothing is changed, for there nothing is interpreted."""
    # What overflows belongs to tiles of NaN.
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore", invalid="ignore"):
        patch.setattr(interpreter, "_convert_float", convert)
        yield


def convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    """To the bits of another dtype, rounded to even; what is interpreted asks for no other rounding."""
    width = {8: np.uint8, 16: np.uint16, 32: np.uint32}
    bits = torch.from_numpy(np.ascontiguousarray(values).view(width[source.primitive_bitwidth]).copy())
    narrow = bits.view(DTYPES[source]).to(DTYPES[target]).contiguous()
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[narrow.itemsize]
    return narrow.view(unsigned).numpy().reshape(values.shape)
