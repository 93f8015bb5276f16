"""Cases as text."""

import pytest

from dstrain.bench.case import Case, parse
from dstrain.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "case", "name"),
    [
        ("alltoall", Case("alltoall", "bfloat16", 2), "alltoall/bfloat16/2"),
        ("rank/fp8", Case("rank", "fp8", 2), "rank/fp8/2"),
        ("rank/mxfp8", Case("rank", "mxfp8", 2), "rank/mxfp8/2"),
        ("alltoall/logfmt10/block", Case("alltoall", "logfmt10", 0), "alltoall/logfmt10/block"),
        ("hierarchical/fp4/3", Case("hierarchical", "fp4", 3), "hierarchical/fp4/3"),
        ("alltoall/bfloat16/block", Case("alltoall", "bfloat16", 0), "alltoall/bfloat16/block"),
        ("rank/fp8/zb_v", Case("rank", "fp8", None, "zb_v"), "rank/fp8/zb_v"),
        ("rank/fp8/1f1b+block", Case("rank", "fp8", 0, "1f1b"), "rank/fp8/1f1b+block"),
        ("rank/fp8/1f1b+overlap", Case("rank", "fp8", None, "1f1b", overlap=True), "rank/fp8/1f1b+overlap"),
        ("megatron", Case("megatron"), "megatron"),
    ],
)
def test_parse(text: str, case: Case, name: str):
    assert parse(text) == case
    assert parse(text).name == name
    assert parse(name) == case


@pytest.mark.parametrize(
    "text",
    ["", "alltoal", "rank/fp16", "rank/fp8/0", "rank/fp8/-1", "rank/fp8/x", "rank/fp8/2/2", "megatron/fp8"],
)
def test_what_there_is_not(text: str):
    refused(text)


@pytest.mark.parametrize("order", ["1f1b+", "2+block", "zbv", "+overlap", "zb_v+overlap+block"])
def test_orders_that_there_are_not(order: str):
    refused(f"rank/fp8/{order}")


def refused(text: str) -> None:
    with pytest.raises(ConfigError, match="there is no such case") as caught:
        parse(text)
    assert caught.value.field == "cases"
