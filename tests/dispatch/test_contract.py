"""Every transport does what loops over tokens and experts do, forward and backward, however tokens are routed."""

import weakref
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dstrain.dispatch.alltoall import AllToAllDispatcher
from dstrain.dispatch.contract import Arrived, Dispatcher, Route
from dstrain.dispatch.local import LocalDispatcher
from dstrain.dispatch.rank import RankDispatcher
from dstrain.dispatch.transport import Transport
from dstrain.dispatch.wire import WireFormat, wire_format
from tests.dispatch.cases import EXPERTS, ROUTES, TRANSPORTS, WIDTH, balanced, everyone, make, route_of, tokens
from tests.gloo.spawn import spawn
from tests.tiny import CPU

# Compute dtype and wire.
FORMATS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float32, bfloat16 on the wire": (torch.float32, "bfloat16"),
    "float32, fp8 on the wire": (torch.float32, "fp8"),
    "bfloat16, fp8 on the wire": (torch.bfloat16, "fp8"),
    "float32, fp4 on the wire": (torch.float32, "fp4"),
    "float32, logfmt10 on the wire": (torch.float32, "logfmt10"),
}


@dataclass
class Outcome:
    """One rank's result of a case; gradients are those of a sum with random coefficients."""

    y_TD: Tensor
    x_grad_TD: Tensor
    weights_grad_TK: Tensor
    # Gradients of the experts, [experts, D, D]: of those of a rank, or of all from one rank's tokens.
    experts_grad: Tensor
    counts: list[int]


def form(name: str) -> tuple[torch.dtype, WireFormat | None]:
    dtype, wire = FORMATS[name]
    return dtype, wire and wire_format(wire, dtype)


def all_experts(dtype: torch.dtype) -> Tensor:
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
    return (weights / WIDTH**0.5).to(dtype)


def through_experts(arrived: Arrived, experts: Tensor) -> Tensor:
    parts = zip(arrived.rows_RD.split(arrived.counts_E.tolist()), experts, strict=True)
    rows_RD = torch.cat([torch.tanh(rows @ weight) for rows, weight in parts])
    return times_weights(arrived, rows_RD)


def times_weights(arrived: Arrived, rows_RD: Tensor) -> Tensor:
    assert arrived.weights_R.dtype == torch.float32
    return (rows_RD * arrived.weights_R[:, None]).to(rows_RD.dtype)


def coefficients(tokens: int, rank: int) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(300 + rank))


def run(
    dispatcher: Dispatcher,
    held: slice,
    experts_TK: Tensor,
    rank: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> Outcome:
    """Whatever the device, the case comes from the CPU and its outcome goes there."""
    route, x_TD = route_of(experts_TK, rank), tokens(len(experts_TK), rank, dtype)
    experts = all_experts(dtype)[held].requires_grad_()
    there = Route(route.experts_TK.to(device), route.weights_TK.to(device))
    arrived = dispatcher.dispatch(x_TD.to(device), there).wait()
    y_TD = dispatcher.combine(through_experts(arrived, experts.to(device)), arrived.ticket).wait().cpu()
    (y_TD.float() * coefficients(len(y_TD), rank)).sum().backward()
    assert y_TD.dtype == dtype
    return Outcome(y_TD.detach(), x_TD.grad, route.weights_TK.grad, experts.grad, arrived.counts_E.tolist())


@cache
def reference(case: str, name: str, rank: int) -> Outcome:
    """Loops over tokens and experts in FP64, with inputs and incoming gradients as the wire rounds them."""
    dtype, wire = form(name)
    experts_TK = ROUTES[case](rank)
    route, given_TD = route_of(experts_TK, rank), tokens(len(experts_TK), rank, dtype).detach()
    x_TD = rounded(given_TD, wire).double().requires_grad_()
    experts = all_experts(dtype).double().requires_grad_()
    # Nothing, but every input has a gradient.
    y_TD = 0 * (x_TD + route.weights_TK.sum() + experts.sum())
    for t, chosen_K in enumerate(experts_TK.tolist()):
        for k, expert in enumerate(chosen_K):
            y_TD[t] += route.weights_TK[t, k] * torch.tanh(x_TD[t] @ experts[expert])
    y_grad_TD = rounded(coefficients(len(x_TD), rank).to(dtype), wire)
    (y_TD * y_grad_TD.double()).sum().backward()
    counts = experts_TK.flatten().bincount(minlength=EXPERTS).tolist()
    return Outcome(y_TD.detach(), x_TD.grad, route.weights_TK.grad, experts.grad, counts)


def rounded(rows_TD: Tensor, wire: WireFormat | None) -> Tensor:
    return rows_TD if wire is None else wire.decode(wire.encode(rows_TD), WIDTH, rows_TD.dtype)


def assert_equal(found: Outcome, expected: Outcome, dtype: torch.dtype) -> None:
    """But for the experts' gradients, to which all ranks add."""
    for field in ("y_TD", "x_grad_TD", "weights_grad_TK"):
        assert_close(getattr(found, field), getattr(expected, field), dtype)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error, size = (found.double() - expected).norm().item(), expected.norm().item()
    assert found.shape == expected.shape
    assert error <= size * (1e-6 if dtype == torch.float32 else 1e-2)


def across(rank: int, world: int) -> dict[tuple[str, str, str], Outcome]:
    """Every case over all ranks, by transport, format and route."""
    share = EXPERTS // world
    held = slice(rank * share, (rank + 1) * share)
    found = {}
    for transport in TRANSPORTS[world]:
        for name in FORMATS:
            dtype, wire = form(name)
            dispatcher = make(transport, wire)
            for case, experts_of in ROUTES.items():
                found[transport, name, case] = run(dispatcher, held, experts_of(rank), rank, dtype)
            dispatcher.close()
    return found


@cache
def outcomes(world: int) -> list[dict[tuple[str, str, str], Outcome]]:
    return spawn(across, world)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("world", "transport"), [(n, name) for n, names in TRANSPORTS.items() for name in names])
def test_a_transport_equals_loops(world: int, transport: str, name: str):
    dtype, _ = FORMATS[name]
    for case in ROUTES:
        found = [outcome[transport, name, case] for outcome in outcomes(world)]
        expected = [reference(case, name, rank) for rank in range(world)]
        for ours, plain in zip(found, expected, strict=True):
            assert_equal(ours, plain, dtype)
        # An expert learns from the tokens of all ranks, and counts them.
        experts_grad = torch.stack([plain.experts_grad for plain in expected]).sum(0)
        assert_close(torch.cat([ours.experts_grad for ours in found]), experts_grad, dtype)
        counts = torch.tensor([plain.counts for plain in expected]).sum(0)
        assert [count for ours in found for count in ours.counts] == counts.tolist()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", ROUTES)
def test_local_equals_loops(case: str, name: str):
    dtype, wire = form(name)
    found, expected = (
        run(LocalDispatcher(EXPERTS, wire), slice(None), ROUTES[case](0), 0, dtype),
        reference(case, name, 0),
    )
    assert_equal(found, expected, dtype)
    assert_close(found.experts_grad, expected.experts_grad, dtype)
    assert found.counts == expected.counts


class HostWaits(TorchFunctionMode):
    """Notes the calls for which the host would wait for a GPU, in this thread."""

    WAITING = (
        *(Tensor.tolist, Tensor.item, Tensor.bincount, Tensor.nonzero, Tensor.new_tensor),
        *(torch.bincount, torch.nonzero, torch.tensor),
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        repeats = func is Tensor.repeat_interleave and "output_size" not in (kwargs or {})
        if func in self.WAITING or repeats:
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


def host_waits(dispatcher: Dispatcher, rank: int) -> list[str]:
    with HostWaits() as mode:
        there_and_back(dispatcher, balanced(rank), rank)
    return mode.calls


def host_waits_across(rank: int, world: int) -> list[list[str]]:
    return [host_waits(make(transport), rank) for transport in TRANSPORTS[world]]


def test_the_main_thread_does_not_wait_for_the_device():
    assert host_waits(LocalDispatcher(EXPERTS), 0) == []
    assert spawn(host_waits_across, 2) == [[[]] * len(TRANSPORTS[2])] * 2


def there_and_back(dispatcher: Dispatcher, experts_TK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A token's way without experts, and its gradient for ones."""
    x_TD = tokens(len(experts_TK), rank, torch.float32)
    arrived = dispatcher.dispatch(x_TD, route_of(experts_TK, rank)).wait()
    y_TD = dispatcher.combine(times_weights(arrived, arrived.rows_RD), arrived.ticket).wait()
    y_TD.sum().backward()
    return (y_TD - x_TD).detach(), x_TD.grad


def identities(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    return [
        there_and_back(make(transport), experts_of(rank), rank)
        for transport in TRANSPORTS[world]
        for experts_of in ROUTES.values()
    ]


def test_without_experts_tokens_come_home_as_they_were():
    alone = [there_and_back(LocalDispatcher(EXPERTS), experts_of(0), 0) for experts_of in ROUTES.values()]
    found = [result for results in spawn(identities, 2) for result in results]
    assert len(found) == 2 * len(ROUTES) * len(TRANSPORTS[2])
    for error_TD, grad_TD in alone + found:
        torch.testing.assert_close(error_TD, torch.zeros_like(error_TD), rtol=0, atol=1e-6)
        torch.testing.assert_close(grad_TD, torch.ones_like(grad_TD))


def in_flight(rank: int, world: int, at_once: bool) -> list[list[Tensor]]:
    """Three batches through a dispatcher, one after the other or all between start and wait, combines in another order;
    their results and gradients."""
    share, found = EXPERTS // world, []
    experts = all_experts(torch.float32)[rank * share : (rank + 1) * share]
    for transport in TRANSPORTS[world]:
        dispatcher = make(transport)
        routes = [route_of(ROUTES[case](rank), rank + n) for n, case in enumerate(("balanced", "random", "skewed"))]
        xs = [tokens(len(route.experts_TK), rank + n, torch.float32) for n, route in enumerate(routes)]
        if at_once:
            sent = [dispatcher.dispatch(x, route) for x, route in zip(xs, routes, strict=True)]
            arrived = [handle.wait() for handle in sent]
            assert len({id(batch.ticket) for batch in arrived}) == 3
            back = [
                dispatcher.combine(through_experts(batch, experts), batch.ticket)
                for batch in (arrived[2], arrived[0], arrived[1])
            ]
            ys = [back[n].wait() for n in (1, 2, 0)]
        else:
            batches = (dispatcher.dispatch(x, route).wait() for x, route in zip(xs, routes, strict=True))
            ys = [dispatcher.combine(through_experts(batch, experts), batch.ticket).wait() for batch in batches]
        torch.stack([y.square().sum() for y in ys]).sum().backward()
        found.append([y.detach() for y in ys] + [x.grad for x in xs] + [route.weights_TK.grad for route in routes])
    return found


def test_batches_in_flight_keep_apart_and_change_no_bit():
    for together, alone in zip(spawn(in_flight, 4, True), spawn(in_flight, 4, False), strict=True):
        for ours, expected in zip(together, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def by_phases(rank: int, world: int) -> list[list[Tensor]]:
    """Gradients of the whole graph, and of its three pieces, cut at the tokens, one after the other."""
    dispatcher, found = make("rank"), []
    for cut in (False, True):
        route, x_TD = route_of(balanced(rank), rank), tokens(6, rank, torch.float32)
        share = EXPERTS // world
        experts = all_experts(torch.float32)[rank * share : (rank + 1) * share].requires_grad_()
        outbound = dispatcher.dispatch(x_TD, route)
        cuts = [(outbound.token, cut_at(outbound))] if cut else []
        arrived = outbound.wait()
        homebound = dispatcher.combine(through_experts(arrived, experts), arrived.ticket)
        cuts += [(homebound.token, cut_at(homebound))] if cut else []
        homebound.wait().square().sum().backward()
        for token, detached in reversed(cuts):
            token.backward(detached.grad)
        found.append([x_TD.grad, route.weights_TK.grad, experts.grad])
    return found


def cut_at(handle) -> Tensor:
    handle.token = handle.token.detach().requires_grad_()
    return handle.token


def test_the_graph_can_be_cut_at_the_token():
    for whole, pieces in spawn(by_phases, 2):
        assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def without_gradients(rank: int, world: int) -> list[bool]:
    """No graph; weights that alone require a gradient; tokens that alone do."""
    dispatcher, experts_TK = make("rank"), balanced(rank)
    expected, _ = there_and_back(dispatcher, experts_TK, rank)
    x_TD, route = tokens(6, rank, torch.float32), route_of(experts_TK, rank)
    found = []
    with torch.no_grad():
        arrived = dispatcher.dispatch(x_TD, route).wait()
        y_TD = dispatcher.combine(times_weights(arrived, arrived.rows_RD), arrived.ticket).wait()
        found += [torch.equal(y_TD - x_TD, expected), not y_TD.requires_grad]
    for x_needs, weights_need in ((False, True), (True, False)):
        x_TD, route = tokens(6, rank, torch.float32), route_of(experts_TK, rank)
        x_TD.requires_grad_(x_needs)
        route.weights_TK.requires_grad_(weights_need)
        arrived = dispatcher.dispatch(x_TD, route).wait()
        dispatcher.combine(arrived.rows_RD, arrived.ticket).wait().sum().backward()
        found += [(x_TD.grad is not None) == x_needs, (route.weights_TK.grad is not None) == weights_need]
    return found


def test_not_everything_needs_a_gradient():
    assert spawn(without_gradients, 2) == [[True] * 6] * 2


def kept_bytes(dispatcher: Transport, experts_TK: Tensor, rank: int) -> int:
    """What autograd keeps of a transfer there and back, while what the experts made is forgotten."""
    x_TD, kept = tokens(len(experts_TK), rank, torch.float32), []
    arrived = dispatcher.dispatch(x_TD, route_of(experts_TK, rank)).wait()
    made = weakref.ref(rows_RD := arrived.rows_RD * 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        handle = dispatcher.combine(rows_RD, arrived.ticket)
        del rows_RD
        handle.wait()
    if dispatcher.lane is not None:
        # Its threads let go of everything at the latest when they end.
        dispatcher.lane.close(wait_s=10)
    assert made() is None
    return sum(kept)


def kept_across(rank: int, world: int) -> list[int]:
    return [kept_bytes(make(transport), balanced(rank), rank) for transport in TRANSPORTS[world]]


def test_combine_keeps_nothing_of_what_the_experts_made():
    assert kept_bytes(LocalDispatcher(EXPERTS), balanced(0), 0) == 0
    assert spawn(kept_across, 2) == [[0] * len(TRANSPORTS[2])] * 2


def unused(rank: int, world: int) -> list[list[bool]]:
    """Experts that leave the weights aside: the tokens have a gradient, the weights a zero one."""
    found = []
    for transport in TRANSPORTS[world]:
        dispatcher, x_TD, route = make(transport), tokens(6, rank, torch.float32), route_of(balanced(rank), rank)
        arrived = dispatcher.dispatch(x_TD, route).wait()
        dispatcher.combine(arrived.rows_RD, arrived.ticket).wait().sum().backward()
        # A copy of every token came home from each of its experts.
        found.append([bool((x_TD.grad == 3).all()), not route.weights_TK.grad.any()])
    return found


def test_weights_may_stay_unused():
    assert spawn(unused, 2) == [[[True, True]] * len(TRANSPORTS[2])] * 2


def test_waiting_twice_is_an_error():
    handle = LocalDispatcher(EXPERTS).dispatch(tokens(6, 0, torch.float32), route_of(balanced(0), 0))
    handle.wait()
    with pytest.raises(RuntimeError, match="dispatch transfer was waited for twice"):
        handle.wait()


def refused_routes(rank: int, world: int) -> list[str]:
    """What each transport says of a token that names an expert twice."""
    twice, said = torch.tensor([[0, 1], [2, 2]]), []
    for dispatcher in (make("alltoall"), make("rank")):
        handle = dispatcher.dispatch(tokens(2, rank, torch.float32), route_of(twice, rank))
        with pytest.raises(ValueError, match="names an expert twice") as raised:
            handle.wait()
        said.append(str(raised.value))
    return said


def test_an_expert_twice_in_a_route_is_refused():
    assert all(len(said) == 2 for said in spawn(refused_routes, 2))


def unequal_shares(rank: int, world: int) -> None:
    for kind in (AllToAllDispatcher, RankDispatcher):
        with pytest.raises(ValueError, match="5 experts do not divide equally among 2 ranks"):
            kind(5, everyone())


def test_experts_divide_equally():
    spawn(unequal_shares, 2)
