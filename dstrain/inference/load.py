"""A trained model out of a run directory, ready for inference in one process."""

from dataclasses import replace
from pathlib import Path

import torch

from dstrain.checkpoint.save import Checkpointer
from dstrain.config.load import read
from dstrain.config.schema import Config, ModelConfig, MtpConfig
from dstrain.data.tokenizer import Tokenizer, load_tokenizer
from dstrain.dispatch.local import LocalDispatcher
from dstrain.engine.state import FlatShard, Shards
from dstrain.errors import ConfigError, UserError
from dstrain.metrics.run_directory import RunDirectory
from dstrain.model.router import Router
from dstrain.model.transformer import Transformer


def load_model(
    run_dir: str | Path, step: int | None, device: torch.device | str
) -> tuple[Transformer, Config, Tokenizer]:
    """The model of a checkpoint with all its experts, the config of the run and its tokenizer.

    `step` None takes the newest checkpoint. FP32 on a CPU, otherwise BF16 with FP32 routers. MTP modules predict what
    only training or speculation asks for, and are left out: the config says `mtp.depth` 0. UserError where the
    directory holds no run or no such checkpoint.
    """
    config, checkpointer = open_run(run_dir)
    steps = checkpointer.steps()
    if not steps:
        raise UserError(
            f"run.dir={run_dir}: there is no complete checkpoint in {checkpointer.directory.path}. "
            "Train longer than checkpoint.every_steps or to the end, or name another run."
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = replace(config, model=replace(config.model, mtp=MtpConfig()))
    model = empty_model(config.model, device)
    checkpointer.load(steps[-1] if step is None else step, weights(model))
    return model, config, tokenizer


def open_run(run_dir: str | Path) -> tuple[Config, Checkpointer]:
    """The config and the checkpoints of a run; UserError if the directory holds none."""
    directory = RunDirectory(run_dir)
    if not directory.config_yaml.is_file():
        raise ConfigError(
            "run.dir",
            run_dir,
            "holds no run (no config.yaml)",
            f"Name the directory of a run, or make one: dstrain train run.dir={run_dir} data.path=...",
        )
    checkpointer = Checkpointer(directory.checkpoints, keep_last=0, keep_every_steps=0, group=None)
    return read(directory.config_yaml), checkpointer


def empty_model(model: ModelConfig, device: torch.device | str) -> Transformer:
    """A model with all experts whose weights are yet to be loaded."""
    with torch.device("meta"):
        empty = Transformer(model, range(model.num_experts), LocalDispatcher(model.num_experts))
    if torch.device(device).type != "cpu":
        for module in empty.modules():
            if not isinstance(module, Router):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(torch.bfloat16)
    return empty.to_empty(device=device).requires_grad_(False)


def weights(model: Transformer) -> Shards:
    """Parameters and router biases under the names that checkpoints give them."""
    named = {f"master/{name}": parameter.data for name, parameter in model.named_parameters()}
    named |= {f"buffer/{name}": buffer for name, buffer in model.named_buffers()}
    return {name: FlatShard(tuple(tensor.shape), 0, tensor.view(-1)) for name, tensor in named.items()}
