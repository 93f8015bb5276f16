"""What the check of compiled kernels says of bad ones. They are compiled in a process without an interpreter."""

import json
import os
import subprocess
import sys

import pytest
import triton

from dstrain.errors import UserError
from dstrain.precision.kernels.ahead import BUILDS, compile_build
from dstrain.precision.kernels.build import Build

PROGRAM = """
import json
from dataclasses import asdict, replace
from dstrain.precision.kernels.ahead import BUILDS, compile_build

builds = {build.name: build for build in BUILDS}
rows, gemm = builds["quantize rows"], builds["gemm rows"]
compiled = {
    "as it is": compile_build(rows, 80),
    "product": compile_build(gemm, 90),
    "few warps": compile_build(replace(gemm, num_warps=4), 90),
    "many stages": compile_build(replace(gemm, num_stages=6), 89),
}
print(json.dumps({name: asdict(found) | {"faults": found.faults} for name, found in compiled.items()}))
"""


def test_spills_and_too_much_shared_memory_are_found():
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=plain, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["as it is"]["faults"] == found["product"]["faults"] == []
    assert 0 < found["as it is"]["registers"] < 255
    assert "wgmma e4m3" in found["product"]["instructions"]
    assert [fault.startswith("spills") for fault in found["few warps"]["faults"]] == [True]
    assert [fault.startswith("needs") for fault in found["many stages"]["faults"]] == [True]


def test_names_are_unique():
    assert len({build.name for build in BUILDS}) == len(BUILDS)


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_arguments_are_those_of_the_kernel(build: Build):
    assert list(build.arguments) == list(build.kernel.arg_names)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled in this process")
def test_an_interpreter_is_refused():
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        compile_build(BUILDS[0], 80)
