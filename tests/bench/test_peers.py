"""Peers carry the routes that they are given, compute the weighted sum of a plain loop, and send what theory says."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dstrain.bench.peers.choose import PEERS
from dstrain.bench.peers.contract import Facts, Peer, Spec
from dstrain.dispatch.contract import Route
from dstrain.errors import UserError
from tests.gloo.spawn import spawn

RANKS, BLOCKS, MICRO_BATCHES, TOKENS, HIDDEN, EXPERTS, TOP_K = 2, 2, 2, 24, 16, 6, 3
ROW_BYTES = HIDDEN * 2
# BF16 has eight bits; a sum of a few rounded terms, twice rounded, stays within this share of the largest value.
TOLERANCE = 2e-2


def reason_to_skip(name: str) -> str:
    try:
        PEERS[name].facts()
    except UserError as error:
        return str(error)
    return ""


def runnable(name: str) -> Any:
    """A parameter that is skipped where the peer is not installed."""
    reason = reason_to_skip(name)
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=reason))


def route(rank: int, block: int, micro_batch: int) -> Route:
    random = torch.Generator().manual_seed(100 * rank + 10 * block + micro_batch)
    chosen_TK = torch.rand(TOKENS, EXPERTS, generator=random).argsort(-1)[:, :TOP_K]
    return Route(chosen_TK, torch.randn(TOKENS, TOP_K, generator=random).softmax(-1))


def make_spec(rank: int) -> Spec:
    routes = [[route(rank, block, micro_batch) for micro_batch in range(MICRO_BATCHES)] for block in range(BLOCKS)]
    return Spec(HIDDEN, EXPERTS, TOP_K, TOKENS, routes)


class Linear:
    """Real compute: a matrix for each expert, another as the shared expert, and a factor in each stretch."""

    def __init__(self, first: int, count: int, dtype: torch.dtype):
        random = torch.Generator().manual_seed(7)
        all_EDD = torch.randn(EXPERTS + 1, HIDDEN, HIDDEN, generator=random) / HIDDEN**0.5
        self.experts_EDD, self.shared_DD = all_EDD[first : first + count].to(dtype), all_EDD[-1].to(dtype)

    def attend(self, x_TD: Tensor, stretch: int) -> Tensor:
        return x_TD * 0.5

    def shared(self, x_TD: Tensor, block: int) -> Tensor:
        return x_TD @ self.shared_DD

    def experts(self, rows_RD: Tensor, counts: Sequence[int], block: int) -> Tensor:
        parts = rows_RD.split(list(counts))
        return torch.cat([part @ w_DD for part, w_DD in zip(parts, self.experts_EDD, strict=True)])


class Loop:
    """The plain layer: every expert is here, and meets every token."""

    def __init__(self, spec: Spec, compute: Linear, block: int):
        self.spec, self.compute, self.block = spec, compute, block

    def __call__(self, x_TD: Tensor, micro_batch: int) -> Tensor:
        given = self.spec.routes[self.block][micro_batch]
        weights_TE = x_TD.new_zeros(TOKENS, EXPERTS).scatter_(1, given.experts_TK, given.weights_TK)
        routed_TD = torch.einsum("te,td,edf->tf", weights_TE, x_TD, self.compute.experts_EDD)
        return routed_TD + self.compute.shared(x_TD, self.block)


def inputs(rank: int, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(rank)
    made = [torch.randn(TOKENS, HIDDEN, generator=random).bfloat16() for _ in range(MICRO_BATCHES)]
    return [x_TD.to(dtype).requires_grad_() for x_TD in made]


class SentBytes(TorchDispatchMode):
    """Adds up what each exchange of this process sends to other ranks."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rank, name = dist.get_rank(), func._schema.name
        if name == "_c10d_functional::all_to_all_single":
            x, _, splits, _ = args
            self.total += (sum(splits) - splits[rank]) * x[:1].nbytes
        elif name == "c10d::alltoall_base_":
            _, x, _, _, splits, *_ = args
            kept = splits[rank] if splits else len(x) // RANKS
            self.total += (len(x) - kept) * x[:1].nbytes
        return func(*args, **(kwargs or {}))


def run_peer(rank: int, world_size: int, name: str) -> tuple[list[Tensor], list[Tensor], int]:
    here = EXPERTS // world_size
    group = dist.group.WORLD
    assert group is not None
    peer = PEERS[name].make(make_spec(rank), group, Linear(rank * here, here, torch.bfloat16))
    x = inputs(rank, torch.bfloat16)
    with SentBytes() as sent:
        outputs = peer.step(x)
    return outputs, [part.grad for part in x], sent.total


def run_loop(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    spec, compute = make_spec(rank), Linear(0, EXPERTS, torch.float32)
    facts = Facts("loop", {}, (), ())
    x = inputs(rank, torch.float32)
    outputs = Peer(facts, compute, [Loop(spec, compute, block) for block in range(BLOCKS)]).step(x)
    return outputs, [part.grad for part in x]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is torch.bfloat16
        assert (a.float() - b).abs().max() <= TOLERANCE * b.abs().max()


def flat_rows(rank: int) -> list[int]:
    """Rows from a rank to each rank in a step, one for each (token, expert)."""
    owners = [given.experts_TK.flatten() // (EXPERTS // RANKS) for block in make_spec(rank).routes for given in block]
    return torch.bincount(torch.cat(owners), minlength=RANKS).tolist()


def travelling_rows(rank: int) -> int:
    """Of all blocks and micro-batches: rows for other ranks, and rows of other ranks."""
    return sum(flat_rows(a)[b] for a in range(RANKS) for b in range(RANKS) if a != b and rank in (a, b))


def fullest(block: int, micro_batch: int) -> int:
    """Rows of the fullest expert, over ranks."""
    chosen = [route(rank, block, micro_batch).experts_TK.flatten() for rank in range(RANKS)]
    return max(int(torch.bincount(ids, minlength=EXPERTS).max()) for ids in chosen)


def expected_bytes(name: str, rank: int) -> int:
    """Dispatch and combine, backward as well: a row crosses twice each way. And what goes with them."""
    if name == "deepspeed":
        capacities = sum(fullest(block, n) for block in range(BLOCKS) for n in range(MICRO_BATCHES))
        return 4 * capacities * EXPERTS // RANKS * ROW_BYTES
    rows = 2 * travelling_rows(rank) * ROW_BYTES
    if name == "megatron":
        # A weight in FP32 with every row, and its gradient.
        return rows + travelling_rows(rank) * 4
    # torchtitan: int64 counts of the other rank's experts.
    return rows + BLOCKS * MICRO_BATCHES * EXPERTS // RANKS * 8


@pytest.mark.parametrize("name", [runnable(name) for name in ("megatron", "torchtitan", "deepspeed")])
def test_agrees_with_the_loop_and_sends_what_theory_says(name: str):
    for rank, (outputs, grads, sent) in enumerate(spawn(run_peer, RANKS, name, timeout_s=150)):
        expected, expected_grads = run_loop(rank)
        assert_near(outputs, expected)
        assert_near(grads, expected_grads)
        assert sent == expected_bytes(name, rank)


@pytest.mark.parametrize("name", [runnable("deepspeed_drops")])
def test_deepspeed_with_capacity_one_sends_the_mean(name: str):
    capacity = TOKENS * TOP_K // EXPERTS
    for _, _, sent in spawn(run_peer, RANKS, name, timeout_s=150):
        assert sent == 4 * BLOCKS * MICRO_BATCHES * capacity * EXPERTS // RANKS * ROW_BYTES


@pytest.mark.parametrize("name", PEERS)
def test_facts_or_a_cure(name: str):
    """Installed or not, a user learns what runs, or how to get it."""
    reason = reason_to_skip(name)
    if reason:
        assert "pip install 'dstrain[" in reason
    else:
        assert PEERS[name].facts().versions
