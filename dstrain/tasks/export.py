"""`dstrain export`: a checkpoint of a run as a Hugging Face model directory, written tensor by tensor."""

import json
import sys
from collections.abc import Callable, Iterable
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
from dstrain.config.schema import ExportRoot
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
    fields = to_json(run_config.model, run_config.train.seq_len, eod, config.dtype)
    # Verifies every byte, once.
    checkpointer.load(step, {})
    tensors, read = logical_tensors(run_config.model), _reader(checkpointer, step)
    _check_biases(tensors, read)
    out = Path(config.out)
    with complete_or_absent("out", out) as directory:
        (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        write_tokenizer(run_config.data.tokenizer, directory)
        writer = WeightWriter(directory, config.shard_gib * GIB)
        progress = Console(stderr=True)
        for tensor in track(tensors, "exporting", console=progress, disable=not sys.stderr.isatty(), transient=True):
            _write(tensor, read(tensor), writer, config.dtype)
        writer.finish()
    print(f"{out}: step {step} of {config.run.dir} as {fields['architectures'][0]}, {config.dtype}")


def _reader(checkpointer: Checkpointer, step: int) -> Callable[[LogicalTensor], Tensor]:
    def read(tensor: LogicalTensor) -> Tensor:
        whole = torch.empty(tensor.shape)
        checkpointer.load(step, {tensor.key: FlatShard(tensor.shape, 0, whole.view(-1))}, verify=False)
        return whole

    return read


def _check_biases(tensors: Iterable[LogicalTensor], read: Callable[[LogicalTensor], Tensor]) -> None:
    """Refuses balancing biases that steer the routing but have no place on the disk."""
    for tensor in tensors:
        if tensor.is_bias and not tensor.parts and read(tensor).any():
            raise UserError(
                f"{tensor.name} is not zero, and a Hugging Face model with softmax scores (DeepSeek-V2) has no "
                "balancing bias. Only runs with model.router.bias_update_rate=0 can be exported."
            )


def _write(tensor: LogicalTensor, whole: Tensor, writer: WeightWriter, dtype: str) -> None:
    stored = torch.float32 if tensor.is_bias or dtype == "float32" else torch.bfloat16
    for name, part in tensor.split(whole):
        if dtype == "fp8" and tensor.is_fp8:
            writer.add_fp8(name, part)
        else:
            writer.add(name, part, stored)
