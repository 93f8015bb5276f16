"""Every transport does the same: tokens to their experts and back, forward and backward, however they are routed."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dstrain.comm.collectives import Peers
from dstrain.comm.trace import Trace
from dstrain.dispatch.alltoall import AllToAllDispatcher
from dstrain.dispatch.contract import Arrived, Dispatcher, Route
from dstrain.dispatch.local import LocalDispatcher
from tests.gloo.spawn import spawn

EXPERTS, WIDTH, TOKENS = 4, 8, 6
DTYPES = [torch.float32, torch.bfloat16]


def balanced(rank: int) -> Tensor:
    return torch.stack([(torch.arange(2) + token + rank) % EXPERTS for token in range(TOKENS)])


def skewed(rank: int) -> Tensor:
    """Every token visits expert 0, with changing company."""
    return torch.stack([torch.tensor([1 + token % 3, 0]) for token in range(TOKENS)])


def random_choice(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(TOKENS + rank, EXPERTS, generator=generator).topk(3).indices


# experts_TK of a rank.
ROUTES = {
    "balanced": balanced,
    "skewed": skewed,
    "random": random_choice,
    "one expert takes all": lambda rank: torch.full((TOKENS, 1), 2),
    "one expert per token": lambda rank: torch.arange(TOKENS)[:, None] % EXPERTS,
    "every expert": lambda rank: torch.stack([torch.arange(EXPERTS).roll(token) for token in range(TOKENS)]),
    "rank without tokens": lambda rank: balanced(rank)[: 0 if rank == 1 else TOKENS],
    "no tokens at all": lambda rank: balanced(rank)[:0],
}


@dataclass
class Outcome:
    """One rank's result of a case; gradients are those of a sum with random coefficients."""

    y_TD: Tensor
    x_grad_TD: Tensor
    weights_grad_TK: Tensor
    # Gradients of this rank's experts from this rank's calls, [local E, D, D].
    experts_grad: Tensor
    counts: list[int]


def route_of(experts_TK: Tensor, rank: int) -> Route:
    """Weights that sum to one."""
    generator = torch.Generator().manual_seed(100 + rank)
    weights_TK = torch.rand(experts_TK.shape, generator=generator).softmax(-1)
    return Route(experts_TK, weights_TK.requires_grad_())


def tokens(count: int, rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(200 + rank)
    return torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()


def all_experts(dtype: torch.dtype) -> Tensor:
    return torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)).to(dtype)


def through_experts(arrived: Arrived, experts: Tensor) -> Tensor:
    parts = zip(arrived.rows_RD.split(arrived.counts_E.tolist()), experts, strict=True)
    return torch.cat([torch.tanh(rows @ weight) for rows, weight in parts])


def run(dispatcher: Dispatcher, held: slice, experts_TK: Tensor, rank: int, dtype: torch.dtype) -> Outcome:
    route, x_TD = route_of(experts_TK, rank), tokens(len(experts_TK), rank, dtype)
    experts = all_experts(dtype)[held].requires_grad_()
    arrived = dispatcher.dispatch(x_TD, route).wait()
    y_TD = dispatcher.combine(through_experts(arrived, experts), arrived.ticket).wait()
    coefficients = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(300 + rank))
    (y_TD.float() * coefficients).sum().backward()
    assert y_TD.dtype == dtype
    return Outcome(y_TD.detach(), x_TD.grad, route.weights_TK.grad, experts.grad, arrived.counts_E.tolist())


def peers() -> Peers:
    return Peers(dist.group.WORLD, Trace(torch.device("cpu")))


def across(rank: int, world: int) -> dict[str, Outcome]:
    """Every case over all ranks."""
    dispatcher, share = AllToAllDispatcher(EXPERTS, peers()), EXPERTS // world
    held = slice(rank * share, (rank + 1) * share)
    return {
        f"{case} {dtype}": run(dispatcher, held, experts_of(rank), rank, dtype)
        for case, experts_of in ROUTES.items()
        for dtype in DTYPES
    }


@pytest.fixture(scope="module", params=[1, 2, 4])
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, Outcome]]:
    return spawn(across, request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROUTES)
def test_all_to_all_equals_local(outcomes: list[dict[str, Outcome]], case: str, dtype: torch.dtype):
    world = len(outcomes)
    found = [outcome[f"{case} {dtype}"] for outcome in outcomes]
    local = LocalDispatcher(EXPERTS)
    expected = [run(local, slice(None), ROUTES[case](rank), rank, dtype) for rank in range(world)]
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.y_TD, reference.y_TD, **close)
        torch.testing.assert_close(ours.x_grad_TD, reference.x_grad_TD, **close)
        torch.testing.assert_close(ours.weights_grad_TK, reference.weights_grad_TK, **close)
    # An expert learns from the tokens of all ranks.
    grads = torch.stack([reference.experts_grad for reference in expected]).float().sum(0)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(torch.cat([ours.experts_grad for ours in found]).float(), grads, **close)


@pytest.mark.parametrize("case", ROUTES)
def test_counts_say_how_many_rows_each_expert_got(outcomes: list[dict[str, Outcome]], case: str):
    routed = torch.cat([ROUTES[case](rank).flatten() for rank in range(len(outcomes))])
    found = [count for outcome in outcomes for count in outcome[f"{case} {torch.float32}"].counts]
    assert found == routed.bincount(minlength=EXPERTS).tolist()


class HostWaits(TorchFunctionMode):
    """Notes the calls for which the host would wait for a GPU."""

    WAITING = (Tensor.tolist, Tensor.item, Tensor.bincount, torch.bincount, torch.tensor, Tensor.new_tensor)

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


def host_waits_across(rank: int, world: int) -> list[str]:
    return host_waits(AllToAllDispatcher(EXPERTS, peers()), rank)


def test_the_host_waits_for_nothing_but_the_splits():
    assert host_waits(LocalDispatcher(EXPERTS), 0) == []
    assert spawn(host_waits_across, 2) == [["tolist"], ["tolist"]]


def there_and_back(dispatcher: Dispatcher, experts_TK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A token's way without experts, and its gradient for ones."""
    x_TD = tokens(len(experts_TK), rank, torch.float32)
    arrived = dispatcher.dispatch(x_TD, route_of(experts_TK, rank)).wait()
    y_TD = dispatcher.combine(arrived.rows_RD, arrived.ticket).wait()
    y_TD.sum().backward()
    return (y_TD - x_TD).detach(), x_TD.grad


def identities(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    dispatcher = AllToAllDispatcher(EXPERTS, peers())
    return [there_and_back(dispatcher, experts_of(rank), rank) for experts_of in ROUTES.values()]


def assert_identity(error_TD: Tensor, grad_TD: Tensor) -> None:
    torch.testing.assert_close(error_TD, torch.zeros_like(error_TD), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad_TD, torch.ones_like(grad_TD))


def test_all_to_all_without_experts_is_the_identity():
    for results in spawn(identities, 2):
        assert len(results) == len(ROUTES)
        for result in results:
            assert_identity(*result)


@pytest.mark.parametrize("case", ROUTES)
def test_local_without_experts_is_the_identity(case: str):
    assert_identity(*there_and_back(LocalDispatcher(EXPERTS), ROUTES[case](0), 0))


def two_in_flight(dispatcher: Dispatcher, held: slice, rank: int) -> list[Tensor]:
    """Two batches through one dispatcher at once, and their combines in the other order."""
    cases = [("balanced", 0), ("random", 50)]
    sent = [
        dispatcher.dispatch(tokens(len(ROUTES[c](rank)), rank + n, torch.float32), route_of(ROUTES[c](rank), rank + n))
        for c, n in cases
    ]
    first, second = (handle.wait() for handle in sent)
    assert first.ticket is not second.ticket
    experts = all_experts(torch.float32)[held]
    home_second = dispatcher.combine(through_experts(second, experts), second.ticket)
    home_first = dispatcher.combine(through_experts(first, experts), first.ticket)
    return [home_first.wait().detach(), home_second.wait().detach()]


def two_in_flight_across(rank: int, world: int) -> list[Tensor]:
    return two_in_flight(AllToAllDispatcher(EXPERTS, peers()), slice(2 * rank, 2 * rank + 2), rank)


def test_two_batches_in_flight_keep_apart():
    for rank, found in enumerate(spawn(two_in_flight_across, 2)):
        expected = two_in_flight(LocalDispatcher(EXPERTS), slice(None), rank)
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
