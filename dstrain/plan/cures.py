"""What makes a job fit that does not: changes in the order in which they cost least, each tried.

First each of them alone, as often as it can be made; if none is enough, one after the other until the job fits.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dstrain.config.hardware import HardwareConfig
from dstrain.plan.job import Job
from dstrain.plan.memory import rank_memory
from dstrain.schedule.pipelines.choose import layout, rule_broken

# Of DeepSeek-V3 (section 3.2.3): large to keep and cheap to compute again.
CHEAP = ("norm", "mla_up", "swiglu")

# The keys of a change and the job with it; None: it is impossible, or made already.
Changed = tuple[str, Job] | None
Change = Callable[[Job, HardwareConfig], Changed]


def cures(job: Job, hardware: HardwareConfig) -> tuple[str, ...]:
    """A line for each change that makes the job fit, or one for several that do together; none if the job fits or the
    machine's memory is not known."""
    if not hardware.memory_gib or _needs_gib(job, hardware) <= hardware.memory_gib:
        return ()
    found = [_made(change, job, hardware) for change in CHANGES]
    lines = [_line(keys, needs) for keys, _, needs in found if needs <= hardware.memory_gib]
    return tuple(lines) or (_together(job, hardware),)


def _together(job: Job, hardware: HardwareConfig) -> str:
    taken, least = [], _needs_gib(job, hardware)
    for change in CHANGES:
        keys, changed, needs = _made(change, job, hardware)
        if needs < least:
            taken.append(keys)
            job, least = changed, needs
        if least <= hardware.memory_gib:
            return _line(" ".join(taken), least)
    return f"Nothing tried makes it fit; with {' '.join(taken) or 'the job as it is'}, {least:.1f} GiB are needed."


def _made(change: Change, job: Job, hardware: HardwareConfig) -> tuple[str, Job, float]:
    """A change made again and again, until the job fits or needs no less: its keys, the job, what it needs."""
    keys, least = "", _needs_gib(job, hardware)
    while least > hardware.memory_gib:
        changed = change(job, hardware)
        needs = _needs_gib(changed[1], hardware) if changed else least
        if changed is None or needs >= least:
            break
        (keys, job), least = changed, needs
    return keys, job, least


def _line(keys: str, needs_gib: float) -> str:
    return f"With {keys} it fits: {needs_gib:.1f} GiB."


def _needs_gib(job: Job, hardware: HardwareConfig) -> float:
    return max(rank.total_gib for rank in rank_memory(job, hardware))


# -- Changes ----------------------------------------------------------------------------------------------------------


def _changed(job: Job, keys: str, **fields: Any) -> Changed:
    """If the schedule takes the micro-batches that there are then."""
    changed = replace(job, **fields)
    if changed.sequences % (changed.dp * changed.micro_batch):
        return None
    if job.pp > 1 and rule_broken(changed.pipeline, changed.pp, changed.micro_batches, changed.chunks):
        return None
    return keys, changed


def _recompute(job: Job, names: tuple[str, ...]) -> Changed:
    if job.recompute >= set(names):
        return None
    return _changed(job, f"train.recompute='[{', '.join(names)}]'", recompute=frozenset(names))


def _recompute_cheap(job: Job, hardware: HardwareConfig) -> Changed:
    return None if "layer" in job.recompute else _recompute(job, CHEAP if job.model.is_mla else ("norm", "swiglu"))


def _recompute_layers(job: Job, hardware: HardwareConfig) -> Changed:
    return _recompute(job, ("layer",))


def _fewer_in_flight(job: Job, hardware: HardwareConfig) -> Changed:
    if job.pp > 1 or job.in_flight == 1:
        return None
    return _changed(job, "schedule.in_flight=1", in_flight=1, overlap=False)


def _smaller_micro_batch(job: Job, hardware: HardwareConfig) -> Changed:
    size = job.micro_batch // 2
    return _changed(job, f"train.micro_batch={size}", micro_batch=size) if size and job.micro_batch % 2 == 0 else None


def _fp8(job: Job, hardware: HardwareConfig) -> Changed:
    if job.products != "bf16" or not hardware.peak_fp8_tflops or not job.model.is_mla:
        return None
    return _changed(job, "precision=fp8", products="fp8_block", wire="fp8", moment_bytes=2)


def _more_expert_ranks(job: Job, hardware: HardwareConfig) -> Changed:
    """Experts over more of the ranks that there are."""
    ep = 2 * job.ep
    if not job.model.experts or job.model.experts % ep or job.gpus % (job.pp * job.etp * ep):
        return None
    return _changed(job, f"mesh.ep={ep} mesh.dp={job.expert_dp // 2}", ep=ep)


def _leaner_pipeline(job: Job, hardware: HardwareConfig) -> Changed:
    """1F1B holds the fewest micro-batches, and each stage once."""
    if job.pp == 1 or (job.pipeline == "1f1b" and not job.overlap):
        return None
    keys = "schedule.pipeline=1f1b schedule.overlap=false"
    return _changed(job, keys, pipeline="1f1b", chunks=1, overlap=False, split=())


def _longer_pipeline(job: Job, hardware: HardwareConfig) -> Changed:
    pp = 2 * job.pp
    if job.gpus % (pp * job.tp * job.cp) or job.gpus % (pp * job.ep * job.etp):
        return None
    if layout(job.pipeline, pp, job.chunks).num_stages > job.model.layers:
        return None
    keys = f"mesh.pp={pp} mesh.dp={job.gpus // (pp * job.ep)}"
    return _changed(job, keys, pp=pp, split=(), in_flight=1, overlap=job.overlap and job.pp > 1)


def _shared_states(job: Job, hardware: HardwareConfig) -> Changed:
    return _changed(job, "engine.zero_stage=1", zero=1) if job.zero == 0 else None


CHANGES: tuple[Change, ...] = (
    _shared_states,
    _fewer_in_flight,
    _recompute_cheap,
    _smaller_micro_batch,
    _fp8,
    _more_expert_ranks,
    _leaner_pipeline,
    _recompute_layers,
    _longer_pipeline,
)
