"""A finished step as a record: the names and units that metrics.jsonl, the console and W&B share."""

import re

from dstrain.config.schema import Config
from dstrain.engine.loop import LayerLoad, StepReport
from dstrain.metrics.sinks import Value
from dstrain.plan.count import flops_per_token


def step_record(report: StepReport, config: Config, world: int) -> dict[str, Value]:
    """The figures of a step; per-layer figures only every metrics.moe_every_steps steps."""
    tokens_per_s = report.tokens / report.seconds
    record: dict[str, Value] = {
        "step": report.progress.step,
        "tokens": report.progress.tokens,
        "loss": report.loss,
        "loss_main": report.loss_main,
        "loss_mtp": report.loss_mtp,
        "loss_balance": report.loss_balance,
        "loss_z": report.loss_z,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": tokens_per_s / world,
        "mfu": _model_flops_utilisation(tokens_per_s / world, config),
        "step_ms": report.seconds * 1e3,
        "comm_exposed_ms": report.comm.exposed_ms,
        "memory_gib": report.memory_gib,
    }
    if report.progress.step % config.metrics.moe_every_steps == 0:
        for layer in report.layers:
            record |= _layer_record(layer)
    return record


def _model_flops_utilisation(tokens_per_s: float, config: Config) -> float | None:
    """Share of the device's BF16 peak that the model's own FLOPs make up (recomputation does not count)."""
    peak = config.hardware.peak_bf16_tflops * 1e12
    return tokens_per_s * flops_per_token(config.model, config.train.seq_len) / peak if peak else None


def _layer_record(layer: LayerLoad) -> dict[str, Value]:
    """`layers.3.moe.router` becomes moe/layer03/..., `mtp.0.layer.moe.router` moe/mtp0/..."""
    found = re.match(r"(layers|mtp)\.(\d+)\.", layer.name)
    if found is None:
        raise ValueError(f"{layer.name} is not the name of a router")
    place = f"layer{int(found[2]):02d}" if found[1] == "layers" else f"mtp{found[2]}"
    return {
        f"moe/{place}/load_max_over_mean": (layer.load_E.max() / layer.load_E.mean()).item(),
        f"moe/{place}/entropy": layer.entropy,
        f"moe/{place}/bias_range": layer.bias_range,
    }
