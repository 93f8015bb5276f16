"""`dstrain import`: a Hugging Face DeepSeek-V2/V3 directory as step 0 of a new run."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from dstrain.checkpoint.complete import complete_or_absent
from dstrain.checkpoint.huggingface import LogicalTensor, logical_tensors
from dstrain.checkpoint.huggingface_config import from_json
from dstrain.checkpoint.save import Checkpointer
from dstrain.checkpoint.tokenizer_files import copy_tokenizer
from dstrain.checkpoint.weight_files import WeightReader
from dstrain.config.commands import ImportRoot
from dstrain.config.load import save
from dstrain.config.schema import Config, DataConfig, ModelConfig, MtpConfig, RunConfig, TrainConfig
from dstrain.engine.state import FlatShard, Progress
from dstrain.errors import UserError
from dstrain.metrics.run_directory import RunDirectory

# Buffers that older files hold and everybody computes anew.
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")


def run(config: ImportRoot) -> None:
    """Writes `run.dir` with FP32 weights and zero moments to be. UserError names what cannot be represented."""
    source, run_dir = Path(config.path), Path(config.run.dir)
    fields = _read_fields(source / "config.json")
    with WeightReader(source) as disk:
        model = _without_absent_mtp(from_json(fields), disk)
        tensors = logical_tensors(model)
        _refuse_unknown(disk, tensors)
        with complete_or_absent("run.dir", run_dir) as directory:
            tokenizer = copy_tokenizer(source, directory, final=run_dir)
            _save_weights(directory, tensors, disk)
            # Without YaRN, the length that the model was trained at has no other place.
            seq_len = TrainConfig.seq_len if model.rope.yarn_factor > 1 else fields["max_position_embeddings"]
            imported = Config(
                model=model,
                train=TrainConfig(seq_len=seq_len, sequences=1),
                data=DataConfig(tokenizer=tokenizer),
                run=RunConfig(dir=str(run_dir)),
            )
            save(imported, directory / "config.yaml")
    print(f"{run_dir}: step 0 from {source}")


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. path= names a Hugging Face model directory.") from error


def _without_absent_mtp(model: ModelConfig, disk: WeightReader) -> ModelConfig:
    """transformers writes the number of MTP modules into config.json even where it leaves their weights out."""
    if model.mtp.depth and not any(name.startswith(f"model.layers.{model.num_layers}.") for name in disk):
        print(f"the weights hold none of the {model.mtp.depth} MTP modules of config.json: imported without")
        return replace(model, mtp=MtpConfig())
    return model


def _refuse_unknown(disk: WeightReader, tensors: Iterable[LogicalTensor]) -> None:
    known = {name for tensor in tensors for name in (*tensor.parts, *tensor.copies)}
    unknown = [name for name in disk if name not in known and not COMPUTED.search(name)]
    if unknown:
        raise UserError(
            f"The weights hold {len(unknown)} tensors that config.json does not imply, {unknown[0]} among them. "
            "The weights and config.json belong to different models, or the model has parts that dstrain lacks."
        )


def _save_weights(directory: Path, tensors: list[LogicalTensor], disk: WeightReader) -> None:
    progress = Console(stderr=True)
    shards = {
        tensor.key: FlatShard(tensor.shape, 0, tensor.join(disk).view(-1))
        for tensor in track(tensors, "importing", console=progress, disable=not sys.stderr.isatty(), transient=True)
    }
    checkpointer = Checkpointer(RunDirectory(directory).checkpoints, keep_last=1, keep_every_steps=0, group=None)
    checkpointer.save(0, shards, {"progress": asdict(Progress())})
    checkpointer.finish()
