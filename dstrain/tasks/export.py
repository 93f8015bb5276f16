"""`dstrain export`: a checkpoint of a run as a Hugging Face model directory, written layer by layer."""

import json
import sys
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dstrain.checkpoint.complete import complete_or_absent
from dstrain.checkpoint.huggingface import LogicalTensor, logical_tensors
from dstrain.checkpoint.huggingface_config import to_json
from dstrain.checkpoint.save import Checkpointer
from dstrain.checkpoint.tokenizer_files import write_tokenizer
from dstrain.checkpoint.weight_files import WeightWriter
from dstrain.config.commands import ExportRoot
from dstrain.data.tokenizer import load_tokenizer
from dstrain.engine.state import FlatShard
from dstrain.errors import UserError
from dstrain.inference.load import open_run

GIB = 2**30


def run(config: ExportRoot) -> None:
    """Writes `out`: weights, config.json and tokenizer. UserError if the model has no Hugging Face counterpart."""
    run_config, checkpointer = open_run(config.run.dir)
    step = max(checkpointer.steps(), default=0) if config.step is None else config.step
    eod = load_tokenizer(run_config.data.tokenizer).eod
    # A run that trained with such scales has them in its file.
    power_of_two = run_config.precision.products == "fp8" and run_config.precision.scales == "power_of_two"
    dtype = "fp8" if config.precision.products == "fp8" else config.precision.compute_dtype
    fields = to_json(run_config.model, run_config.train.seq_len, eod, dtype, power_of_two)
    # Verifies every byte, once.
    checkpointer.load(step, {})
    tensors = logical_tensors(run_config.model)
    _check_biases([tensor for tensor in tensors if tensor.is_bias and not tensor.parts], checkpointer, step)
    with complete_or_absent("out", Path(config.out)) as directory:
        (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        write_tokenizer(run_config.data.tokenizer, directory)
        writer = WeightWriter(directory, config.shard_gib * GIB)
        layers = [list(layer) for _, layer in groupby(tensors, key=lambda tensor: tensor.name.split(".")[:2])]
        progress = Console(stderr=True)
        for layer in track(layers, "exporting", console=progress, disable=not sys.stderr.isatty(), transient=True):
            for tensor, whole in zip(layer, _read(layer, checkpointer, step), strict=True):
                _write(tensor, whole, writer, dtype, power_of_two)
        writer.finish()
    print(f"{config.out}: step {step} of {config.run.dir} as {fields['architectures'][0]}, {dtype}")


def _read(tensors: list[LogicalTensor], checkpointer: Checkpointer, step: int) -> list[Tensor]:
    wholes = [torch.empty(tensor.shape) for tensor in tensors]
    named = zip(tensors, wholes, strict=True)
    shards = {tensor.key: FlatShard(tensor.shape, 0, whole.view(-1)) for tensor, whole in named}
    checkpointer.load(step, shards, verify=False)
    return wholes


def _check_biases(tensors: list[LogicalTensor], checkpointer: Checkpointer, step: int) -> None:
    """Refuses balancing biases that steer the routing but have no place on the disk."""
    for tensor, bias in zip(tensors, _read(tensors, checkpointer, step), strict=True):
        if bias.any():
            raise UserError(
                f"{tensor.name} is not zero, and a Hugging Face model with softmax scores (DeepSeek-V2) has no "
                "balancing bias. Only runs with model.router.bias_update_rate=0 can be exported."
            )


def _write(tensor: LogicalTensor, whole: Tensor, writer: WeightWriter, dtype: str, power_of_two: bool) -> None:
    stored = torch.float32 if tensor.is_bias or dtype == "float32" else torch.bfloat16
    for name, part in tensor.split(whole):
        if dtype == "fp8" and tensor.is_fp8:
            writer.add_fp8(name, part, power_of_two)
        else:
            writer.add(name, part, stored)
