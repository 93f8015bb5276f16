"""Where weights are gathered in FP8 if it is left open."""

from typing import Any

import pytest

from dstrain.config.precision import gathers_fp8
from tests.tiny import tiny_config

FP8 = {"products": "fp8", "gather": "auto"}


@pytest.mark.parametrize(
    ("precision", "engine", "expected"),
    [
        (FP8, "torch", True),
        ({**FP8, "gather": "fp8"}, "torch", True),
        ({**FP8, "gather": "compute"}, "torch", False),
        ({**FP8, "products": "mxfp8"}, "torch", False),
        ({**FP8, "products": "compute"}, "torch", False),
        ({**FP8, "scales": "plain"}, "torch", False),
        (FP8, "deepspeed", False),
    ],
)
def test_auto_is_fp8_where_it_can_be(precision: dict[str, Any], engine: str, expected: bool):
    assert gathers_fp8(tiny_config(precision=precision, engine={"name": engine})) is expected
