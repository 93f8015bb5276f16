"""Initial weights depend on the seed and the tensor, and on nothing else."""

from dataclasses import replace

import torch

from dstrain.config.schema import ModelConfig, MtpConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.model.init import init_weights
from dstrain.model.transformer import Transformer

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=32,
    num_experts=8,
    init_std=0.02,
    mtp=MtpConfig(depth=1),
)


def initial(seed: int = 0, held: range = range(8), model: ModelConfig = MODEL) -> Transformer:
    transformer = Transformer(model, held, LocalDispatcher(8))
    init_weights(transformer, seed)
    return transformer


def test_a_rank_with_some_experts_fills_them_as_one_process_would() -> None:
    whole, part = initial().state_dict(), initial(held=range(4, 8)).state_dict()
    for name, tensor in part.items():
        assert torch.equal(tensor, whole[name][4:8] if ".experts." in name else whole[name]), name


def test_another_depth_leaves_the_other_layers_as_they_are() -> None:
    deep, shallow = initial().state_dict(), initial(model=replace(MODEL, num_layers=2)).state_dict()
    assert all(torch.equal(tensor, deep[name]) for name, tensor in shallow.items())


def test_the_seed_decides() -> None:
    first, again, other = initial(1).state_dict(), initial(1).state_dict(), initial(2).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        fixed = "norm" in name or name.endswith("bias")
        assert torch.equal(tensor, other[name]) == fixed, name


def test_no_two_tensors_and_no_two_experts_are_alike() -> None:
    beginnings = set()
    for name, parameter in initial().named_parameters():
        if "norm" not in name:
            for part in parameter.unbind() if ".experts." in name else (parameter,):
                beginnings.add(tuple(part.flatten()[:4].tolist()))
    experts = 2 * 8 * 3
    others = sum("norm" not in name and ".experts." not in name for name, _ in initial().named_parameters())
    assert len(beginnings) == experts + others


def test_the_distribution_is_the_published_one() -> None:
    for name, tensor in initial().state_dict().items():
        if "norm" in name:
            assert (tensor == 1).all(), name
        elif name.endswith("router.bias"):
            assert not tensor.any(), name
        else:
            # Four standard errors.
            n = tensor.numel()
            assert abs(tensor.mean()) < 4 * 0.02 / n**0.5, name
            assert abs(tensor.std() / 0.02 - 1) < 4 / (2 * n) ** 0.5, name
