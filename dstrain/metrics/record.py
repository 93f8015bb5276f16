"""A finished step as a record: the names and units that metrics.jsonl, the console and W&B share."""

import re

from dstrain.comm.trace import STAGES, CommTotals
from dstrain.config.schema import Config
from dstrain.engine.loop import LayerLoad, StepReport
from dstrain.engine.placement import Moved
from dstrain.mesh.topology import Link
from dstrain.metrics.planned import step_s
from dstrain.metrics.sinks import Value
from dstrain.plan.count import flops_per_token
from dstrain.plan.placement import rank_loads


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
        **_planned_record(report, config),
        "comm_exposed_ms": report.comm.exposed_ms,
        "comm_exposed_worst_ms": report.comm_exposed_worst_ms,
        "comm_busy_ms": report.comm.busy_ms,
        "comm_hidden_share": report.comm.hidden_share,
        **({"stages_wait_ms": report.comm.stages_ms} if config.mesh.pp > 1 else {}),
        **_traffic_record(report.comm),
        "memory_gib": report.memory_gib,
        **{f"fp8/{name}": value for name, value in report.rounding.items()},
    }
    if report.progress.step % config.metrics.moe_every_steps == 0:
        for layer in report.layers:
            record |= _layer_record(layer)
    if report.moved is not None:
        record |= _placement_record(report.moved)
    return record


def _planned_record(report: StepReport, config: Config) -> dict[str, Value]:
    """Absent where there is no plan."""
    seconds = step_s(config, report.tokens)
    return {} if seconds is None else {"planned_step_s": seconds}


def _model_flops_utilisation(tokens_per_s: float, config: Config) -> float | None:
    """Share of the device's BF16 peak that the model's own FLOPs make up (recomputation does not count)."""
    peak = config.hardware.peak_bf16_tflops * 1e12
    return tokens_per_s * flops_per_token(config.model, config.train.seq_len) / peak if peak else None


def _traffic_record(comm: CommTotals) -> dict[str, Value]:
    """What this rank sent, by link and by kind, and what it waited for."""
    links = {f"comm_{link.value}_mb": comm.link_bytes.get(link, 0) / 1e6 for link in (Link.NODE, Link.NETWORK)}
    sent = {f"comm_{kind}_mb": num_bytes / 1e6 for kind, num_bytes in sorted(comm.sent_bytes.items())}
    waits = sorted((kind, waited_ms) for kind, waited_ms in comm.waited_ms.items() if kind != STAGES)
    waited = {f"comm_{kind}_exposed_ms": waited_ms for kind, waited_ms in waits}
    return {**links, **sent, **waited}


def _layer_record(layer: LayerLoad) -> dict[str, Value]:
    """`layers.3.moe.router` becomes moe/layer03/..., `mtp.0.layer.moe.router` moe/mtp0/..."""
    found = re.match(r"(layers|mtp)\.(\d+)\.", layer.name)
    if found is None:
        raise ValueError(f"{layer.name} is not the name of a router")
    place = f"layer{int(found[2]):02d}" if found[1] == "layers" else f"mtp{found[2]}"
    load_E, mean = layer.load_E, layer.load_E.mean()
    of_ranks = rank_loads(load_E.tolist(), layer.placement)
    return {
        f"moe/{place}/load_max_over_mean": (load_E.max() / mean).item(),
        # The rank that everybody waits for.
        f"moe/{place}/rank_load_max_over_mean": max(of_ranks) * len(of_ranks) / sum(of_ranks),
        # Share of the load that lies above the mean of the experts.
        f"moe/{place}/overload_share": ((load_E - mean).clamp(min=0).sum() / load_E.sum()).item(),
        f"moe/{place}/dead_experts": int((load_E == 0).sum()),
        f"moe/{place}/entropy": layer.entropy,
        f"moe/{place}/bias_range": layer.bias_range,
    }


def _placement_record(moved: Moved) -> dict[str, Value]:
    return {
        "placement/moved_experts": moved.experts,
        "placement/sent_mib": moved.sent_bytes / 2**20,
        "placement/ms": moved.seconds * 1e3,
        "placement/load_before": moved.load_before,
        "placement/load_after": moved.load_after,
    }
