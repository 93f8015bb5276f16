"""What arrives quantised reaches the experts as it is: the same numbers as decoded ones, and never quantised again.

Shapes: T tokens, D width, R rows.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.comm.lane import Lane
from dstrain.dispatch.contract import Dispatcher
from dstrain.dispatch.deepep import DeepEPDispatcher
from dstrain.dispatch.local import LocalDispatcher
from dstrain.dispatch.wire import wire_format
from dstrain.precision.backend import Scheme
from dstrain.precision.formats import FLOOR, Scaling
from dstrain.precision.products import Products, product
from dstrain.precision.quantize import dequantize_blocks, quantize_blocks, quantize_rows
from dstrain.precision.reference import Reference
from dstrain.precision.tensor import QuantizedTensor
from dstrain.precision.watch import Watch
from tests.dispatch.cases import EXPERTS, ROUTES, TRANSPORTS, everyone, make, route_of
from tests.dispatch.test_deepep import StandIn
from tests.gloo.spawn import spawn

# The last tile is not whole, of either format.
WIDTH = 296
TILES = {"fp8": 128, "mxfp8": 32}
CASES = ("random", "one expert takes all", "rank without tokens", "no tokens at all")


@dataclass
class Seen:
    """What came past."""

    rows: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)


class Look(torch.autograd.Function):
    """A product that takes rows and gradients as they are."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_R: Tensor, seen: Seen) -> Tensor:
        ctx.seen, ctx.weights_R = seen, weights_R.detach()
        seen.rows.append(rows_RD.detach())
        return plain(rows_RD) * ctx.weights_R[:, None].to(rows_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.grads.append(grad_RD)
        return plain(grad_RD) * ctx.weights_R[:, None].to(grad_RD.dtype), None, None


def plain(x: Tensor) -> Tensor:
    return x.dequantize() if isinstance(x, QuantizedTensor) else x


def outlying(count: int, seed: int, dtype: torch.dtype, width: int = WIDTH) -> Tensor:
    """Rows whose magnitudes lie far apart, with one outlier each."""
    generator = torch.Generator().manual_seed(seed)
    rows_TD = torch.randn(count, width, generator=generator) * 10.0 ** torch.arange(count).sub(3)[:, None]
    rows_TD[:, 130] *= 1e4
    return rows_TD.to(dtype)


def passed(
    dispatcher: Dispatcher, experts_TK: Tensor, rank: int, dtype: torch.dtype, width: int = WIDTH
) -> tuple[Seen, list[Tensor]]:
    """What the experts see, and output and gradient of the tokens."""
    seen, x_TD = Seen(), outlying(len(experts_TK), rank, dtype, width).requires_grad_()
    arrived = dispatcher.dispatch(x_TD, route_of(experts_TK, rank)).wait()
    made_RD = Look.apply(arrived.rows_RD, arrived.weights_R, seen)
    y_TD = dispatcher.combine(made_RD, arrived.ticket).wait()
    y_TD.backward(outlying(len(experts_TK), 50 + rank, dtype, width))
    return seen, [y_TD.detach(), x_TD.grad]


def differences(
    keeping: Dispatcher, decoding: Dispatcher, tile: int, rank: int, dtype: torch.dtype, width: int = WIDTH
) -> list[str]:
    """Where what is kept is not what is decoded."""
    found = []
    for case in CASES:
        seen, results = passed(keeping, ROUTES[case](rank), rank, dtype, width)
        expected_seen, expected = passed(decoding, ROUTES[case](rank), rank, dtype, width)
        for ours, theirs in zip(seen.rows + seen.grads, expected_seen.rows + expected_seen.grads, strict=True):
            is_kept = isinstance(ours, QuantizedTensor) and not isinstance(theirs, QuantizedTensor)
            if not (is_kept and ours.held.tile == tile and ours.dtype == theirs.dtype == dtype):
                found.append(f"{case}: {ours!r}")
            elif not torch.equal(ours.dequantize(), theirs):
                found.append(f"{case}: other numbers")
        if not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)):
            found.append(f"{case}: other results")
    return found


def across(rank: int, world: int) -> list[str]:
    found = []
    for transport in TRANSPORTS[world]:
        for name, tile in TILES.items():
            dispatchers = [make(transport, wire_format(name, torch.float32), keeps) for keeps in (True, False)]
            found += [f"{transport} {name} {what}" for what in differences(*dispatchers, tile, rank, torch.bfloat16)]
            for dispatcher in dispatchers:
                dispatcher.close()
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_experts_see_what_arrived_and_compute_the_same(world: int):
    assert spawn(across, world) == [[]] * world


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TILES)
def test_where_nothing_travels_tokens_are_quantised_once(name: str, dtype: torch.dtype):
    wire = wire_format(name, dtype)
    keeping, decoding = (LocalDispatcher(EXPERTS, wire, keeps) for keeps in (True, False))
    assert differences(keeping, decoding, TILES[name], 0, dtype) == []


def test_values_and_scales_are_those_of_the_quantiser_of_products():
    """Whether a row is quantised before it travels or by the product that takes it: it is the same row."""
    experts_TK = ROUTES["random"](0)
    dispatcher = LocalDispatcher(EXPERTS, wire_format("fp8", torch.float32), keeps_quantised=True)
    seen, _ = passed(dispatcher, experts_TK, 0, torch.float32)
    held, own = seen.rows[0].held, passed(LocalDispatcher(EXPERTS), experts_TK, 0, torch.float32)[0].rows[0]
    expected = quantize_rows(own, Scaling())
    assert torch.equal(held.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(held.scale, expected.scale)


def through_deepep(rank: int, world: int) -> list[str]:
    lane = Lane(everyone().trace)
    dispatchers = [DeepEPDispatcher(EXPERTS // world, StandIn(), "fp8", lane, keeps) for keeps in (True, False)]
    # Its kernels take whole tiles.
    return differences(*dispatchers, TILES["fp8"], rank, torch.bfloat16, width=256)


def test_deepep_gives_its_values_and_scales_on():
    assert spawn(through_deepep, 2) == [[]] * 2


@pytest.mark.parametrize("wire", [None, "bfloat16", "fp4"])
def test_what_no_product_takes_is_decoded(wire: str | None):
    form = wire and wire_format(wire, torch.float32)
    seen, _ = passed(LocalDispatcher(EXPERTS, form, keeps_quantised=True), ROUTES["random"](0), 0, torch.float32)
    assert not any(isinstance(x, QuantizedTensor) for x in seen.rows + seen.grads)


def test_an_operation_that_knows_nothing_sees_numbers():
    wire, x_TD = wire_format("fp8", torch.float32), outlying(6, 0, torch.float32).requires_grad_()
    dispatcher = LocalDispatcher(EXPERTS, wire, keeps_quantised=True)
    arrived = dispatcher.dispatch(x_TD, route_of(ROUTES["balanced"](0), 0)).wait()
    y_TD = dispatcher.combine(arrived.rows_RD * arrived.weights_R[:, None], arrived.ticket).wait()
    y_TD.sum().backward()
    # The weights of a token add up to one, and ones are exact in E4M3.
    expected_TD = wire.decode(wire.encode(x_TD.detach()), WIDTH, torch.float32)
    torch.testing.assert_close(y_TD.detach(), expected_TD, rtol=1e-6, atol=0)
    torch.testing.assert_close(x_TD.grad, torch.ones_like(x_TD))


def through_product(keeps: bool, x_TD: Tensor, grad_TD: Tensor, weight_EDD: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the tokens' products with their experts' weights, and the gradient of the tokens."""
    # Scales as V3 published them: quantised with these, what came with powers of two is rounded again.
    backend = Reference(Scheme(power_of_two=False), torch.float32)
    products, x_TD = Products("experts", backend, Watch(x_TD.device)), x_TD.clone().requires_grad_()
    dispatcher = LocalDispatcher(EXPERTS, wire_format("fp8", torch.float32), keeps)
    arrived = dispatcher.dispatch(x_TD, route_of(ROUTES["random"](0), 0)).wait()
    ends_E = arrived.counts_E.cumsum(0, dtype=torch.int32)
    made_RD = product(arrived.rows_RD, weight_EDD, ends_E, products, None)
    y_TD = dispatcher.combine(made_RD, arrived.ticket).wait()
    y_TD.backward(grad_TD)
    return y_TD.detach(), x_TD.grad


def test_products_take_what_arrives_as_it_is():
    experts_TK, wire = ROUTES["random"](0), wire_format("fp8", torch.float32)
    generator = torch.Generator().manual_seed(4)
    x_TD, grad_TD = (torch.randn(len(experts_TK), WIDTH, generator=generator) for _ in range(2))
    weight_EDD = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator)
    sent_TD, grad_sent_TD = (wire.decode(wire.encode(rows), WIDTH, torch.float32) for rows in (x_TD, grad_TD))
    sum_TDD = dequantize_blocks(quantize_blocks(weight_EDD, Scaling(False, FLOOR)))[experts_TK].sum(1)
    expected = torch.einsum("td,tfd->tf", sent_TD, sum_TDD), torch.einsum("tf,tfd->td", grad_sent_TD, sum_TDD)
    kept, decoded = (through_product(keeps, x_TD, grad_TD, weight_EDD) for keeps in (True, False))
    for exact, once, twice in zip(expected, kept, decoded, strict=True):
        assert (once - exact).norm() <= 1e-5 * exact.norm()
        assert (twice - exact).norm() >= 5e-3 * exact.norm()
