"""Layers keep the contract of schedule/phases.py: micro-batches may interleave, over real transfers."""

import torch
from torch import Tensor

from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.model.layer import MoELayer
from dstrain.model.rope import rotation
from dstrain.parallel.apply import build_model
from dstrain.schedule.phases import PhasedLayer
from tests.gloo.spawn import spawn
from tests.tiny import CPU, tiny_config

CONFIG = tiny_config()


def interleaved(layer: PhasedLayer, inputs: list[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """All micro-batches through a phase before any goes on to the next: every transfer has another one under way."""
    attended = [layer.attend(x, cos, sin) for x in inputs]
    outbound = [layer.dispatch(a) for a in attended]
    streams = [layer.shared(a) for a in attended]
    arrived = [transfer.wait() for transfer in outbound]
    homebound = [layer.combine(layer.experts(a), a) for a in arrived]
    return [stream + transfer.wait().view_as(stream) for stream, transfer in zip(streams, homebound, strict=True)]


def _rank(rank: int, world: int) -> float:
    groups = connect(Mesh(ep=world), Place(rank, world, CPU))
    model = build_model(CONFIG, groups)
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    generator = torch.Generator().manual_seed(rank)
    inputs = [torch.randn(2, 5, CONFIG.model.hidden_size, generator=generator) for _ in range(3)]
    cos, sin = rotation(torch.arange(5), CONFIG.model.qk_rope_head_dim, CONFIG.model.rope)

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(sum((out.square().sum() for out in outputs), torch.zeros(())), inputs))

    for x in inputs:
        x.requires_grad_()
    whole = [layer(x, cos, sin)[0] for x in inputs]
    apart = interleaved(layer, inputs, cos, sin)
    pairs = zip([*whole, *gradients(whole)], [*apart, *gradients(apart)], strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_interleaved_micro_batches_compute_what_a_layer_computes() -> None:
    assert spawn(_rank, 2) == [0.0, 0.0]
