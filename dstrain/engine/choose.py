"""The engine that a config names. DeepSpeed is imported only where it is asked for."""

from dstrain.config.schema import Config
from dstrain.engine.contract import Engine
from dstrain.engine.sharding import ShardedEngine
from dstrain.mesh.groups import Groups
from dstrain.model.transformer import Transformer


def make_engine(model: Transformer, config: Config, groups: Groups) -> Engine:
    """Takes over the parameters of `model`."""
    if config.engine.name == "torch":
        return ShardedEngine(model, config, groups)
    from dstrain.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, config, groups)
