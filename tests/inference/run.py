"""A run directory as training leaves it, with the weights of a given model."""

from pathlib import Path

from dstrain.checkpoint.save import Checkpointer
from dstrain.config.load import save
from dstrain.config.schema import Config, RunConfig
from dstrain.inference.load import weights
from dstrain.metrics.run_directory import RunDirectory
from dstrain.model.transformer import Transformer


def write_run(path: Path, models: dict[int, Transformer]) -> None:
    """Checkpoints of `models` by step; their configs are the same."""
    directory = RunDirectory(path)
    directory.create()
    save(Config(model=next(iter(models.values())).config, run=RunConfig(str(path))), directory.config_yaml)
    checkpointer = Checkpointer(directory.checkpoints, keep_last=9, keep_every_steps=0, group=None)
    for step, model in models.items():
        checkpointer.save(step, weights(model), {})
    checkpointer.finish()
