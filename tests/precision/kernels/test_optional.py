"""Triton is needed by who runs its kernels, and by nobody else."""

import subprocess
import sys

from tests.rules.tree import imports, modules

KERNELS = "dstrain.precision.kernels"
# Where `import triton` fails, as on a machine that has no package for it.
PROGRAM = """
import sys
sys.modules["triton"] = None
import dstrain.tasks.pretrain, dstrain.precision.reference, dstrain.precision.backends.choose
assert not [name for name in sys.modules if name.startswith("dstrain.precision.kernels")]
"""


def test_only_kernels_import_triton():
    users = [name for name in modules() if any(target.split(".")[0] == "triton" for target in imports(name))]
    assert users
    assert [name for name in users if not name.startswith(KERNELS)] == []


def test_training_imports_no_kernels():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
