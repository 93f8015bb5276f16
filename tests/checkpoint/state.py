"""A small run state of every kind of tensor, and ways to cut it over ranks."""

import random
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.checkpoint.save import Checkpointer
from dstrain.engine.state import FlatShard, Shards

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "master/experts": ((4, 6, 5), torch.float32),
    "master/norm": ((7,), torch.float32),
    "master/scale": ((), torch.float32),
    "master/none": ((0, 3), torch.float32),
    "exp_avg/experts": ((4, 6, 5), torch.bfloat16),
    "buffer/count": ((3, 3), torch.int64),
}
# Every rank holds all of these.
REPLICATED = ("buffer/count", "master/scale")


def tensors(seed: int) -> dict[str, Tensor]:
    """Flattened random values, of bit patterns that no dtype conversion would leave alone."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(prod(shape), generator=generator) * 1e6).to(dtype) for name, (shape, dtype) in SHAPES.items()
    }


def cut(full: dict[str, Tensor], rank: int, world_size: int, seed: int) -> Shards:
    """This rank's copy of its ranges, with uneven, sometimes empty cuts; the same on every rank for a seed."""
    rng = random.Random(seed)
    shards = {}
    for name, flat in full.items():
        cuts = [0, *sorted(rng.choices(range(flat.numel() + 1), k=world_size - 1)), flat.numel()]
        if name == "master/norm" and world_size > 1:
            # An empty range in front of one that starts at the same place.
            cuts[1] = 0
        begin, end = (0, flat.numel()) if name in REPLICATED else cuts[rank : rank + 2]
        shards[name] = FlatShard(SHAPES[name][0], begin, flat[begin:end].clone())
    return shards


def blank(shards: Shards) -> Shards:
    return {name: FlatShard(s.shape, s.offset, torch.zeros_like(s.local)) for name, s in shards.items()}


def differing(ours: Shards, theirs: Shards) -> list[str]:
    """Names whose bits differ."""
    return [name for name in ours if not torch.equal(_bits(ours[name].local), _bits(theirs[name].local))]


def _bits(local: Tensor) -> Tensor:
    return local.contiguous().view(torch.uint8)


def checkpointer(directory: Path, keep_last: int = 9, keep_every_steps: int = 0) -> Checkpointer:
    """With a group of its own for the saves if torch.distributed runs."""
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    return Checkpointer(directory, keep_last=keep_last, keep_every_steps=keep_every_steps, group=group)


def one(value: float, numel: int = 10) -> Shards:
    """A state of one tensor."""
    return {"master/w": FlatShard((numel,), 0, torch.full((numel,), float(value)))}
