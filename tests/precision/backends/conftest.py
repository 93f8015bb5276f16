"""Backends run their kernels in the interpreter, too."""

from tests.precision.kernels.conftest import _exact_casts  # noqa: F401
