"""Kernels run in Triton's interpreter, whose conversions to narrower floats are wrong (triton#8322): ties go away from
zero, what carries out of the fraction is lost, BF16 is cut off. torch's take their place. Its products take the bits of
BF16 for integers, so they get the same numbers in FP32."""

from collections.abc import Callable, Iterator
from typing import Any

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
        patch.setattr(
            interpreter.InterpreterBuilder, "create_dot", exact_dot(interpreter.InterpreterBuilder.create_dot)
        )
        yield


def exact_dot(dot: Callable[..., Any]) -> Callable[..., Any]:
    """`dot` for operands in BF16 as well."""

    def widened(side: Any) -> Any:
        if side.dtype.scalar != tl.bfloat16:
            return side
        return interpreter.TensorHandle((side.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return lambda builder, left, right, *rest: dot(builder, widened(left), widened(right), *rest)


def convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    """To the bits of another dtype, rounded to even; what is interpreted asks for no other rounding."""
    width = {8: np.uint8, 16: np.uint16, 32: np.uint32}
    bits = torch.from_numpy(np.ascontiguousarray(values).view(width[source.primitive_bitwidth]).copy())
    narrow = bits.view(DTYPES[source]).to(DTYPES[target]).contiguous()
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[narrow.itemsize]
    return narrow.view(unsigned).numpy().reshape(values.shape)
