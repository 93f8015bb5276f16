"""Training runs of a second, through the same config that the command line makes."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.checkpoint.manifest import Manifest
from dstrain.checkpoint.save import Checkpointer
from dstrain.config import load
from dstrain.config.schema import Config
from dstrain.engine.state import FlatShard
from dstrain.tasks import pretrain
from tests.gloo.spawn import spawn

SMALL = (
    "precision=fp32",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_experts=4",
    "model.experts_per_token=2",
    "model.intermediate_size=48",
    "model.moe_intermediate_size=16",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=16",
    "train.seq_len=32",
    "train.sequences=8",
    "train.micro_batch=2",
    "train.steps=12",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "optim.phases=[]",
    "checkpoint.every_steps=6",
    "checkpoint.keep_last=9",
    "metrics.moe_every_steps=1",
)


def write_corpus(path: Path, sentence: str = "Every good boy deserves favour, and {} more.", count: int = 400) -> Path:
    path.write_text("\n".join(sentence.format(number) for number in range(count)))
    return path


def arguments(folder: Path, run: str, *overrides: str) -> list[str]:
    """The words after `dstrain train` for a run of 12 steps in `folder`/`run`; `overrides` come last and win."""
    text = [] if any(word.startswith("data.blend=") for word in overrides) else [f"data.path={folder / 'corpus.txt'}"]
    return [*SMALL, *text, f"data.cache_dir={folder / 'tokens'}", f"run.dir={folder / run}", *overrides]


def config(folder: Path, run: str, *overrides: str, world: int = 1) -> Config:
    if not (folder / "corpus.txt").exists():
        write_corpus(folder / "corpus.txt")
    return load.compose("train", arguments(folder, run, *overrides), world_size=world)


def train(folder: Path, run: str, *overrides: str, world: int = 1) -> Path:
    """Trains in this process, or in `world` others; returns the run directory."""
    made = config(folder, run, *overrides, world=world)
    if world == 1:
        pretrain.run(made)
    else:
        spawn(train_rank, world, made)
    return folder / run


def train_rank(rank: int, world_size: int, made: Config) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    pretrain.run(made)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Of every step, each exactly once and in order."""
    found = records(run)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [record["loss"] for record in found]


def steps(run: Path) -> list[int]:
    return checkpointer(run).steps()


def checkpointer(run: Path) -> Checkpointer:
    return Checkpointer(run / "checkpoints", keep_last=99, keep_every_steps=0, group=None)


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Everything a checkpoint holds, whole."""
    saved = checkpointer(run)
    manifest = Manifest.read(saved.directory.complete(step))
    whole = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in manifest.tensors.items()}
    saved.load(step, {name: FlatShard(tuple(tensor.shape), 0, tensor.view(-1)) for name, tensor in whole.items()})
    return whole


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
