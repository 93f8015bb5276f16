"""Kernels compiled for every GPU by a machine without one: what they take of a chip's registers and shared memory.

Shared memory above a chip's limit fails at launch, and registers spilled into memory cost most of a kernel's speed.
Both show in the compiled code, for chips that nobody here has.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dstrain.errors import UserError
from dstrain.precision.kernels import e5m6, gemm, gemm_bf16, gemm_columns, permute, quantize, swiglu
from dstrain.precision.kernels.build import Build

MODULES = (quantize, swiglu, e5m6, permute, gemm, gemm_columns, gemm_bf16)
BUILDS: tuple[Build, ...] = tuple(build for module in MODULES for build in module.BUILDS)

# Bytes of shared memory that one block may use (CUDA C++ Programming Guide, technical specifications per capability).
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
RESERVED = 1 << 10

# What the PTX of a kernel is searched for: those that only some chips have.
INSTRUCTIONS = {
    "wgmma e4m3": r"wgmma\.mma_async\S*\.e4m3",
    "wgmma bf16": r"wgmma\.mma_async\S*\.bf16",
    "tcgen05 f8f6f4": r"tcgen05\.mma\S*kind::f8f6f4",
    "tcgen05 f16": r"tcgen05\.mma\S*kind::f16",
    "mma e4m3": r"mma\.sync\S*\.e4m3",
    "mma bf16": r"mma\.sync\S*\.bf16",
    "cp.async": r"cp\.async\.c[ag]",
    "TMA": r"cp\.async\.bulk\.tensor",
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of one chip."""

    # Of its build.
    name: str
    capability: int
    # Of a thread.
    registers: int
    # Bytes of memory for the registers that a thread lacks.
    stack: int
    # Bytes of a block, static and dynamic.
    shared: int
    # Those of INSTRUCTIONS that it uses.
    instructions: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """Why it can't run, or not well: empty if all is well."""
        found = []
        if self.stack:
            found.append(f"spills {self.stack} bytes a thread")
        if self.shared > SHARED_LIMIT[self.capability]:
            found.append(f"needs {self.shared} bytes of shared memory of {SHARED_LIMIT[self.capability]}")
        return found


def compile_build(build: Build, capability: int) -> Compiled:
    """UserError where the interpreter has taken the place of the compiler."""
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so kernels are not compiled. Unset it.")
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(_source(build), target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack, static = _resources(compiled.asm["cubin"])
    if capability >= 90:
        # Of what these chips keep for themselves, beside what a block may use.
        static = max(0, static - RESERVED)
    instructions = tuple(name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, compiled.asm["ptx"]))
    return Compiled(build.name, capability, registers, stack, static + compiled.metadata.shared, instructions)


def _source(build: Build) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(build.arguments.items()):
        if not isinstance(value, str):
            signature[name], constants[place,] = "constexpr", value
            continue
        signature[name] = value.removesuffix(":16")
        if value.startswith("*") or value.endswith(":16"):
            attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(build.kernel, signature, constants, attributes)


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack and of static shared memory."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "kernel.cubin")
        file.write_bytes(cubin)
        command = [_cuobjdump(), "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"]


@cache
def _cuobjdump() -> str:
    return triton.knobs.nvidia.cuobjdump.path
