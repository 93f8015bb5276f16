"""The page of `dstrain plan` as data: what is shown as text (tasks/plan.py), as HTML (html.py) or as a picture.

A step of the slowest rank falls into parts that add up: computing, waiting for the pipeline, transfers of tokens that
nothing hides, gradients and weights that nothing hides, the update.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dstrain.config.hardware import Evidence, HardwareConfig
from dstrain.hardware import interval
from dstrain.plan.device import NARROW
from dstrain.plan.job import Job
from dstrain.plan.step import Prediction, predict


@dataclass(frozen=True)
class RankUse:
    """Memory of a pipeline rank: of its data ranks the one that needs most."""

    rank: int
    # By what it holds; they add up to the total.
    parts_gib: dict[str, float]
    total_gib: float


@dataclass(frozen=True)
class Range:
    """A predicted figure with its interval."""

    value: float
    low: float
    high: float

    def through(self, function: Callable[[float], float]) -> "Range":
        """Of a figure that follows from this one, growing or falling with it."""
        low, high = sorted((function(self.low), function(self.high)))
        return Range(function(self.value), low, high)


@dataclass(frozen=True)
class Verdict:
    """Whether a job fits the memory of its devices."""

    # None: the memory is not known.
    fits: bool | None
    # Whether it fits, by how much, on which rank; then what would change it, a line each.
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    # "671.03B parameters on 2,048 x h800_sxm"
    title: str
    # Model, layout, batch and machine: a name and a text each.
    about: dict[str, str]
    gpus: int
    step_s: Range
    # By name; they add up to the step.
    parts_s: dict[str, float]
    # Busy time of a device in a step by kind of work, the longest first.
    kinds_s: dict[str, float]
    tokens_per_s_per_gpu: Range
    # None: the machine names no peak.
    mfu: float | None
    memory: tuple[RankUse, ...]
    # Of a device; 0: the machine does not say.
    capacity_gib: float
    verdict: Verdict
    # Of the whole run.
    steps: int
    tokens: int
    hours: Range
    gpu_hours: Range
    # US dollars; None: the machine names no price.
    cost: Range | None
    # What is taken for granted, and what is not modelled.
    assumptions: tuple[str, ...]
    evidence: tuple[Evidence, ...]


def make(
    job: Job,
    hardware: HardwareConfig,
    played: Prediction,
    memory: Sequence[RankUse],
    verdict: Verdict,
    steps: Mapping[int, int],
) -> Report:
    """`played`: a step with the whole batch; `steps`: those of the run by the sequences of their batches."""
    quick_s = predict(job, hardware).step_s
    scale = played.step_s / quick_s
    low_s, high_s = interval(hardware, lambda machine: predict(job, machine).step_s)
    step_s = Range(played.step_s, low_s * scale, high_s * scale)
    # A smaller batch of a ramp takes less, but fills the pipeline less.
    whole_steps = sum(
        count * predict(replace(job, sequences=sequences), hardware).step_s / quick_s
        for sequences, count in steps.items()
    )
    hours = step_s.through(lambda seconds: seconds * whole_steps / 3600)
    gpu_hours = hours.through(lambda time: time * job.gpus)
    batch = job.sequences * job.seq_len
    return Report(
        title=f"{counted(job.model.total)} parameters on {job.gpus:,} x {hardware.name}",
        about=dict(_about(job, hardware)),
        gpus=job.gpus,
        step_s=step_s,
        parts_s=parts_s(played),
        kinds_s={kind: ms / 1e3 for kind, ms in sorted(played.kinds_ms.items(), key=lambda item: -item[1])},
        tokens_per_s_per_gpu=step_s.through(lambda seconds: batch / seconds / job.gpus),
        mfu=played.mfu or None,
        memory=tuple(memory),
        capacity_gib=hardware.memory_gib,
        verdict=verdict,
        steps=sum(steps.values()),
        tokens=sum(sequences * count for sequences, count in steps.items()) * job.seq_len,
        hours=hours,
        gpu_hours=gpu_hours,
        cost=gpu_hours.through(lambda time: time * hardware.price_per_hour) if hardware.price_per_hour else None,
        assumptions=tuple(_assumptions(job, hardware)),
        evidence=hardware.evidence,
    )


def judged(memory: Sequence[RankUse], capacity_gib: float, cures: Sequence[str]) -> Verdict:
    """`cures`: what would make a job fit that doesn't."""
    worst = max(memory, key=lambda use: use.total_gib)
    need = f"{f'pipeline rank {worst.rank}' if len(memory) > 1 else 'a device'} needs {worst.total_gib:.1f} GiB"
    if not capacity_gib:
        return Verdict(None, (f"Whether it fits is not known: {need}, and hardware.memory_gib is 0.",))
    spare_gib = capacity_gib - worst.total_gib
    if spare_gib >= 0:
        return Verdict(True, (f"Fits: {need} of {capacity_gib:.1f}, {spare_gib:.1f} are left.",))
    line = f"Does not fit: {need}, {-spare_gib:.1f} more than the {capacity_gib:.1f} that there are."
    return Verdict(False, (line, *cures))


def parts_s(prediction: Prediction) -> dict[str, float]:
    return {
        "compute": prediction.compute_s,
        "bubble, slower devices": prediction.bubble_s,
        "exposed all-to-all": prediction.exposed_s,
        "exposed gradients and weights": prediction.reduce_s,
        "update": prediction.update_s,
    }


def _about(job: Job, hardware: HardwareConfig) -> Iterator[tuple[str, str]]:
    yield "model", model_text(job)
    yield "layout", layout_text(job)
    share = f"{job.micro_batches:,} micro-batches of {job.micro_batch} on a rank"
    yield "batch", f"{job.sequences:,} sequences of {job.seq_len:,} tokens, {share}"
    inside, outside = hardware.intra_node_gbytes_per_s, hardware.inter_node_gbytes_per_s
    links = f"{inside:g} GB/s inside a node" + (f", {outside:g} GB/s between nodes" if outside else "")
    yield "machine", f"{job.gpus:,} x {hardware.name}, {hardware.devices_per_node} to a node, {links}"


def short(value: float) -> str:
    """Three digits that count, without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"


def counted(parameters: float) -> str:
    """671.03B, or 9.07M."""
    return f"{parameters / 1e9:,.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:,.2f}M"


def model_text(job: Job) -> str:
    model = job.model
    used = model.total - model.moe_layers * (model.experts - model.experts_per_token) * model.expert_weights
    text = f"{counted(model.total)} parameters in {model.layers} layers"
    if model.experts:
        text += f", {counted(used)} used by a token: {model.experts_per_token} of {model.experts} experts"
    return text + (f", {model.mtp} MTP" if model.mtp else "")


def layout_text(job: Job) -> str:
    """In the words of the config."""
    axes = {"tp": job.tp, "cp": job.cp, "pp": job.pp, "ep": job.ep, "etp": job.etp, "dp": job.dp // max(1, job.ep)}
    parts = [f"{name}={size}" for name, size in axes.items() if size > 1] or ["dp=1"]
    if job.pp > 1:
        parts.append(job.pipeline + (f" with {job.chunks} stages on a rank" if job.pipeline == "interleaved" else ""))
    if job.ep > 1:
        parts.append(f"tokens travel by {job.dispatcher} in {job.wire}" + (", overlapped" if job.overlap else ""))
    parts.append(f"products in {job.products}")
    parts.append(f"recomputed: {', '.join(sorted(job.recompute))}" if job.recompute else "nothing recomputed")
    return ", ".join(parts)


def _assumptions(job: Job, hardware: HardwareConfig) -> Iterator[str]:
    if job.products in NARROW and not hardware.peak_fp8_tflops:
        yield f"{hardware.name} has no FP8 units: FP8 operands are multiplied in BF16, which saves memory and no time."
    if job.ep > 1:
        yield (
            "Balanced routing: all experts get equally many tokens."
            if job.skew == 1
            else f"The busiest rank of an expert-parallel group gets {job.skew:g} times the mean."
        )
    yield "All devices and links are alike, and nobody else uses them; no rank fails."
    yield "Text is ready when a step begins; checkpoints are written beside the steps."
    yield "Attention is causal over the whole sequence; MFU counts the causal half, and nothing that is recomputed."
    yield "The interval is about 90%: every constant of the machine moved by how far its kind of evidence is off."
