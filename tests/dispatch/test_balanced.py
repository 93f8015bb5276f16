"""The dispatcher of a dry run: shapes of both directions, and the bytes of every way."""

from typing import Any

import pytest
import torch

from dstrain.comm.trace import Trace
from dstrain.dispatch.balanced import BalancedDispatcher, sent_bytes
from dstrain.dispatch.choose import Task
from dstrain.dispatch.contract import Route
from dstrain.mesh.topology import Link
from dstrain.plan.traffic import Router, Rows, Way, exact, link_bytes
from dstrain.precision.tensor import QuantizedTensor
from tests.dispatch.cases import EXPERTS, TOKENS, WIDTH

META = torch.device("meta")
# Every token visits every expert, so that what is expected is what happens.
TASK = Task((2, 2), True, Router(EXPERTS, EXPERTS), TOKENS, Rows.of("fp8", "bfloat16", WIDTH))


@pytest.mark.parametrize("kind", ["alltoall", "rank", "hierarchical"])
def test_bytes_are_those_of_balanced_routes(kind: str):
    routes = [[list(range(EXPERTS))] * TOKENS] * 4
    messages = exact(kind, [[0, 1], [2, 3]], EXPERTS, routes)
    # All ranks together send four times what each sends.
    everyone = link_bytes(messages, [0, 0, 1, 1], TASK.rows)
    assert {place: 4 * num_bytes for place, num_bytes in sent_bytes(kind, TASK).items()} == everyone
    assert min(everyone.values()) > 0


def passed(dtype: torch.dtype, tile: int | None = None) -> dict[str, Any]:
    """Dispatch and combine, there and back."""
    trace, seen = Trace(META), []
    sends = {(way, link): 10 * place + (link is Link.NODE) for place, way in enumerate(Way) for link in Link}
    dispatcher = BalancedDispatcher(2, sends, trace, tile)
    x_TD = torch.empty(TOKENS, WIDTH, dtype=dtype, device=META, requires_grad=True)
    weights_TK = torch.empty(TOKENS, 4, device=META, requires_grad=True)
    route = Route(torch.empty(TOKENS, 4, dtype=torch.int64, device=META), weights_TK)
    with trace.at(direction="forward"):
        arrived = dispatcher.dispatch(x_TD, route).wait()
        made_RD = arrived.rows_RD * 2
        made_RD.register_hook(lambda grad_RD: seen.append(grad_RD))
        y_TD = dispatcher.combine(made_RD, arrived.ticket).wait()
    with trace.at(direction="backward"):
        y_TD.backward(torch.empty_like(y_TD))
    return {
        "gradient": seen[0],
        "arrived": arrived,
        "y": y_TD,
        "x": x_TD,
        "weights": weights_TK,
        "sent": trace.take().transfers,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(dtype: torch.dtype):
    found = passed(dtype)
    assert (found["arrived"].rows_RD.shape, found["arrived"].rows_RD.dtype) == ((TOKENS * 4, WIDTH), dtype)
    assert (found["arrived"].weights_R.shape, found["arrived"].weights_R.dtype) == ((TOKENS * 4,), torch.float32)
    assert (found["arrived"].counts_E.shape, found["arrived"].counts_E.dtype) == ((2,), torch.int64)
    assert (found["y"].shape, found["y"].dtype) == ((TOKENS, WIDTH), dtype)
    assert (found["x"].grad.shape, found["x"].grad.dtype) == ((TOKENS, WIDTH), dtype)
    assert (found["weights"].grad.shape, found["weights"].grad.dtype) == ((TOKENS, 4), torch.float32)


@pytest.mark.parametrize("tile", [32, 128])
def test_what_stays_quantised(tile: int):
    found = passed(torch.bfloat16, tile)
    for seen in (found["arrived"].rows_RD, found["gradient"]):
        assert isinstance(seen, QuantizedTensor)
        assert (seen.shape, seen.dtype) == ((TOKENS * 4, WIDTH), torch.bfloat16)
        assert (seen.held.values.dtype, seen.held.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        assert seen.held.scale.shape == (TOKENS * 4, -(-WIDTH // tile))
    assert (found["x"].grad.shape, found["x"].grad.dtype) == ((TOKENS, WIDTH), torch.bfloat16)


def test_every_way_is_booked_once_in_its_direction():
    booked = [(t.kind, t.label.direction, t.sent_bytes.get(Link.NETWORK, 0)) for t in passed(torch.float32)["sent"]]
    places = {way: 10 * place for place, way in enumerate(Way)}
    assert booked == [
        ("dispatch", "forward", places[Way.DISPATCH]),
        ("combine", "forward", places[Way.COMBINE]),
        ("combine", "backward", places[Way.COMBINE_GRADIENT]),
        ("dispatch", "backward", places[Way.DISPATCH_GRADIENT]),
    ]
