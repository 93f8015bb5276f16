"""A kernel with the arguments it is launched with, so that it can be compiled without a GPU (ahead.py).

Every module of kernels lists its own as BUILDS, with arguments and settings that its launching functions use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Compute capabilities that kernels are compiled for: A100, L40S, H100, B200, RTX 5090.
CAPABILITIES = (80, 89, 90, 100, 120)
WITH_FP8 = (89, 90, 100, 120)


@dataclass(frozen=True)
class Work:
    """What one launch of a matrix product does, for an estimate of its speed."""

    # "4096 x 7168 x 2048"
    shape: str
    # Operations of the tensor cores, two for a product and a sum.
    flops: int
    # Bytes that must come out of memory and go there, each once.
    bytes: int
    # FP32 operations outside the tensor cores: scales and promotion.
    fp32_flops: int


@dataclass(frozen=True)
class Build:
    """One row of the table for each capability."""

    # Unique in the table.
    name: str
    # A function under @triton.jit.
    kernel: Any
    # In the order of the kernel's parameters. A string is a type as Triton writes it: "i32", "fp32", "*bf16", "*u8";
    # pointers are multiples of 16 bytes, and so are integers with ":16", as the launcher would find of theirs. Anything
    # else is the value of a constexpr.
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    capabilities: tuple[int, ...] = CAPABILITIES
    # Of matrix products.
    work: Work | None = None
