"""A model of a few thousand parameters with one of everything, and what a test needs to train it."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.config.schema import (
    Config,
    EngineConfig,
    ModelConfig,
    MtpConfig,
    OptimConfig,
    PrecisionConfig,
    TrainConfig,
)
from dstrain.engine.state import FlatShard
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect

CPU = torch.device("cpu")

TINY = Config(
    model=ModelConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_experts=4,
        experts_per_token=2,
        # Large enough that the loss falls, and that no choice of experts is a close one.
        init_std=0.1,
        mtp=MtpConfig(depth=1),
    ),
    train=TrainConfig(steps=5, seq_len=12, sequences=8, micro_batch=2, seed=3),
    precision=PrecisionConfig("float32", "float32", "float32"),
    engine=EngineConfig("torch"),
    optim=OptimConfig(lr=0.01, warmup_steps=0),
)


def tiny_config(**sections: Mapping[str, Any]) -> Config:
    """TINY with fields of its sections replaced: `tiny_config(train={"steps": 3})`."""
    return replace(TINY, **{name: replace(getattr(TINY, name), **fields) for name, fields in sections.items()})


def alone() -> Groups:
    """The groups of a single process."""
    return connect(Mesh(), Place(0, 1, CPU))


def samples(config: Config, first: int, count: int) -> Tensor:
    """Tokens [count, S] that depend on their number in the loader's order only.

    A sample draws from few or from many tokens, so that the gradients of ranks differ in size.
    """
    length = config.train.seq_len + 1 + config.model.mtp.depth
    generators = [torch.Generator().manual_seed(number) for number in range(first, first + count)]
    kinds = [2 + 7 * (number % 8) for number in range(first, first + count)]
    return torch.stack([torch.randint(k, (length,), generator=g) for k, g in zip(kinds, generators, strict=True)])


def whole(pieces: Mapping[str, FlatShard]) -> dict[str, Tensor]:
    """The flattened tensors that all ranks' ranges make up; raises if an element is missing."""
    own = [(name, x.shape, offset, part) for name, x in pieces.items() for offset, part in x.ranges()]
    everyone = [own]
    if dist.is_initialized():
        everyone = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    tensors: dict[str, Tensor] = {}
    for name, shape, offset, local in (piece for pieces_of_rank in everyone for piece in pieces_of_rank):
        flat = tensors.setdefault(name, torch.full((prod(shape),), torch.nan))
        flat[offset : offset + len(local)] = local.float()
    if incomplete := [name for name, flat in tensors.items() if flat.isnan().any()]:
        raise AssertionError(f"no rank holds all of {incomplete}")
    return tensors


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest error of any tensor, relative to its largest element."""
    assert found.keys() == expected.keys()
    return max(((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in found)
