"""What surrounds DeepEP's kernels, with a stand-in for them; and the errors where they can't work.

The stand-in follows DeepEP's documentation: a row once per rank, experts as local numbers or -1, sums in BF16.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.lane import Lane
from dstrain.config.schema import Config, DispatchConfig, MeshConfig, ModelConfig, PrecisionConfig
from dstrain.dispatch.choose import make_dispatcher
from dstrain.dispatch.contract import Dispatcher
from dstrain.dispatch.deepep import DeepEPDispatcher, Wired, check_config, find_library, find_pairs, from_fp8, to_fp8
from dstrain.dispatch.rank import RankDispatcher
from dstrain.dispatch.wire import wire_format
from dstrain.errors import ConfigError, SharedError
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from tests.dispatch.cases import EXPERTS, ROUTES, everyone, route_of
from tests.gloo.spawn import spawn

CPU = torch.device("cpu")
WIDTH = 256


def gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass(frozen=True)
class Handle:
    tokens: int
    # Rank and token that each arrived row came from.
    source_R: Tensor
    token_R: Tensor


class StandIn:
    """A `Port` whose ranks show each other everything."""

    def dispatch(self, x: Wired, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Wired, Tensor, Tensor, int, Handle]:
        held, rank = EXPERTS // dist.get_world_size(), dist.get_rank()
        everything = gathered((experts_TK, weights_TK.detach()))
        local = [torch.where(experts // held == rank, experts % held, -1) for experts, _ in everything]
        stays = [(experts >= 0).any(1).nonzero().squeeze(1) for experts in local]
        source_R = torch.cat([torch.full_like(tokens, source) for source, tokens in enumerate(stays)])
        handle = Handle(len(experts_TK), source_R, torch.cat(stays))
        experts_RK = torch.cat([experts[tokens] for experts, tokens in zip(local, stays, strict=True)])
        weights_RK = torch.cat([weights[tokens] for (_, weights), tokens in zip(everything, stays, strict=True)])
        return self.dispatch_again(x, handle), experts_RK, weights_RK, int((experts_RK >= 0).sum()), handle

    def dispatch_again(self, x: Wired, handle: Handle) -> Wired:
        if isinstance(x, tuple):
            values, scales = (self.dispatch_again(part, handle) for part in (x[0].view(torch.uint8), x[1]))
            return values.view(torch.float8_e4m3fn), scales
        everything = gathered(x.detach())
        return torch.cat([rows[handle.token_R[handle.source_R == source]] for source, rows in enumerate(everything)])

    def combine(self, rows_RD: Tensor, handle: Handle) -> Tensor:
        assert rows_RD.dtype == torch.bfloat16
        total = torch.zeros(handle.tokens, rows_RD.shape[1])
        for source_R, token_R, rows in gathered((handle.source_R, handle.token_R, rows_RD)):
            mine = source_R == dist.get_rank()
            total.index_add_(0, token_R[mine], rows[mine].float())
        return total.to(rows_RD.dtype)

    def combine_numbers(self, rows_RD: Tensor, numbers_RK: Tensor, handle: Handle) -> tuple[Tensor, Tensor]:
        total = torch.zeros(handle.tokens, numbers_RK.shape[1])
        for source_R, token_R, numbers in gathered((handle.source_R, handle.token_R, numbers_RK)):
            mine = source_R == dist.get_rank()
            total.index_add_(0, token_R[mine], numbers[mine])
        return self.combine(rows_RD, handle), total


def there_and_back(dispatcher: Dispatcher, experts_TK: Tensor, rank: int) -> list[Tensor]:
    """Output, gradients of tokens and weights; expert e multiplies by 1 + e."""
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(len(experts_TK), WIDTH, generator=generator).bfloat16().requires_grad_()
    route = route_of(experts_TK, rank)
    arrived = dispatcher.dispatch(x_TD, route).wait()
    held = len(arrived.counts_E)
    factor_R = torch.arange(1.0, 1 + held).repeat_interleave(arrived.counts_E) + dist.get_rank() * held
    made_RD = arrived.rows_RD * factor_R[:, None] * arrived.weights_R[:, None]
    y_TD = dispatcher.combine(made_RD.bfloat16(), arrived.ticket).wait()
    y_TD.backward(torch.randn(y_TD.shape, generator=generator).bfloat16())
    return [y_TD.detach(), x_TD.grad, route.weights_TK.grad]


def both(rank: int, world: int, wire: str) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    port = DeepEPDispatcher(EXPERTS // world, StandIn(), wire, Lane(everyone().trace))
    ours = RankDispatcher(EXPERTS, everyone(), wire_format(wire, torch.bfloat16))
    results = []
    for name, experts_of in ROUTES.items():
        experts = experts_of(rank)
        results.append((name, there_and_back(port, experts, rank), there_and_back(ours, experts, rank)))
    port.close()
    ours.close()
    return results


@pytest.mark.parametrize("wire", ["bfloat16", "fp8"])
def test_agrees_with_the_rank_transport(wire: str):
    for rank, results in enumerate(spawn(both, 2, wire)):
        for name, found, expected in results:
            for what, a, b in zip(("output", "token gradient", "weight gradient"), found, expected, strict=True):
                # Sums of BF16 may round another way.
                torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-5, msg=lambda m: f"{rank} {name} {what}: {m}")  # noqa: B023


def test_fp8_rows_are_those_of_the_wire_format():
    wire = wire_format("fp8", torch.bfloat16)
    rows = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 5)[:, None]
    rows[2, 130] = torch.nan
    values, scales = to_fp8(rows)
    assert values.dtype == torch.float8_e4m3fn
    assert (scales.dtype, scales.shape) == (torch.float32, (5, 2))
    expected = wire.decode(wire.encode(rows), WIDTH, torch.float32)
    assert torch.equal(from_fp8(values, scales, torch.float32).nan_to_num(7), expected.nan_to_num(7))


def test_find_pairs():
    experts_RK = torch.tensor([[-1, 2, 0], [1, -1, -1], [-1, -1, 2]], dtype=torch.int32)
    weights_RK = torch.arange(9.0).view(3, 3)
    slots, pairs = find_pairs(experts_RK, weights_RK, 4)
    assert slots.tolist() == [1, 2, 3, 8]
    assert pairs.rows == 3
    assert pairs.row_N.tolist() == [0, 0, 1, 2]
    assert pairs.expert_N.tolist() == [2, 0, 1, 2]
    assert pairs.expert_N.dtype == torch.int64
    assert pairs.weight_N.tolist() == [1, 2, 3, 8]
    assert find_pairs(experts_RK[:0], weights_RK[:0], 0)[1].rows == 0


# -- Errors -----------------------------------------------------------------------------------------------------------


def config(dtype: str = "bfloat16", **model: int) -> Config:
    return Config(model=ModelConfig(**model), precision=PrecisionConfig(compute_dtype=dtype))


@pytest.mark.parametrize(
    ("made", "wire", "field"),
    [
        (config("float32"), "float32", "precision.compute_dtype"),
        (config(), "fp4", "dispatch.wire"),
        (config(), "float32", "dispatch.wire"),
        (config(hidden_size=192), "fp8", "model.hidden_size"),
        (config(num_experts=64, experts_per_token=33), "bfloat16", "model.experts_per_token"),
    ],
)
def test_what_it_cannot_carry(made: Config, wire: str, field: str):
    with pytest.raises(ConfigError) as caught:
        check_config(made, wire)
    assert caught.value.field == field


def test_what_it_can_carry():
    check_config(config(hidden_size=256), "fp8")
    check_config(config(hidden_size=200), "bfloat16")


def test_it_needs_a_gpu():
    with pytest.raises(ConfigError, match=r"dispatch\.kind=deepep: it needs NVIDIA GPUs\. Set dispatch\.kind=auto"):
        find_library(8, CPU)


def asked_for(rank: int, world: int) -> str:
    groups = connect(Mesh(ep=world), Place(rank, world, CPU), 30)
    try:
        make_dispatcher(replace(config(), mesh=MeshConfig(ep=world), dispatch=DispatchConfig("deepep")), groups)
    except SharedError as error:
        return str(error)
    return "no error"


def test_all_ranks_are_told():
    assert spawn(asked_for, 2) == ["dispatch.kind=deepep: it needs NVIDIA GPUs. Set dispatch.kind=auto."] * 2
