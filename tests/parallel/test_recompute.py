"""Recomputation keeps less and changes nothing."""

import pytest
import torch
from torch import Tensor

from dstrain.config.schema import Config
from dstrain.parallel.apply import build_model
from dstrain.parallel.recompute import METHODS
from tests.tiny import TINY, alone, samples, tiny_config, worst


def kept(config: Config) -> tuple[int, dict[str, Tensor]]:
    """Bytes that the forward pass keeps for the backward pass, parameters left out; and all gradients."""
    model = build_model(config, alone())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            # So that no address is used twice.
            alive.append(x.detach())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(samples(config, 0, 4), 4).total
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return sum(storages.values()), gradients


@pytest.fixture(scope="module")
def plain() -> tuple[int, dict[str, Tensor]]:
    return kept(TINY)


@pytest.mark.parametrize(
    "names", [*((name,) for name in METHODS), ("norm", "mla_up", "swiglu"), tuple(METHODS)], ids=str
)
def test_same_gradients_from_less_memory(plain: tuple[int, dict[str, Tensor]], names: tuple[str, ...]):
    num_bytes, gradients = kept(tiny_config(train={"recompute": names}))
    assert worst(gradients, plain[1]) == 0
    assert num_bytes < plain[0]


def test_whole_layers_keep_least():
    """Of a layer only its input stays."""
    sizes = {name: kept(tiny_config(train={"recompute": (name,)}))[0] for name in METHODS}
    assert min(sizes, key=lambda name: sizes[name]) == "layer"
