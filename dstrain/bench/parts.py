"""What the parts of a model cost on this machine: one of each is built and run alone, forward and backward.

A part is a stage of a pipeline that holds nothing else, so what is timed is what a pipeline runs. Experts are those of
one rank of mesh.ep, and as many rows come to them as at an even load; nothing travels.

Shapes: B sequences, T inputs of a sequence, D hidden.
"""

import time
from dataclasses import replace

import torch

from dstrain.config.schema import Config, PartCosts
from dstrain.dispatch.local import LocalDispatcher
from dstrain.model.init import init_weights
from dstrain.model.layer import MoELayer, walk_whole
from dstrain.model.moe import Experts
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import chunk_rows, logical_parameters
from dstrain.parallel.recompute import apply_recompute
from dstrain.plan.split import Stage


def measure(config: Config, device: torch.device, rounds: int) -> PartCosts:
    """The time of a micro-batch in each part, in ms; 0 for a part that the model lacks."""
    model = config.model
    layers, dense = model.num_layers, model.num_dense_layers
    first, last = Stage(range(1), False, False), Stage(range(layers - 1, layers), False, False)
    end = Stage(range(layers, layers), False, True)
    head_ms = _time_ms(config, end, 0, device, rounds)
    end_ms = _time_ms(config, end, 1, device, rounds) if model.mtp.depth else head_ms
    return PartCosts(
        embedding=_time_ms(config, Stage(range(0), True, False), 0, device, rounds),
        dense=_time_ms(config, first, 0, device, rounds) if dense else 0.0,
        moe=_time_ms(config, last, 0, device, rounds) if dense < layers else 0.0,
        mtp=max(0.0, end_ms - head_ms),
        head=head_ms,
    )


def _time_ms(config: Config, stage: Stage, mtp_depth: int, device: torch.device, rounds: int) -> float:
    """The quickest of `rounds` passes, after one that warms up: whatever else runs on the machine only adds to it."""
    part = build(config, stage, mtp_depth, device)
    times_ms = []
    for _ in range(1 + rounds):
        begin_s = time.perf_counter()
        run(part, config)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_ms.append((time.perf_counter() - begin_s) * 1e3)
    return min(times_ms[1:])


def build(config: Config, stage: Stage, mtp_depth: int, device: torch.device) -> Transformer:
    """A model that holds `stage` alone, in the compute dtype, with the experts of one rank."""
    held = config.model.num_experts // config.mesh.ep
    model = replace(config.model, mtp=replace(config.model.mtp, depth=mtp_depth))
    with torch.device("meta"):
        part = Transformer(model, range(held), LocalDispatcher(held), [stage])
    part.to_empty(device=device)
    init_weights(part, config.train.seed)
    for parameter in logical_parameters(part):
        if not parameter.keeps_fp32:
            parameter.parameter.data = parameter.parameter.to(getattr(torch, config.precision.compute_dtype))
    for module in part.modules():
        if isinstance(module, Experts):
            module.chunk_rows = chunk_rows(config)
        if isinstance(module, MoELayer):
            # The experts of all ranks fold onto those that are here.
            module.moe.slots_E = torch.arange(model.num_experts, device=device) % held
    apply_recompute(part, config.train.recompute)
    return part


def run(part: Transformer, config: Config) -> None:
    """A micro-batch of random tokens forward and backward; gradients are dropped."""
    train, stage, parameter = config.train, part.stages[0], next(part.parameters())
    device, length = parameter.device, train.seq_len + 1 + part.config.mtp.depth
    tokens_BS = torch.randint(part.config.vocab_size or 1, (train.micro_batch, length), device=device)
    shape_BTD = train.micro_batch, train.seq_len, part.config.hidden_size
    dtype = getattr(torch, config.precision.compute_dtype)
    x_BTD = None if stage.is_first else torch.randn(shape_BTD, dtype=dtype, device=device, requires_grad=True)
    end = walk_whole(part.walk_stage(0, tokens_BS, x_BTD, train.micro_batch))
    outputs = [output for output in (*end.roots, end.output) if output is not None and output.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    part.zero_grad()
