"""DeepEP against the rank transport over NCCL; skips itself where either can't run."""

import importlib.util
import os

import pytest
import torch
from torch import Tensor
from torch import multiprocessing as mp

from dstrain.config.schema import Config, DispatchConfig, MeshConfig, ModelConfig, TrainConfig
from dstrain.dispatch.choose import make_dispatcher
from dstrain.dispatch.contract import Dispatcher, Route
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect, disconnect

GPUS = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(len(GPUS) < 2 or min(GPUS) < (9, 0), reason="needs two GPUs of compute capability 9.0"),
    pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="needs the package deep_ep"),
]

TOKENS, HIDDEN, EXPERTS, PER_TOKEN = 512, 1024, 16, 6


def config(kind: str, wire: str, world: int) -> Config:
    return Config(
        mesh=MeshConfig(ep=world, timeout_s=60),
        model=ModelConfig(hidden_size=HIDDEN, num_experts=EXPERTS, experts_per_token=PER_TOKEN),
        train=TrainConfig(seq_len=TOKENS),
        dispatch=DispatchConfig(kind, wire),
    )


def there_and_back(dispatcher: Dispatcher, rank: int) -> list[Tensor]:
    """Output, gradients of tokens and of weights of two micro-batches, the second started before the first is back."""
    generator = torch.Generator("cuda").manual_seed(rank)
    random = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)  # noqa: E731
    batches = []
    for _ in range(2):
        x_TD = random(TOKENS, HIDDEN).bfloat16().requires_grad_()
        weights_TK, experts_TK = random(TOKENS, EXPERTS).topk(PER_TOKEN)
        route = Route(experts_TK, weights_TK.softmax(1).requires_grad_())
        batches.append((x_TD, route, dispatcher.dispatch(x_TD, route)))
    results = []
    for x_TD, route, handle in batches:
        arrived = handle.wait()
        made_RD = (arrived.rows_RD * arrived.weights_R[:, None]).bfloat16()
        y_TD = dispatcher.combine(made_RD, arrived.ticket).wait()
        y_TD.backward(random(TOKENS, HIDDEN).bfloat16())
        results += [y_TD.detach(), x_TD.grad, route.weights_TK.grad]
    return results


def _rank(rank: int, world: int, port: int, wire: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    groups = connect(Mesh(ep=world), Place(rank, world, device))
    found, expected = (
        there_and_back(make_dispatcher(config(kind, wire, world), groups), rank) for kind in ("deepep", "rank")
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-4)
    disconnect()


@pytest.mark.parametrize("wire", ["bfloat16", "fp8"])
def test_agrees_with_the_rank_transport(wire: str) -> None:
    mp.spawn(_rank, (2, 29519, wire), nprocs=2)
