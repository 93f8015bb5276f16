"""What a precision may not be; where weights are gathered in FP8 if it is left open."""

from typing import Any

import pytest

from dstrain.config.precision import check_precision, gathers_fp8
from dstrain.errors import ConfigError
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


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"products": "fp16"}, "products=fp16: there is no such choice. Choose one of compute, fp8, mxfp8"),
        ({"scales": "ue8m0"}, "scales=ue8m0: there is no such choice. Choose one of power_of_two, plain"),
        ({"gradient_tiles": "columns"}, "gradient_tiles=columns: there is no such choice. Choose one of rows, blocks"),
        ({"watch_every_steps": -1}, "watch_every_steps=-1: it must be at least 0"),
        ({"products": "mxfp8", "scales": "plain"}, "scales=plain: mxfp8 has a power-of-two scale"),
        ({"products": "mxfp8", "gradient_tiles": "blocks"}, "gradient_tiles=blocks: mxfp8 has a power-of-two scale"),
    ],
)
def test_what_is_no_precision_is_refused(precision: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=f"^precision.{message}"):
        check_precision(tiny_config(precision={**FP8, **precision}))


@pytest.mark.parametrize("products", ["compute", "fp8"])
def test_scales_and_tiles_may_wait_for_products(products: str):
    check_precision(tiny_config(precision={"products": products, "scales": "plain", "gradient_tiles": "blocks"}))
