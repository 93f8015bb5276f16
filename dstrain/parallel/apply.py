"""Where model, mesh and dispatcher meet: the one fixed order in which a model is made parallel.

build on no memory -> the rank's experts and its dispatcher -> memory -> initial weights -> products in FP8 ->
recomputation
"""

from dataclasses import dataclass

import torch
from torch import nn

from dstrain.comm.collectives import Peers
from dstrain.config.schema import Config
from dstrain.dispatch.choose import make_dispatcher
from dstrain.dispatch.contract import Dispatcher
from dstrain.mesh.groups import Groups
from dstrain.model.init import init_weights
from dstrain.model.moe import Experts
from dstrain.model.router import Router
from dstrain.model.transformer import Transformer
from dstrain.parallel.precision import apply_products
from dstrain.parallel.recompute import apply_recompute
from dstrain.plan.split import embeds_at_end, split, whole
from dstrain.precision.backends.choose import choose, make_backend
from dstrain.precision.watch import Watch


@dataclass(frozen=True)
class LogicalParameter:
    """A parameter under its layout-independent name, with the place of this rank's part in it."""

    name: str
    parameter: nn.Parameter
    # Shape of the whole tensor, all experts included.
    shape: tuple[int, ...]
    # Whose experts these are. They are spread over the expert-parallel group and replicated over expert-data ranks, and
    # which of them this rank holds may change between steps. None: replicated over all data ranks.
    experts: Experts | None
    # Both the first and the last stage of a pipeline use it.
    at_both_ends: bool
    # Whether weight decay applies: to the matrices that transform, not to embeddings, norms and their like.
    decays: bool
    # Kept in FP32 even where the others are cast to a narrower compute dtype.
    keeps_fp32: bool

    @property
    def is_expert(self) -> bool:
        return self.experts is not None

    @property
    def part_numel(self) -> int:
        """The elements of one expert; of all of it where there are none."""
        return self.parameter.numel() // (len(self.experts.held) if self.experts else 1)

    @property
    def offsets(self) -> list[int]:
        """Where each part begins in the flattened whole, in the order of the parameter."""
        return [expert * self.part_numel for expert in self.experts.held] if self.experts else [0]


def holders(parameter: LogicalParameter, groups: Groups) -> Peers | None:
    """The ranks that hold the same values as this one, over which gradients are summed; None if there are no others."""
    if parameter.is_expert:
        return groups.expert_data
    return groups.embedding if parameter.at_both_ends and groups.embedding else groups.data


def build_model(config: Config, groups: Groups, dispatcher: Dispatcher | None = None) -> Transformer:
    """This rank's stages of the model, in FP32 on its device; the initial weights depend on train.seed only.

    `dispatcher`: instead of the one that the config names. On the meta device there are no weights.
    """
    held = groups.mesh.local_experts(config.model.num_experts, groups.coordinate.ep)
    dispatcher = dispatcher or make_dispatcher(config, groups)
    pipeline = groups.mesh.stages
    # A listed split is that of the pipeline, which this run may do without.
    stages = split(config, pipeline.num_stages) if pipeline.num_stages > 1 else (whole(config.model),)
    own = pipeline.held[groups.coordinate.pp]
    with torch.device("meta"):
        model = Transformer(config.model, held, dispatcher, stages, own)
    model = model.to_empty(device=groups.place.device)
    if groups.place.device.type != "meta":
        init_weights(model, config.train.seed)
    for module in model.modules():
        if isinstance(module, Experts):
            module.chunk_rows = chunk_rows(config)
    if config.precision.products != "compute" and groups.place.device.type != "meta":
        model.watch = Watch(groups.place.device)
        name = choose(config, groups.place.device).backend
        apply_products(model, config.precision, make_backend(name, config.precision), model.watch)
    apply_recompute(model, config.train.recompute)
    return model


def chunk_rows(config: Config) -> int | None:
    """Rows that the experts of a rank take at once; None: all."""
    given, train = config.dispatch.expert_chunk_rows, config.train
    if given is None:
        # At an even load, as many rows arrive as tokens set out, once for each of their experts.
        return 2 * train.micro_batch * train.seq_len * config.model.experts_per_token
    return given or None


def logical_parameters(model: Transformer) -> list[LogicalParameter]:
    """Every parameter of this rank, in the order of the model."""
    found = []
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            experts = module if isinstance(module, Experts) else None
            shape = tuple(parameter.shape)
            found.append(
                LogicalParameter(
                    name=f"{prefix}.{name}",
                    parameter=parameter,
                    shape=(model.config.num_experts, *shape[1:]) if experts else shape,
                    experts=experts,
                    at_both_ends=prefix == "embed" and embeds_at_end(model.config),
                    decays=parameter.dim() > 1 and not isinstance(module, nn.Embedding),
                    keeps_fp32=isinstance(module, Router),
                )
            )
    return found
