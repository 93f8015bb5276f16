"""Published runs predicted: each row of published.py played by the simulation, in the metric in which it was measured.

    metric        of a step that takes so many seconds
    step_s        these
    tok_s_gpu     tokens of the batch, a second and device
    tflops        model FLOPs a second and device: attention by its causal half, the head, nothing that is recomputed
    gpu_h_per_T   device-hours for 10^12 tokens
    pair_ms       no step: four MoE layers of one micro-batch forward, of another one backward, overlapped

All are compared as times underneath; memory, where a row tells it, is an outcome of its own ("<id>:mem").
"""

from collections.abc import Iterable, Iterator

from dstrain.config.hardware import HardwareConfig
from dstrain.config.machine import check_predictable
from dstrain.errors import ConfigError, UserError
from dstrain.plan.activations import TORCHTITAN, Library
from dstrain.plan.job import Job
from dstrain.plan.memory import rank_memory
from dstrain.plan.published import Row, job_of_row, machine_of
from dstrain.plan.simulation import simulate
from dstrain.plan.stages import Shape, Stages
from dstrain.plan.validate import Outcome
from dstrain.schedule.overlap import phases
from dstrain.schedule.pipeline import Kind, Op
from dstrain.schedule.simulate import simulate_slot

# Of the released training trace of DeepSeek-V3.
LAYERS_OF_A_PAIR = 4


def outcomes(rows: Iterable[Row]) -> Iterator[Outcome]:
    """Raises UserError, with the id of the row, for a run that can't be played."""
    for row in rows:
        job, machine = job_of_row(row), machine_of(row)
        try:
            check_predictable(machine, job.gpus)
            seconds = pair_s(job, machine) if row.metric == "pair_ms" else simulate(job, machine).prediction.step_s
        except UserError as error:
            raise UserError(f"Row {row.id}: {error}") from error
        yield _timed(row, job, seconds)
        if row.memory_gib is not None:
            yield _memory(row, job, machine, row.memory_gib)


def pair_s(job: Job, machine: HardwareConfig) -> float:
    """A forward pass under a backward pass, in the middle of a pipeline. Raises ConfigError without transfers."""
    if job.ep == 1 or not job.model.moe_layers:
        rule = "a pair of metric=pair_ms has experts on several ranks"
        raise ConfigError("ep", job.ep, rule, "Give the ep of the run, or another metric.")
    costs = Stages(job, machine).costs(Shape(0, LAYERS_OF_A_PAIR, is_first=False, is_last=False))
    pair = Op(Kind.FORWARD, 0, 0), Op(Kind.BACKWARD, 1, 1)
    actions = list(phases(pair, [LAYERS_OF_A_PAIR] * 2, overlap=True))
    return simulate_slot(actions, [costs, costs]).makespan_ms / 1e3


def in_metric(metric: str, job: Job, seconds: float) -> float:
    """What a step of so many seconds is in a metric; the other way round, too, but for step_s and times alike."""
    tokens = job.sequences * job.seq_len
    if metric == "tok_s_gpu":
        return tokens / job.gpus / seconds
    if metric == "tflops":
        return job.model.flops_per_token(job.seq_len) * tokens / job.gpus / seconds / 1e12
    if metric == "gpu_h_per_T":
        return seconds * job.gpus / 3600 * 1e12 / tokens
    return seconds * 1e3 if metric == "pair_ms" else seconds


def _timed(row: Row, job: Job, seconds: float) -> Outcome:
    predicted = in_metric(row.metric, job, seconds)
    grows = row.metric not in ("tok_s_gpu", "tflops")
    return Outcome(
        id=row.id,
        group=row.group,
        metric=row.metric,
        predicted=predicted,
        measured=row.value,
        is_moe=job.model.experts > 0,
        multi_node=row.n_gpu > row.gpus_per_node,
        rivals=(row.model.name, row.gpu, row.n_gpu, job.sequences, job.seq_len, job.products),
        predicted_s=seconds,
        measured_s=seconds * (row.value / predicted if grows else predicted / row.value),
    )


def _memory(row: Row, job: Job, machine: HardwareConfig, measured_gib: float) -> Outcome:
    library = Library.of(row.source)
    ranks = rank_memory(job, machine, library)
    # What each framework reports.
    reserved = library is TORCHTITAN
    predicted_gib = max(rank.reserved_gib if reserved else rank.allocated_gib for rank in ranks)
    return Outcome(
        id=f"{row.id}:mem",
        group=row.group,
        metric="mem_gib",
        predicted=predicted_gib,
        measured=measured_gib,
        is_moe=job.model.experts > 0,
        multi_node=row.n_gpu > row.gpus_per_node,
    )
